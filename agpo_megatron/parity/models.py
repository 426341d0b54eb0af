"""Tiny random checkpoints: Hugging Face folders that the policy loads like any other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from agpo_megatron.conversion.weight_map import WeightMap

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 67,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
"""Llama with 67 tokens: no tensor parallel size divides the vocabulary. Its two KV heads are replicated at TP 4."""

LLAMA3: dict[str, Any] = {
    **LLAMA,
    "head_dim": 16,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 2.0,
        "original_max_position_embeddings": 32,
    },
}
QWEN2: dict[str, Any] = {
    **LLAMA,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
MIXTRAL: dict[str, Any] = {
    **LLAMA,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
QWEN3_MOE: dict[str, Any] = {
    **LLAMA,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "moe_intermediate_size": 48,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": False,
    "tie_word_embeddings": True,
}
DENSE = {"untied": LLAMA3, "tied": QWEN2}
EXPERTS = {"untied": MIXTRAL, "tied": QWEN3_MOE}


def write(folder: Path, config: Mapping[str, Any], seed: int = 7) -> Path:
    """Write a checkpoint folder with seeded weights, large enough that every part of the model matters, and exact in
    bf16. The default seed has well-conditioned gradients: that of the keys' bias is a difference of large numbers
    (attention hardly depends on a shift of all keys), which other seeds round up to twice as coarsely."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in WeightMap(config).hf_shapes().items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            value = 1 + 0.1 * noise
        elif name.endswith("bias"):
            value = 0.3 * noise
        else:
            value = noise * (0.25 if "embed" in name else shape[-1] ** -0.5)
        tensors[name] = value.bfloat16().float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Load all tensors in fp64."""
    return {name: t.double() for name, t in load_file(folder / "model.safetensors").items()}
