"""The independent reference: a Llama/Qwen2 decoder, AGPO's loss and AdamW in plain torch, fp64, one process.

It reads Hugging Face tensors by their own names, runs each sequence alone and knows nothing of Megatron, of packing,
of micro-batches or of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agpo_megatron.types import TrainSequence


def rotary_frequencies(config: Mapping[str, Any], head_dim: int) -> Tensor:
    """Inverse frequencies [head_dim / 2], with llama3 scaling (Llama 3.1 report, section 3.2) where asked for."""
    rope = config.get("rope_parameters") or {}
    theta = config.get("rope_theta") or rope.get("rope_theta") or 10000.0
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    scaling = config.get("rope_scaling") or rope
    if scaling.get("rope_type") != "llama3":
        return frequencies
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = ((original * frequencies / (2 * math.pi)) - low) / (high - low)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * frequencies / scaling["factor"] + smooth * frequencies


def logits(
    weights: Mapping[str, Tensor], config: Mapping[str, Any], tokens: Sequence[int]
) -> Tensor:
    """[n, vocabulary] of one sequence. ``weights``: fp64, Hugging Face names."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    n, eps = len(tokens), config["rms_norm_eps"]
    angle = torch.outer(torch.arange(n, dtype=torch.float64), rotary_frequencies(config, dim))
    cos, sin = (torch.cat([f, f], -1)[:, None] for f in (angle.cos(), angle.sin()))

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weights[name + ".weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return torch.nn.functional.linear(x, weights[name + ".weight"], weights.get(name + ".bias"))

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    x = weights["model.embed_tokens.weight"][torch.tensor(tokens)]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h = norm(x, layer + "input_layernorm")
        q, k, v = (
            linear(h, f"{layer}self_attn.{name}_proj").view(n, -1, dim) for name in ("q", "k", "v")
        )
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(dim)
        attention = scores.masked_fill(future, -math.inf).softmax(-1)
        mixed = torch.einsum("hij,jhd->ihd", attention, v).reshape(n, heads * dim)
        x = x + linear(mixed, layer + "self_attn.o_proj")
        h = norm(x, layer + "post_attention_layernorm")
        gate = torch.nn.functional.silu(linear(h, layer + "mlp.gate_proj"))
        x = x + linear(gate * linear(h, layer + "mlp.up_proj"), layer + "mlp.down_proj")
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return norm(x, "model.norm") @ head.T


def log_probs(
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    tokens: Sequence[int],
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-prob of ``tokens[1:]`` and entropy at those positions, each [n - 1]."""
    table = (logits(weights, config, tokens)[:-1] / temperature).log_softmax(-1)
    chosen = table.gather(1, torch.tensor(list(tokens[1:]), dtype=torch.int64)[:, None])[:, 0]
    return chosen, -(table.exp() * table).sum(-1)


def mean_entropy(
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    sequences: Sequence[TrainSequence],
    temperature: float = 1.0,
) -> float:
    """Entropy in nats, averaged over the tokens that train."""
    picked = [
        log_probs(weights, config, s.tokens, temperature)[1][[t - 1 for t in s.trained()]]
        for s in sequences
    ]
    return float(torch.cat(picked).mean())


def loss(
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    sequences: Sequence[TrainSequence],
    *,
    kind: str,
    temperature: float = 1.0,
    old: Mapping[str, Sequence[float]] | None = None,
    clip: tuple[float, float] = (0.2, 0.28),
    terms: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    """L = sum of w l over all tokens of all sequences; l is -log p ("nll"), the clipped-ratio loss ("ppo"), or
    beta k3 - c H ("terms", of beta and c)."""
    total = torch.zeros((), dtype=torch.float64)
    for s in sequences:
        chosen, entropy = log_probs(weights, config, s.tokens, temperature)
        w = s.loss_weight * torch.tensor(s.loss_mask[1:], dtype=torch.float64)
        if kind == "nll":
            total = total - (w * chosen).sum()
            continue
        if kind == "terms":
            d = chosen - torch.tensor(s.ref_logprobs[1:], dtype=torch.float64)
            k3 = (-d).exp() + d - 1
            total = total + (w * (terms[0] * k3 - terms[1] * entropy)).sum()
            continue
        start = (
            chosen.detach()
            if old is None
            else torch.tensor(old[s.sample_id][1:], dtype=torch.float64)
        )
        ratio = (chosen - start).exp()
        bounded = ratio.clamp(1 - clip[0], 1 + clip[1])
        total = total - (w * torch.minimum(ratio * s.advantage, bounded * s.advantage)).sum()
    return total


def gradients(
    weights: Mapping[str, Tensor], config: Mapping[str, Any], *args: Any, **settings: Any
) -> tuple[float, dict[str, Tensor]]:
    """Loss and its gradient for every tensor."""
    leaves = {name: w.double().clone().requires_grad_() for name, w in weights.items()}
    value = loss(leaves, config, *args, **settings)
    value.backward()
    return value.item(), {
        name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in leaves.items()
    }


def adamw_step(
    weights: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    grad_clip: float,
) -> tuple[dict[str, Tensor], float]:
    """The first AdamW step (arXiv:1711.05101) after clipping the global norm; no decay on vectors. Also the norm."""
    norm = math.sqrt(sum(float(g.pow(2).sum()) for g in grads.values()))
    scale = min(1.0, grad_clip / (norm + 1e-6)) if grad_clip else 1.0
    stepped = {}
    for name, w in weights.items():
        g, w = grads[name] * scale, w.double()
        decay = weight_decay if w.dim() > 1 else 0.0
        m, v = (1 - betas[0]) * g, (1 - betas[1]) * g * g
        m_hat, v_hat = m / (1 - betas[0]), v / (1 - betas[1])
        stepped[name] = w * (1 - lr * decay) - lr * m_hat / (v_hat.sqrt() + eps)
    return stepped, norm
