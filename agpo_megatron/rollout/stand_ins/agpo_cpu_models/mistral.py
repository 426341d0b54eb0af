"""SGLang's own implementation, by reference."""

from sglang.srt.models.mistral import EntryClass

__all__ = ["EntryClass"]
