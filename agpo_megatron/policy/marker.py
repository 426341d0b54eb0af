"""The marker that makes a folder a checkpoint: written last, it lists every file with its size and CRC-32.

Needs neither Megatron nor process groups; ``checkpoint`` writes the folders of runs, ``stored`` converted ones.
"""

from __future__ import annotations

import errno
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agpo_megatron.config.run_folder import CHECKPOINT_MARKER
from agpo_megatron.files import write_durably
from agpo_megatron.policy import backend

MARKER = CHECKPOINT_MARKER
FORMAT = 1
WINDOW = 32 << 20
"""Bytes of a file held at once while it is digested."""


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, incomplete, damaged or of another model, or that could not be written."""


class CheckpointDamaged(CheckpointError):
    """A checkpoint that was complete once, and is not what was written."""


def write_marker(
    folder: Path,
    layout: Mapping[str, int],
    files: Mapping[str, list[int]],
    facts: Mapping[str, Any],
) -> None:
    """Write the marker. ``files``: [size, CRC-32] by name; ``facts``: content (training or weights), step, extra."""
    marker = {
        "format": FORMAT,
        "layout": dict(layout),
        "megatron_core": backend.MEGATRON_VERSION,
        "files": dict(files),
        **facts,
    }
    write_durably(folder / MARKER, json.dumps(marker, indent=1).encode() + b"\n")


def read_marker(folder: Path) -> dict[str, Any]:
    """The marker of ``folder``. Raises CheckpointError when there is none that this release reads."""
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {folder} does not exist")
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if marker["format"] != FORMAT:
            raise CheckpointError(
                f"checkpoint {folder} has format {marker['format']}, this release reads {FORMAT}"
            )
        _ = [marker[key] for key in ("files", "layout", "content", "step", "extra")]
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {MARKER}: it was never written to its end; use an earlier checkpoint"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointDamaged(f"{folder / MARKER} is damaged ({error})") from error
    return dict(marker)


def check_file(folder: Path, name: str, promised: list[int]) -> None:
    """Raise CheckpointError unless the file is what its marker promises."""
    path = folder / name
    if not path.is_file():
        raise CheckpointDamaged(f"checkpoint {folder} is damaged: {name} is missing")
    try:
        found = digest(path)
    except OSError as error:
        if error.errno not in (errno.EIO, errno.ESTALE):
            raise
        raise CheckpointDamaged(f"checkpoint {folder} is damaged: {name}: {error}") from error
    if found != promised:
        raise CheckpointDamaged(
            f"checkpoint {folder} is damaged: {name} is not what was written; use an earlier checkpoint"
        )


def digest(path: Path) -> list[int]:
    """[size, CRC-32] of a file."""
    size = crc = 0
    window = memoryview(bytearray(min(WINDOW, max(1, path.stat().st_size))))
    # Read, not mapped: a page that a failing file system cannot give would be a signal.
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(window):
            size, crc = size + count, zlib.crc32(window[:count], crc)
    return [size, crc]
