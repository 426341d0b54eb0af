"""SGLang's own implementations, by reference."""

from sglang.srt.models import llama, mistral, mixtral, qwen2, qwen3, qwen3_moe

EntryClass = [
    *llama.EntryClass,
    *mistral.EntryClass,
    mixtral.EntryClass,
    qwen2.EntryClass,
    qwen3.EntryClass,
    qwen3_moe.EntryClass,
]
