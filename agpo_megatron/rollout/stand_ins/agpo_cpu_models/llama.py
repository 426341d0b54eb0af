"""SGLang's own implementation, by reference."""

from sglang.srt.models.llama import EntryClass

__all__ = ["EntryClass"]
