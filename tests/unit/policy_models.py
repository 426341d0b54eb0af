"""Tiny Hugging Face checkpoints written by transformers itself, and a policy on one rank."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from made import sequence
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from agpo_megatron.config.schema import PolicyConfig, TrainConfig
from agpo_megatron.policy import backend
from agpo_megatron.samples import TrainSequence

# Before any test imports a module of the policy that imports megatron.
backend.activate("cpu")

SMALL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 32,
}


def hf_model(kind: str) -> Any:
    """A seeded fp32 transformers model: llama, tied, llama3 (scaled rope, head_dim 16) or qwen2."""
    torch.manual_seed(7)
    if kind == "qwen2":
        model = Qwen2ForCausalLM(
            Qwen2Config(**SMALL, tie_word_embeddings=True, rope_theta=1e6, rms_norm_eps=1e-6)
        )
    else:
        extra: dict[str, Any] = {"tie_word_embeddings": kind == "tied"}
        if kind == "llama3":
            extra |= {"rope_parameters": LLAMA3_ROPE, "head_dim": 16}
        model = LlamaForCausalLM(LlamaConfig(**SMALL, **extra))
    with torch.no_grad():
        for parameter in model.parameters():
            # transformers draws with std 0.02 and zero biases: too small for an error to show
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.float().eval()


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@contextmanager
def one_rank(hf_dir: Path, policy: PolicyConfig | None = None, **settings: Any) -> Iterator[Any]:
    """A ``Policy`` alone in the world; groups are taken down again afterwards."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    from agpo_megatron.policy import parallel
    from agpo_megatron.policy.policy import Policy

    settings = {"temperature": 1.0, "seed": 1, **settings}
    train = settings.pop("train", TrainConfig(adam_eps=1e-5, grad_clip=0.0))
    try:
        yield Policy.build(hf_dir, policy or PolicyConfig(dtype="fp32"), train, **settings)
    finally:
        parallel.shutdown()
        if dist.is_initialized():
            dist.destroy_process_group()
        logging.disable(logging.NOTSET)


def sequences(lengths: list[int], weight: float = 0.05, seed: int = 0) -> list[TrainSequence]:
    """Random sequences; the first third is prompt (weight 0)."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i, n in enumerate(lengths):
        prompt = max(1, n // 3)
        made.append(
            sequence(
                f"s{i}",
                torch.randint(0, SMALL["vocab_size"], (n,), generator=generator).tolist(),
                weight,
                [0] * prompt + [1] * (n - prompt),
                1.0 if i % 2 else -0.5,
            )
        )
    return made
