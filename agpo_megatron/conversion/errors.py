"""The one error of this room."""

from __future__ import annotations


class ConversionError(ValueError):
    """A checkpoint, config or tensor that cannot be converted. The message names the cause and the fix."""
