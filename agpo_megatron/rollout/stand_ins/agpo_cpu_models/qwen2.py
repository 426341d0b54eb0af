"""SGLang's own implementation, by reference."""

from sglang.srt.models.qwen2 import EntryClass

__all__ = ["EntryClass"]
