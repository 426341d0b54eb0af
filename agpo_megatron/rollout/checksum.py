"""The weight checksums that a CPU server reports, computed from Hugging Face tensors.

SGLang hashes each of its parameters (srt/utils/weight_checker.py; on CPU ``sha256(bytes)[:8]``,
managers/mm_utils.py ``tensor_hash``). Its parameters are Hugging Face tensors, some stacked along dimension 0 and
embeddings padded with zero rows, so hashing the parts in turn gives the same number without building the stack.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from hashlib import _Hash

EXPERTS = re.compile(r"(.*\.experts)\.(\d+)\.(?:(gate_proj|w1)|(up_proj|w3)|down_proj|w2)\.weight")
"""Tensors of an expert: those of all experts are stacked, gate and up of each together (fused_moe_triton/layer.py)."""
STACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""SGLang's stacked linear layers and their parts in order (llama.py, qwen2.py: stacked_params_mapping)."""
VOCAB_PADDING = 64
"""vocab_parallel_embedding.py: DEFAULT_VOCAB_PADDING_SIZE."""


class ServerChecksums:
    """Feed every published tensor once, parts of a stack in their order; ``result`` maps SGLang's names to hashes."""

    def __init__(self) -> None:
        self._hashes: dict[str, _Hash] = {}
        self._next_part: dict[str, int] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take the next tensor as published, by its Hugging Face name. Raises ValueError on a part out of order."""
        target, part = _target(name)
        if part != self._next_part.get(target, 0):
            raise ValueError(f"{name} came as part {part} of {target}, out of order")
        self._next_part[target] = part + 1
        digest = self._hashes.setdefault(target, hashlib.sha256())
        tensor = tensor.detach().cpu().contiguous()
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            missing_rows = -tensor.shape[0] % VOCAB_PADDING
            digest.update(bytes(missing_rows * tensor.shape[1] * tensor.element_size()))

    def result(self) -> dict[str, str]:
        return {name: digest.hexdigest()[:16] for name, digest in self._hashes.items()}


def _target(name: str) -> tuple[str, int]:
    """Find the fused tensor and part: ``...k_proj.weight`` is part 1 of ``...qkv_proj.weight``."""
    if found := EXPERTS.fullmatch(name):
        experts, number, gate, up = found.groups()
        if gate or up:
            return f"{experts}.w13_weight", 2 * int(number) + (up is not None)
        return f"{experts}.w2_weight", int(number)
    prefix, _, last = name.rpartition(".")
    module, dot, leaf = prefix.rpartition(".")
    for stacked, parts in STACKED.items():
        if leaf in parts:
            return f"{module}{dot}{stacked}.{last}", parts.index(leaf)
    return name, 0
