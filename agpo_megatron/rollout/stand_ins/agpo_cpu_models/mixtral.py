"""SGLang's own implementation, by reference."""

from sglang.srt.models.mixtral import EntryClass

__all__ = ["EntryClass"]
