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
    SEQUENCE_RATIO_LOSSES,
    Bounds,
    PolicyLossName,
    Rows,
    TokenLoss,
    negative_log_likelihood,
)
from agpo_megatron.algorithm.regularization import KlEstimator, kl_estimate
from agpo_megatron.logprob.fused import TokenLoss as TokenLosses
from agpo_megatron.policy.packing import PackedBatch
from agpo_megatron.types import TrainSequence

SUMS = (
    "loss",
    "scale",
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
"""What each micro-batch adds to. ``loss`` is L, by the surrogate; ``scale`` the size of its terms, sum |w c A|;
``adapted`` phi of it, for scopes within a micro-batch. Beside them ``rollout_diff_max`` is a maximum."""
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
    losses, sums = _row_losses(settings, logprob, entropy, batch)
    stats = {name: value.double().sum() for name, value in sums.items()}
    diff = sums["rollout_diff"].double()
    stats["rollout_diff_max"] = diff.amax() if len(diff) else diff.sum()
    return losses.sum(), stats


def token_losses(settings: LossSettings, batch: PackedBatch) -> TokenLosses | None:
    """The loss row by row, where a row's loss depends on nothing but its own log-prob and entropy; None elsewhere.

    It does depend on others with the ratio of a sequence (gspo, gspo_token, gmpo), and with an adaptive part whose
    gain is decided within the pack by the loss of several rows (scopes ``micro_batch`` and ``sequence``).
    """
    decided_within = settings.adaptive != "none" and settings.scope in ("micro_batch", "sequence")
    if settings.policy in SEQUENCE_RATIO_LOSSES or decided_within:
        return None

    def losses(logprob: Tensor, entropy: Tensor, rows: slice) -> Tensor:
        return _row_losses(settings, logprob, entropy, batch.part(rows))[0]

    return losses


def _row_losses(
    settings: LossSettings, logprob: Tensor, entropy: Tensor, batch: PackedBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss of each row, weighted; what each row adds to ``SUMS``, and ``rollout_diff``), all [N]."""
    current = logprob.detach()
    old = current if batch.old_logprobs is None else batch.old_logprobs
    w = batch.weights.to(logprob.dtype)
    token = _policy_loss(settings, logprob, old, batch)
    corrected = w * batch.correction.to(w.dtype)
    values = corrected * token.surrogate
    scale = (corrected * batch.advantages.to(w.dtype)).abs()
    gains, adapted = _gains(settings, w, values, scale, batch)
    losses = corrected * gains * token.loss

    kl = torch.zeros_like(current)
    if settings.kl_coef > 0 and len(current):
        if batch.ref_logprobs is None:
            raise ValueError("a KL term needs reference log-probs; score the batch with them first")
        start = old if settings.kl_importance else None
        k = kl_estimate(logprob, batch.ref_logprobs.to(w.dtype), settings.kl_estimator, start)
        losses = losses + settings.kl_coef * w * k
        kl = k.detach()
    if settings.entropy_coef > 0:
        losses = losses - settings.entropy_coef * w * entropy

    return losses, {
        "loss": values,
        "scale": scale,
        "adapted": adapted,
        "gain": gains,
        "kl": w * kl,
        "weighted_entropy": w * entropy.detach(),
        "entropy": entropy.detach(),
        "ratio": token.ratio,
        "clipped": token.is_clipped,
        "tokens": torch.ones_like(current),
        "rollout_diff": (current - batch.rollout_logprobs).abs() * batch.has_rollout,
        "rollout_tokens": batch.has_rollout,
    }


def sequence_values(settings: LossSettings, logprob: Tensor, batch: PackedBatch) -> Tensor:
    """S_i = sum_t w c l of each sequence of the pack, [S] fp64, without gradient: the part sums of eq. 1e."""
    old = logprob.detach() if batch.old_logprobs is None else batch.old_logprobs
    token = _policy_loss(settings, logprob, old, batch)
    values = (batch.weights * batch.correction).double() * token.surrogate.double()
    return values.new_zeros(len(batch.spans)).index_add(0, batch.sequence, values)


@dataclass(frozen=True)
class PartSum:
    """A part of the step: its weight sum W, its loss sum S (eq. 1e) and the size of its terms, sum |w c A|."""

    weight: float = 0.0
    loss: float = 0.0
    scale: float = 0.0


def on_policy_parts(sequences: Iterable[TrainSequence]) -> dict[str, PartSum] | None:
    """Sums by group at ratio 1, where every policy loss is -A: S = -sum w c A. None when a ratio is not 1."""
    parts: dict[str, list[PartSum]] = {}
    for s in sequences:
        trained = s.trained()
        if not trained:
            continue
        if s.old_logprobs:
            return None
        c = math.fsum(s.correction[t] for t in trained) if s.correction else float(len(trained))
        loss = -s.loss_weight * s.advantage * c
        share = PartSum(s.loss_weight * len(trained), loss, abs(loss))
        parts.setdefault(s.group_id, []).append(share)
    return {group: _total(shares) for group, shares in parts.items()}


def scored_parts(
    batches: Sequence[PackedBatch], values: Sequence[Tensor], group_of: Mapping[str, str]
) -> dict[str, PartSum]:
    """Sums by group from a forward pass: ``values`` of ``sequence_values``, one [S] per pack."""
    parts: dict[str, list[PartSum]] = {}
    for batch, sums in zip(batches, values, strict=True):
        for span, loss in zip(batch.spans, sums.tolist(), strict=True):
            if (
                span.start == span.stop
            ):  # nothing trains: no part of the step, as in ``on_policy_parts``
                continue
            rows = slice(span.start, span.stop)
            w = batch.weights[rows].double()
            scale = (w * batch.correction[rows] * batch.advantages[rows]).abs().sum()
            share = PartSum(float(w.sum()), loss, float(scale))
            parts.setdefault(group_of[span.sample_id], []).append(share)
    return {group: _total(shares) for group, shares in parts.items()}


def _total(parts: Iterable[PartSum]) -> PartSum:
    """Exactly rounded sums, so that the order of the parts does not matter."""
    listed = list(parts)
    return PartSum(
        math.fsum(p.weight for p in listed),
        math.fsum(p.loss for p in listed),
        math.fsum(p.scale for p in listed),
    )


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
    """From the part sums of all replicas. Raises ValueError for a loss that is not finite."""
    by_group: dict[str, list[PartSum]] = {}
    for share in shares:
        for group, part in share.items():
            by_group.setdefault(group, []).append(part)
    groups = {group: _total(parts) for group, parts in by_group.items()}
    whole, phi = _total(groups.values()), settings.phi
    if settings.scope == "batch":
        gain = phi.gain(whole.loss, whole.scale)
        return Gate(whole.loss, phi.value(whole.loss, whole.scale), dict.fromkeys(groups, gain))
    means = {g: (p.loss / p.weight, p.scale / p.weight) for g, p in groups.items()}
    value = math.fsum(groups[g].weight * phi.value(*mean) for g, mean in means.items())
    return Gate(whole.loss, value, {g: phi.gain(*mean) for g, mean in means.items()})


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
    settings: LossSettings, w: Tensor, values: Tensor, scale: Tensor, batch: PackedBatch
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

    def sums(x: Tensor) -> Tensor:
        return x.new_zeros(count, dtype=torch.float64).index_add(0, part, x.double())

    whole = sums(w)
    divisor = whole.where(whole > 0, 1.0)
    means, scales = sums(values) / divisor, sums(scale) / divisor
    phi = settings.phi
    return phi.gains(means, scales).to(w.dtype)[part], whole * phi.values(means, scales)
