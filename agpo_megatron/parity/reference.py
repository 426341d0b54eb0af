"""The independent reference: a decoder, AGPO's loss and AdamW in plain torch, fp64, one process.

It reads Hugging Face tensors by their own names, runs each sequence alone and knows nothing of Megatron, of loss
weights, of packing, of micro-batches or of ranks. Llama, Qwen2, Qwen3, and their mixtures of experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from agpo_megatron.algorithm.settings import AggregationMode
from agpo_megatron.parity.batch import Recorded

Weights = Mapping[str, Tensor]
"""fp64 tensors by their Hugging Face names."""

ROUTE_MARGIN = 1e-5
"""Router probabilities closer than this could be ordered differently in fp32: such a batch proves nothing."""


@dataclass(frozen=True)
class Objective:
    """The loss of a whole step by its definition (docs/algorithm.md).

    ``aggregation``: from token losses to L. ``adaptive``: phi of L at ratio 1, or (``scope`` "group") of each group's
    share of it: "max0" is max(L, ``minimum``), "exp" is tau exp(L / tau). ``kl``, ``entropy``: coefficients of the KL
    term (k3) and of the entropy bonus, which phi does not touch. ``clip``: lower and upper distance of the ratio from
    1. ``norm_length``: constant of the aggregation seq_mean_token_sum_norm. ``tis``: bound of the importance weights of
    tokens against the rollout server; None: no correction.
    """

    kind: Literal["ppo", "gspo", "gspo_token", "cispo", "gmpo", "sapo", "nll"] = "ppo"
    aggregation: AggregationMode = "token_mean"
    adaptive: Literal["none", "max0", "exp"] = "none"
    scope: Literal["batch", "group"] = "batch"
    minimum: float = 0.0
    tau: float = 4.0
    kl: float = 0.0
    entropy: float = 0.0
    clip: tuple[float, float] = (0.2, 0.28)
    temperature: float = 1.0
    norm_length: int = 64
    tis: float | None = None


# ---------------------------------------------------------------- the model


def logits(weights: Weights, config: Mapping[str, Any], tokens: Sequence[int]) -> Tensor:
    """Return the logits of one sequence, [n, vocabulary]."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    n, eps = len(tokens), config["rms_norm_eps"]
    angle = torch.outer(torch.arange(n, dtype=torch.float64), rotary_frequencies(config, dim))
    cos, sin = (torch.cat([f, f], -1)[:, None] for f in (angle.cos(), angle.sin()))

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weights[name + ".weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[name + ".weight"], weights.get(name + ".bias"))

    def head_norm(x: Tensor, name: str) -> Tensor:
        return norm(x, name) if name + ".weight" in weights else x

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    x = weights["model.embed_tokens.weight"][torch.tensor(tokens)]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h = norm(x, layer + "input_layernorm")
        q, k, v = (linear(h, f"{layer}self_attn.{p}_proj").view(n, -1, dim) for p in "qkv")
        q = rotate(head_norm(q, layer + "self_attn.q_norm"))
        k = rotate(head_norm(k, layer + "self_attn.k_norm"))
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(dim)
        attention = scores.masked_fill(future, -math.inf).softmax(-1)
        mixed = torch.einsum("hij,jhd->ihd", attention, v).reshape(n, heads * dim)
        x = x + linear(mixed, layer + "self_attn.o_proj")
        x = x + feed_forward(weights, config, norm(x, layer + "post_attention_layernorm"), layer)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return norm(x, "model.norm") @ head.T


def rotary_frequencies(config: Mapping[str, Any], head_dim: int) -> Tensor:
    """Return inverse frequencies [head_dim / 2], with llama3 scaling (Llama 3.1 report, section 3.2) if configured."""
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


def feed_forward(weights: Weights, config: Mapping[str, Any], x: Tensor, layer: str) -> Tensor:
    """Apply SwiGLU, or a mixture of SwiGLU experts: x [n, hidden] to the same shape."""

    def swiglu(gate: str, up: str, down: str) -> Tensor:
        hidden = F.silu(x @ weights[gate + ".weight"].T) * (x @ weights[up + ".weight"].T)
        return hidden @ weights[down + ".weight"].T

    if layer + "mlp.gate_proj.weight" in weights:
        return swiglu(*(f"{layer}mlp.{p}_proj" for p in ("gate", "up", "down")))
    mixtral = layer + "block_sparse_moe.gate.weight" in weights
    room = layer + ("block_sparse_moe" if mixtral else "mlp")
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    share = expert_shares(
        x @ weights[room + ".gate.weight"].T,
        config["num_experts_per_tok"],
        renormalise=mixtral or config["norm_topk_prob"],
    )
    outputs = [swiglu(*(f"{room}.experts.{e}.{p}" for p in names)) for e in range(share.shape[1])]
    return torch.einsum("ne,enh->nh", share, torch.stack(outputs))


def expert_shares(router: Tensor, chosen: int, *, renormalise: bool) -> Tensor:
    """Return the expert weights, [n, experts]: softmax of the router's logits, kept for the ``chosen`` largest of each
    token, 0 elsewhere; with ``renormalise`` those of a token sum to 1.

    Raises ValueError if rounding could choose other experts, whose gradients could not be compared.
    """
    share = router.softmax(-1)
    ranked = share.sort(-1, descending=True).values
    margin = float((ranked[:, chosen - 1] - ranked[:, chosen]).detach().min())
    if margin < ROUTE_MARGIN:
        raise ValueError(f"two experts of one token are {margin:.1e} apart; take another seed")
    share = share * (share >= ranked[:, chosen - 1 : chosen])
    return share / share.sum(-1, keepdim=True) if renormalise else share


def log_probs(
    weights: Weights, config: Mapping[str, Any], tokens: Sequence[int], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the log-probs of ``tokens[1:]`` and the entropy at those positions, each [n - 1]."""
    table = (logits(weights, config, tokens)[:-1] / temperature).log_softmax(-1)
    chosen = table.gather(1, torch.tensor(list(tokens[1:]), dtype=torch.int64)[:, None])[:, 0]
    return chosen, -(table.exp() * table).sum(-1)


# ---------------------------------------------------------------- the loss


@dataclass(frozen=True)
class Truth:
    """The values that every layout must reproduce. ``loss``: L, at ratio 1 where phi acts on it; ``value``: after phi.
    ``gradients``: of the policy loss times the gain phi'(L), and of the other terms.
    ``entropy``: mean over the trained tokens. ``logprobs``, ``entropies``: for every token but the first. ``ratios``:
    for the trained tokens."""

    loss: float
    value: float
    gradients: dict[str, Tensor]
    entropy: float
    logprobs: dict[str, Tensor]
    entropies: dict[str, Tensor]
    ratios: Tensor


def token_losses(
    chosen: Tensor, old: Tensor, advantage: float, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Return (l of each trained token of a sequence, to be differentiated; its value in the reported L), [n] each.

    The definitions are those of docs/algorithm.md, section 3, with r = p / p_old of a token. The reported value is
    -min(r A, clip(r) A), with the ratio of the sequence where the method has one, but -clip(r) A for cispo and -r A for
    sapo, whose l is not the objective.
    """
    a, (low, high) = torch.as_tensor(advantage, dtype=torch.float64), objective.clip

    def clipped(ratio: Tensor) -> Tensor:
        return -torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)

    log_ratio = chosen - old
    ratio = log_ratio.exp()
    match objective.kind:
        case "nll":
            loss = -chosen
        case "ppo":
            loss = clipped(ratio)
        case "gspo":
            loss = clipped(log_ratio.mean().exp().expand_as(chosen))
        case "gspo_token":
            own = (chosen - chosen.detach()).exp()
            loss = clipped(log_ratio.mean().exp().detach() * own)
        case "cispo":
            bounded = ratio.detach().clamp(1 - low, 1 + high)
            return -bounded * a * chosen, -bounded * a
        case "gmpo":
            bounded = log_ratio.clamp(max=high) if a > 0 else log_ratio.clamp(min=-low)
            loss = (-bounded.mean().exp() * a).expand_as(chosen)
        case "sapo":
            tau = 1.0 if a > 0 else 1.05
            return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * a, (-ratio * a).detach()
    return loss, loss.detach()


def aggregate(losses: Sequence[Tensor], objective: Objective) -> Tensor:
    """Return L of the trained tokens' losses, one tensor per sequence that has any (docs/algorithm.md, section 4)."""
    match objective.aggregation:
        case "token_mean":
            return torch.cat(list(losses)).mean()
        case "seq_mean_token_mean":
            return torch.stack([x.mean() for x in losses]).mean()
        case "seq_mean_token_sum":
            return torch.stack([x.sum() for x in losses]).mean()
        case "seq_mean_token_sum_norm":
            return torch.stack([x.sum() for x in losses]).mean() / objective.norm_length
    raise ValueError(f"unknown aggregation {objective.aggregation}")


def adapt(loss: Tensor, objective: Objective) -> Tensor:
    """Return phi(L)."""
    match objective.adaptive:
        case "max0":
            return loss if loss > objective.minimum else 0 * loss + objective.minimum
        case "exp":
            return objective.tau * (loss / objective.tau).exp()
    return loss


def policy_loss(
    losses: Mapping[str, list[Tensor]], values: Mapping[str, list[Tensor]], objective: Objective
) -> tuple[Tensor, float, float]:
    """Return (policy loss to be differentiated, L, phi of L). Both mappings: one tensor per sequence, by group; those
    of ``values`` are what L is made of.

    Over parts p (the step, or its groups) of weight W_p: the gradient is that of sum gain_p loss_p, where the gain is
    phi'(L_p / W_p), and the value is sum W_p phi(L_p / W_p).
    """
    parts = [set(losses)] if objective.scope == "batch" else [{name} for name in losses]
    total, value = torch.zeros((), dtype=torch.float64), 0.0
    for part in parts:

        def share(of: Mapping[str, list[Tensor]], part: set[str] = part) -> Tensor:
            return aggregate([x * (g in part) for g in of for x in of[g]], objective)

        weight = share({g: [torch.ones_like(x) for x in xs] for g, xs in values.items()})
        if objective.scope == "batch":
            weight = torch.ones_like(weight)
        mean = (share(values) / weight).detach().requires_grad_()
        adapted = adapt(mean, objective)
        (gain,) = torch.autograd.grad(adapted, mean)
        total = total + gain * share(losses)
        value += float((weight * adapted).detach())
    everything = [x for group in values.values() for x in group]
    return total, float(aggregate(everything, objective)), value


def other_terms(chosen: Tensor, entropy: Tensor, s: Recorded, objective: Objective) -> Tensor:
    """Return beta k3 - c H of each token after the first; k3 = e^-d + d - 1, d the log-ratio to the reference."""
    total = -objective.entropy * entropy
    if objective.kl:
        d = chosen - torch.tensor(s.ref_logprobs[1:], dtype=torch.float64)
        total = total + objective.kl * ((-d).exp() + d - 1)
    return total


def truth(
    weights: Weights, config: Mapping[str, Any], batch: Sequence[Recorded], objective: Objective
) -> Truth:
    """Compute loss, gradient, log-probs and entropies of one step on ``batch``."""
    leaves = {name: w.double().clone().requires_grad_() for name, w in weights.items()}
    losses: dict[str, list[Tensor]] = {}
    values: dict[str, list[Tensor]] = {}
    others, trained_entropy, ratios = [], [], []
    logprobs, entropies = {}, {}
    for s in batch:
        chosen, entropy = log_probs(leaves, config, s.tokens, objective.temperature)
        logprobs[s.sample_id] = chosen.detach()
        entropies[s.sample_id] = entropy.detach()
        mask = torch.tensor(s.loss_mask[1:], dtype=torch.bool)
        if s.kept and mask.any():
            old = chosen.detach()
            if s.old_logprobs:
                old = torch.tensor(s.old_logprobs[1:], dtype=torch.float64)
            loss, value = token_losses(chosen[mask], old[mask], s.advantage, objective)
            if objective.tis is not None:  # q of the weights that the batch starts from
                rollout = torch.tensor(s.rollout_logprobs[1:], dtype=torch.float64)
                weight = (old - rollout)[mask].exp().clamp(max=objective.tis)
                loss, value = weight * loss, weight * value
            if objective.adaptive != "none":  # phi is decided at ratio 1
                value = torch.full_like(value, -s.advantage)
            losses.setdefault(s.group_id, []).append(loss)
            values.setdefault(s.group_id, []).append(value)
            others.append(other_terms(chosen, entropy, s, objective)[mask])
            trained_entropy.append(entropy.detach()[mask])
            log_ratio = (chosen.detach() - old)[mask]
            if objective.kind in ("gspo", "gspo_token"):  # the ratio of the sequence
                log_ratio = log_ratio.mean().expand_as(log_ratio)
            ratios.append(log_ratio.exp())
    to_differentiate, reported, adapted = policy_loss(losses, values, objective)
    (to_differentiate + aggregate(others, objective)).backward()
    return Truth(
        loss=reported,
        value=adapted,
        gradients={n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in leaves.items()},
        entropy=float(torch.cat(trained_entropy).mean()),
        logprobs=logprobs,
        entropies=entropies,
        ratios=torch.cat(ratios),
    )


class AdamW:
    """AdamW (arXiv:1711.05101) after clipping the global norm, from moments of 0; no decay on vectors."""

    def __init__(
        self,
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        grad_clip: float,
    ) -> None:
        self.lr, self.weight_decay, self.betas, self.eps = lr, weight_decay, betas, eps
        self.grad_clip = grad_clip
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.steps = 0

    def step(self, weights: Weights, gradients: Weights) -> tuple[dict[str, Tensor], float]:
        """Return the weights after one more step, and the gradient norm before clipping."""
        self.steps += 1
        norm = math.sqrt(sum(float(g.pow(2).sum()) for g in gradients.values()))
        scale = min(1.0, self.grad_clip / (norm + 1e-6)) if self.grad_clip else 1.0
        stepped, (b1, b2) = {}, self.betas
        for name, w in weights.items():
            g, w = gradients[name] * scale, w.double()
            m, v = self.moments.get(name, (torch.zeros_like(w), torch.zeros_like(w)))
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            self.moments[name] = m, v
            m_hat, v_hat = m / (1 - b1**self.steps), v / (1 - b2**self.steps)
            decay = self.weight_decay if w.dim() > 1 else 0.0
            stepped[name] = w * (1 - self.lr * decay) - self.lr * m_hat / (v_hat.sqrt() + self.eps)
        return stepped, norm


def updates(
    weights: Weights,
    config: Mapping[str, Any],
    parts: Sequence[Sequence[Recorded]],
    objective: Objective,
    optimizer: AdamW,
) -> tuple[list[list[Recorded]], list[Truth], dict[str, Tensor]]:
    """Take one optimizer step for each of the ``parts`` of a batch; all old log-probs are those of the first weights.

    Returns the parts with their old log-probs, the truth of each step, and the weights after the last.
    """
    scored, truths = [], []
    current = {name: w.double() for name, w in weights.items()}
    for part in parts:
        old = {}
        for s in part:
            chosen, _ = log_probs(weights, config, s.tokens, objective.temperature)
            old[s.sample_id] = [0.0, *chosen.tolist()]
        scored.append([replace(s, old_logprobs=old[s.sample_id]) for s in part])
        truths.append(truth(current, config, scored[-1], objective))
        current, _ = optimizer.step(current, truths[-1].gradients)
    return scored, truths, current
