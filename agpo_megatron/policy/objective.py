"""The loss of a micro-batch, and what the adaptive part of AGPO knows about the whole step before it is computed.

    sum_micro-batches [ sum_t g w c l  +  beta sum_t w k  -  c_H sum_t w H ]

with l, k, H policy loss, KL estimate and entropy of a token; w its loss weight, c its rollout correction, g the gain
phi'(L) of the adaptive part where that is folded in (algorithm/adaptive_loss.py). Tensors only, nothing of Megatron.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from agpo_megatron.algorithm.adaptive_loss import Adaptive, AdaptiveKind, Tie
from agpo_megatron.algorithm.policy_loss import (
    POLICY_LOSSES,
    Bounds,
    PolicyLossName,
    Rows,
    TokenLoss,
    negative_log_likelihood,
)
from agpo_megatron.algorithm.regularization import KlEstimator, kl_estimate
from agpo_megatron.policy.packing import PackedBatch
from agpo_megatron.types import TrainSequence

SUMS = (
    "loss",
    "adapted",
    "gain",
    "kl",
    "weighted_entropy",
    "entropy",
    "ratio",
    "clipped",
    "tokens",
    "rollout_diff",
    "rollout_tokens",
)
"""What each micro-batch adds to. ``loss`` is L, by the surrogate; ``adapted`` phi of it, for scopes within a
micro-batch. Beside them ``rollout_diff_max`` is a maximum."""
_LOCAL = ("micro_batch", "sequence", "token")


@dataclass(frozen=True)
class LossSettings:
    """Plain values, so that a command can carry them. Meanings: ``algorithm.loss`` of the configuration.

    ``policy``: a policy loss, or "nll" (supervised). ``old_logprobs``: where the ratio starts.
    """

    policy: PolicyLossName | Literal["nll"] = "ppo"
    old_logprobs: Literal["policy", "rollout"] = "policy"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    adaptive: AdaptiveKind = "none"
    minimum: float = 0.0
    tau: float = 1.0
    tie: Tie = "zero"
    scope: Literal["batch", "micro_batch", "group", "sequence", "token"] = "batch"
    on: Literal["policy", "total"] = "policy"
    when_clipped: Literal["step", "skip_step"] = "step"
    kl_coef: float = 0.0
    kl_estimator: KlEstimator = "k3"
    kl_importance: bool = False
    entropy_coef: float = 0.0

    @property
    def phi(self) -> Adaptive:
        return Adaptive(self.adaptive, self.minimum, self.tau, tie=self.tie)

    @property
    def has_other_terms(self) -> bool:
        """Whether something beside the policy loss has gradients."""
        return self.kl_coef > 0 or self.entropy_coef > 0

    @property
    def needs_the_step(self) -> bool:
        """Whether the adaptive part looks beyond one micro-batch."""
        return self.adaptive != "none" and self.scope not in _LOCAL


def micro_batch_loss(
    settings: LossSettings, logprob: Tensor, entropy: Tensor, batch: PackedBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss (scalar) and statistics (fp64 scalars) of one pack. ``logprob``, ``entropy`` [N], differentiable.

    A pack without rows gives a 0 that backward can still run through: every rank takes part in every collective.
    Raises ValueError for a KL term without reference log-probs.
    """
    current = logprob.detach()
    old = current if batch.old_logprobs is None else batch.old_logprobs
    w = batch.weights.to(logprob.dtype)
    token = _policy_loss(settings, logprob, old, batch)
    corrected = w * batch.correction.to(w.dtype)
    values = corrected * token.surrogate
    gains, adapted = _gains(settings, w, values, batch)
    total = (corrected * gains * token.loss).sum()

    kl = torch.zeros_like(current)
    if settings.kl_coef > 0 and len(current):
        if batch.ref_logprobs is None:
            raise ValueError("a KL term needs reference log-probs; score the batch with them first")
        start = old if settings.kl_importance else None
        k = kl_estimate(logprob, batch.ref_logprobs.to(w.dtype), settings.kl_estimator, start)
        total = total + settings.kl_coef * (w * k).sum()
        kl = k.detach()
    if settings.entropy_coef > 0:
        total = total - settings.entropy_coef * (w * entropy).sum()

    diff = (current - batch.rollout_logprobs).abs() * batch.has_rollout
    sums = {
        "loss": values,
        "adapted": adapted,
        "gain": gains,
        "kl": w * kl,
        "weighted_entropy": w * entropy.detach(),
        "entropy": entropy.detach(),
        "ratio": token.ratio,
        "clipped": token.is_clipped,
        "tokens": torch.ones_like(current),
        "rollout_diff": diff,
        "rollout_tokens": batch.has_rollout,
    }
    stats = {name: value.double().sum() for name, value in sums.items()}
    stats["rollout_diff_max"] = diff.double().amax() if len(diff) else diff.double().sum()
    return total, stats


def sequence_values(settings: LossSettings, logprob: Tensor, batch: PackedBatch) -> Tensor:
    """S_i = sum_t w c l of each sequence of the pack, [S] fp64, without gradient: the part sums of eq. 1e."""
    old = logprob.detach() if batch.old_logprobs is None else batch.old_logprobs
    token = _policy_loss(settings, logprob, old, batch)
    values = (batch.weights * batch.correction).double() * token.surrogate.double()
    return values.new_zeros(len(batch.spans)).index_add(0, batch.sequence, values)


@dataclass
class PartSum:
    """A part of the step: its weight sum W and its loss sum S (eq. 1e)."""

    weight: float = 0.0
    loss: float = 0.0


def on_policy_parts(sequences: Iterable[TrainSequence]) -> dict[str, PartSum] | None:
    """Sums by group at ratio 1, where every policy loss is -A: S = -sum w c A. None when a ratio is not 1."""
    parts: dict[str, list[tuple[float, float]]] = {}
    for s in sequences:
        trained = s.trained()
        if not trained:
            continue
        if s.old_logprobs:
            return None
        c = math.fsum(s.correction[t] for t in trained) if s.correction else float(len(trained))
        share = (s.loss_weight * len(trained), -s.loss_weight * s.advantage * c)
        parts.setdefault(s.group_id, []).append(share)
    return {
        group: PartSum(math.fsum(w for w, _ in shares), math.fsum(x for _, x in shares))
        for group, shares in parts.items()
    }


def scored_parts(
    batches: Sequence[PackedBatch], values: Sequence[Tensor], group_of: Mapping[str, str]
) -> dict[str, PartSum]:
    """Sums by group from a forward pass: ``values`` of ``sequence_values``, one [S] per pack."""
    parts: dict[str, PartSum] = {}
    for batch, sums in zip(batches, values, strict=True):
        for i, span in enumerate(batch.spans):
            part = parts.setdefault(group_of[span.sample_id], PartSum())
            part.weight += float(batch.weights[span.start : span.stop].double().sum())
            part.loss += float(sums[i])
    return parts


@dataclass(frozen=True)
class Gate:
    """The adaptive part of a step whose loss is known: ``loss`` L, ``value`` phi of it, ``gains`` by group."""

    loss: float
    value: float
    gains: dict[str, float]

    @property
    def mean(self) -> float:
        """What metrics report: the gain of the step, or the mean over groups."""
        return math.fsum(self.gains.values()) / len(self.gains) if self.gains else 0.0


def gate_of(settings: LossSettings, shares: Sequence[Mapping[str, PartSum]]) -> Gate:
    """From the part sums of all replicas, in one order everywhere. Raises ValueError for a loss that is not finite."""
    weights: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    for share in shares:
        for group, part in share.items():
            weights.setdefault(group, []).append(part.weight)
            losses.setdefault(group, []).append(part.loss)
    phi = settings.phi
    loss = math.fsum(x for values in losses.values() for x in values)
    if settings.scope == "batch":
        gain = phi.gain(loss)
        return Gate(loss, phi.value(loss), dict.fromkeys(losses, gain) or {"": gain})
    whole = {group: math.fsum(values) for group, values in weights.items()}
    means = {g: math.fsum(losses[g]) / whole[g] for g in losses}
    value = phi.scoped_value(list(whole.values()), [means[g] for g in whole])
    return Gate(loss, value, {g: phi.gain(mean) for g, mean in means.items()})


def _policy_loss(
    settings: LossSettings, logprob: Tensor, old: Tensor, batch: PackedBatch
) -> TokenLoss:
    if settings.policy == "nll":
        loss = negative_log_likelihood(logprob)
        plain = logprob.detach()
        return TokenLoss(
            loss, -plain, torch.zeros_like(plain, dtype=torch.bool), torch.ones_like(plain)
        )
    dtype = logprob.dtype
    rows = Rows(
        logprob, old.to(dtype), batch.advantages.to(dtype), batch.sequence, len(batch.spans)
    )
    bounds = Bounds(settings.clip_low, settings.clip_high, settings.dual_clip)
    return POLICY_LOSSES[settings.policy](rows, bounds)


def _gains(
    settings: LossSettings, w: Tensor, values: Tensor, batch: PackedBatch
) -> tuple[Tensor, Tensor]:
    """(gain of each row [N], phi of the parts) for what is decided here: folded gains, and scopes within a pack."""
    nothing = torch.zeros_like(w)
    if batch.gains is not None:
        return batch.gains.to(w.dtype)[batch.sequence], nothing
    if settings.adaptive == "none" or settings.scope not in _LOCAL or not len(w):
        return torch.ones_like(w), nothing
    if settings.scope == "micro_batch":
        part, count = torch.zeros_like(batch.sequence), 1
    elif settings.scope == "sequence":
        part, count = batch.sequence, len(batch.spans)
    else:
        part, count = torch.arange(len(w), device=w.device), len(w)
    whole = w.double().new_zeros(count).index_add(0, part, w.double())
    sums = torch.zeros_like(whole).index_add(0, part, values.double())
    means = torch.where(whole > 0, sums / whole.clamp_min(1e-300), 0.0)
    phi = settings.phi
    return phi.gains(means).to(w.dtype)[part], whole * phi.values(means)
