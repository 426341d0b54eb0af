"""What the ranks of a layout execute to show that conversion is exact in it, and tiny models of every architecture."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conversion_models import ALL
from torch import Tensor

from agpo_megatron.config.schema import PolicyConfig, TrainConfig
from agpo_megatron.samples import TrainSequence

EXPERTS = ("mixtral", "qwen3_moe")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}
CONFIGS: dict[str, dict[str, Any]] = {
    **{name: {**config, "num_hidden_layers": 4} for name, config in ALL.items()},
    "tied": {**ALL["llama"], "num_hidden_layers": 4, "tie_word_embeddings": True},
    "llama3": {**ALL["llama"], "num_hidden_layers": 4, "head_dim": 16, "rope_parameters": LLAMA3},
    "qwen3_moe_renormalised": {**ALL["qwen3_moe"], "num_hidden_layers": 4, "norm_topk_prob": True},
}


def hf_model(name: str) -> Any:
    """A seeded fp32 transformers model whose weights are large enough for an error to show; bf16 holds them exactly."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    settings = {k: v for k, v in CONFIGS[name].items() if k != "architectures"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.2 * torch.randn_like(parameter)).bfloat16())
    return model


@dataclass(frozen=True)
class Model:
    """``hf_dir``: as transformers saved it; ``converted``: by to-megatron; ``saved``: where this layout saves it."""

    hf_dir: str
    converted: str
    saved: str


@dataclass
class Found:
    """``from_hf``, ``from_megatron``, ``from_stored``: weights by Hugging Face name, after loading the one folder, the
    other by Megatron, the other as a run does that begins from it; ``logits``: of each sequence;
    ``logprobs``: of each, scored in one pack. Complete on rank 0 after ``merged``."""

    from_hf: dict[str, Tensor] = field(default_factory=dict)
    from_megatron: dict[str, Tensor] = field(default_factory=dict)
    from_stored: dict[str, Tensor] = field(default_factory=dict)
    logits: list[Tensor] = field(default_factory=list)
    logprobs: dict[str, list[float]] = field(default_factory=dict)


def execute(
    rank: int, models: dict[str, Model], policy: PolicyConfig, batch: list[TrainSequence]
) -> dict[str, Found]:
    """Every model in one layout: load, score, export; fill again from the converted checkpoint, by both
    readers, export; save."""
    logging.disable(logging.WARNING)
    from agpo_megatron.policy import backend

    backend.activate("cpu")
    from agpo_megatron.policy import checkpoint, parallel, weights
    from agpo_megatron.policy.policy import Policy, opened

    found = {}
    try:
        for name, model in models.items():
            built = Policy.build(
                model.hf_dir, policy, TrainConfig(adam_eps=1e-5), temperature=1.0, seed=1
            )
            layout = built.layout
            result = found[name] = Found()
            result.from_hf = {n: t.clone() for n, t in built.named_hf_tensors()}
            if policy.dtype == "fp32":
                mine = batch[layout.dp_rank :: layout.dp]
                result.logprobs = {k: s.logprobs.tolist() for k, s in built.score([mine]).items()}
                if layout.tp * layout.pp == 1:
                    result.logits = logits(built, mine)
            forget(built)
            weights.load_stored(built.chunks, opened(Path(model.converted)), layout)
            result.from_stored = {n: t.clone() for n, t in built.named_hf_tensors()}
            forget(built)
            checkpoint.load_weights(model.converted, built.chunks, layout)
            built.optimizer.reload_model_params()
            result.from_megatron = {n: t.clone() for n, t in built.named_hf_tensors()}
            if model.saved:
                checkpoint.save(model.saved, built, 7, {})
        return found
    finally:
        parallel.shutdown()


def forget(policy: Any) -> None:
    """Leave no weight as it was."""
    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))


def logits(policy: Any, batch: list[TrainSequence]) -> list[Tensor]:
    """[n, vocabulary] of each sequence of one pack, from GPTModel itself."""
    from agpo_megatron.policy.attention import PackedSequences
    from agpo_megatron.policy.context import share_of
    from agpo_megatron.policy.packing import pack

    packed = pack(batch, 1)
    share = share_of(packed, policy.layout.cp_group)
    params = PackedSequences.of(share, packed.lengths)
    with torch.no_grad(), policy.backend.scope():
        table = policy.chunks[0](
            packed.tokens[None], packed.positions[None], None, packed_seq_params=params
        )
    vocab = policy.weight_map.shape.vocab_size
    parts = table[0, :, :vocab].split(list(packed.lengths))
    by_id = {span.sample_id: part for span, part in zip(packed.spans, parts, strict=False)}
    return [by_id[s.sample_id] for s in batch]


def merged(ranks: list[dict[str, Found]], name: str) -> Found:
    """All stages' tensors together; log-probs from rank 0, logits of every replica."""
    whole = Found()
    for found in (rank[name] for rank in ranks):
        whole.from_hf.update(found.from_hf)
        whole.from_megatron.update(found.from_megatron)
        whole.from_stored.update(found.from_stored)
        whole.logprobs.update(found.logprobs)
        whole.logits += found.logits
    return whole
