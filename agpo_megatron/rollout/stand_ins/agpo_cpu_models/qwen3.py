"""SGLang's own implementation, by reference."""

from sglang.srt.models.qwen3 import EntryClass

__all__ = ["EntryClass"]
