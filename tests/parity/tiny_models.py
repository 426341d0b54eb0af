"""Tiny random checkpoints and batches for the parity tests."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from agpo_megatron.types import TrainSequence

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
TIED = {**LLAMA, "tie_word_embeddings": True}
LLAMA3 = {
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
QWEN2 = {
    **LLAMA,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
}
CONFIGS = {"llama": LLAMA, "tied": TIED, "llama3": LLAMA3, "qwen2": QWEN2}


def write(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """A checkpoint folder with seeded random weights, large enough that every part of the model matters; of values that
    bf16 holds exactly."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    c = config
    dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    q, kv = c["num_attention_heads"] * dim, c["num_key_value_heads"] * dim
    hidden, ffn = c["hidden_size"], c["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], hidden)}
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        for name, shape in (
            ("self_attn.q_proj", (q, hidden)),
            ("self_attn.k_proj", (kv, hidden)),
            ("self_attn.v_proj", (kv, hidden)),
            ("self_attn.o_proj", (hidden, q)),
            ("mlp.gate_proj", (ffn, hidden)),
            ("mlp.up_proj", (ffn, hidden)),
            ("mlp.down_proj", (hidden, ffn)),
            ("input_layernorm", (hidden,)),
            ("post_attention_layernorm", (hidden,)),
        ):
            shapes[f"{p}{name}.weight"] = shape
        if c["model_type"] == "qwen2":
            for name, size in (("q", q), ("k", kv), ("v", kv)):
                shapes[f"{p}self_attn.{name}_proj.bias"] = (size,)
    shapes["model.norm.weight"] = (hidden,)
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], hidden)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            tensors[name] = 1 + 0.1 * noise
        elif name.endswith("bias"):
            tensors[name] = 0.3 * noise
        else:
            tensors[name] = noise * (0.5 if "embed" in name else 1.0 / shape[-1] ** 0.5)
    tensors = {name: t.bfloat16().float() for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    """All tensors in fp64."""
    return {name: t.double() for name, t in load_file(folder / "model.safetensors").items()}


def sequences(lengths: list[int], vocab: int = 67, seed: int = 0) -> list[TrainSequence]:
    """Random sequences whose first third is prompt; weights differ, advantages have both signs."""
    rng = random.Random(seed)
    made = []
    for i, n in enumerate(lengths):
        prompt = max(1, n // 3)
        mask = [0] * min(prompt, n) + [rng.choice([0, 1, 1]) for _ in range(n - prompt)]
        made.append(
            TrainSequence(
                sample_id=f"s{i}",
                tokens=[rng.randrange(vocab) for _ in range(n)],
                loss_weight=rng.choice([0.02, 0.05]),
                loss_mask=mask,
                advantage=rng.uniform(-1.5, 1.5),
                rollout_logprobs=[0.0] + [-rng.uniform(3, 5) for _ in range(n - 1)],
            )
        )
    return made
