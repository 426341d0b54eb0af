"""SGLang's own implementation, by reference."""

from sglang.srt.models.qwen3_moe import EntryClass

__all__ = ["EntryClass"]
