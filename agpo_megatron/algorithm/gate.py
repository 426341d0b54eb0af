"""The gate: the adaptive part of AGPO's loss, a non-linear phi on the aggregated policy loss L.

    L' = phi(L),    grad L' = phi'(L) grad L

so its only effect on a step is one factor on the gradient, the gain phi'(L)::

    max0      max(L, c)                         gain 1[L > c]                       (A4)
    exp       tau exp(L / tau)                  gain exp(L / tau)                   (1d)
    elu       L + tau if L > 0, else as exp     gain min(1, exp(L / tau))
    softplus  tau log(1 + exp(L / tau))         gain sigmoid(L / tau)

max0 is the loss clip of the paper's v3, reconstructed (docs/algorithm.md, section 5); the other three
are readings of the "exponential normalisation" named in its limitations, whose form is not
published. A running tau, and the gate random, which are not the paper's, get a number of the
controller's for each step (gate_levels.py): tau, and the gain itself.

Input of the gate. It is decided on the policy loss at ratio 1, also where ratios and corrections
are not 1,

    L = - sum_i w_i n_i A_i                                          (1c)

with n_i the trained tokens of sequence i. With complete groups (advantages add up to 0) and
token-mean weights this is - Cov(n, A) / mean(n): L < 0 exactly when longer responses have the
higher advantage. The gate drops the updates that would reward length and keeps those in which the
long answers are the wrong ones; a loss with ratios or corrections in it says something else. L is
known before any forward pass, so a closed gate need not run one. With seq_mean_token_mean it is
identically 0, and the gate would act on rounding noise. Exceptions: ``clip.on: total``, which is
decided on the sum of all terms after the backward pass, and the scopes within a micro-batch, on
the losses that are differentiated.

Scope. phi is not linear, so its argument matters. "batch" is the loss of the whole optimizer step
over all ranks and micro-batches; with several updates per batch, each step has a loss and a gate of
its own. Any smaller scope splits the step into parts p
(micro-batches, groups, sequences, tokens) with W_p = sum of their weights and S_p = sum of w l:

    L' = sum_p W_p phi(S_p / W_p)                                    (1e)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agpo_megatron.algorithm.settings import TIE, AdaptiveKind, ClipSettings, LossSettings, Tie
from agpo_megatron.samples import TrainSequence


@dataclass(frozen=True)
class Adaptive:
    """phi and its derivative.

    ``minimum``: c of max0, the gain of random. ``tie``: gain of max0 at L = c: 0, 1/2 (what torch.maximum does, and so
    the authors' code) or 1 (what clamp does). ``tau``: scale of the others. ``max_exponent``:
    where L / tau exceeds it, exp continues as a straight line, so its gain is at most
    e^max_exponent; downwards it needs no cap.

    Below, ``scale`` is the size of the terms of a loss, sum |w A| over the same part of the step
    (about 1 with token_mean, hundreds with seq_mean_token_sum). For responses of equal length L is
    exactly 0 but for rounding, which must not open or close the gate: L = c wherever
    |L - c| <= TIE * scale.
    """

    kind: AdaptiveKind = "none"
    minimum: float = 0.0
    tau: float = 1.0
    max_exponent: float = 5.0
    tie: Tie = "zero"

    @staticmethod
    def of(clip: ClipSettings) -> Adaptive:
        """Return phi of a step. Raises ValueError when the controller's level is missing."""
        if clip.tau is None:
            raise ValueError(
                f"loss.clip.kind {clip.kind} needs the level that the batch record has for this step"
            )
        return Adaptive(clip.kind, clip.min, clip.tau, tie=clip.tie)

    def value(self, loss: float, scale: float = 1.0) -> float:
        """Return phi(L). Raises LossNotFinite: a closed gate would hide it."""
        return float(self.values(_finite(loss), torch.tensor(scale, dtype=torch.float64)))

    def gain(self, loss: float, scale: float = 1.0) -> float:
        """Return phi'(L), the factor on the gradient. Raises LossNotFinite like ``value``."""
        return float(self.gains(_finite(loss), torch.tensor(scale, dtype=torch.float64)))

    def values(self, losses: Tensor, scales: Tensor) -> Tensor:
        """Return phi of each entry; any shape, same dtype. A tie has the value c."""
        x = losses / self.tau
        match self.kind:
            case "none":
                return losses
            case "max0":
                return losses.where(losses > self.minimum + TIE * scales, self.minimum)
            case "exp":
                capped = x.clamp(max=self.max_exponent)
                return self.tau * capped.exp() * (1.0 + x - capped)
            case "elu":
                return torch.where(losses > 0, losses + self.tau, self.tau * x.clamp(max=0).exp())
            case "softplus":
                return self.tau * torch.logaddexp(x, torch.zeros_like(x))
            case "random":
                return self.minimum * losses

    def gains(self, losses: Tensor, scales: Tensor) -> Tensor:
        """Return phi' of each entry; any shape, same dtype."""
        x = losses / self.tau
        match self.kind:
            case "none":
                return torch.ones_like(losses)
            case "max0":
                above, tied = losses - self.minimum, {"zero": 0.0, "half": 0.5, "full": 1.0}
                gate = (above > TIE * scales).to(losses.dtype)
                return gate.where(above.abs() > TIE * scales, tied[self.tie])
            case "exp":
                return x.clamp(max=self.max_exponent).exp()
            case "elu":
                return x.clamp(max=0).exp()
            case "softplus":
                return x.sigmoid()
            case "random":
                return torch.full_like(losses, self.minimum)


class LossNotFinite(ValueError):
    """The policy loss of a step is infinite or not a number."""


def _finite(loss: float) -> Tensor:
    if not math.isfinite(loss):
        raise LossNotFinite(
            f"policy loss is {loss}; look for non-finite log-probs or advantages in this batch"
        )
    return torch.tensor(loss, dtype=torch.float64)


@dataclass(frozen=True)
class PartSum:
    """A part of the step: its weight sum W, its loss sum S (eq. 1e) and the size of its terms, sum |w A|."""

    weight: float = 0.0
    loss: float = 0.0
    scale: float = 0.0


def total(parts: Iterable[PartSum]) -> PartSum:
    """Return the sum of ``parts``, exactly rounded, so that their order does not matter."""
    listed = list(parts)
    return PartSum(
        _sum([p.weight for p in listed]),
        _sum([p.loss for p in listed]),
        _sum([p.scale for p in listed]),
    )


def _sum(values: Sequence[float]) -> float:
    """The exactly rounded sum; NaN where infinities cancel, on which ``math.fsum`` raises."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def on_policy_parts(sequences: Iterable[TrainSequence]) -> dict[str, PartSum]:
    """Return the sums by group at ratio 1, where the loss of a token is -A: S = -sum w n A (eq. 1c)."""
    parts: dict[str, list[PartSum]] = {}
    for s in sequences:
        if n := len(s.trained()):
            weight = s.scalar("loss_weight") * n
            loss = -weight * s.scalar("advantage")
            parts.setdefault(s.group_id, []).append(PartSum(weight, loss, abs(loss)))
    return {group: total(shares) for group, shares in parts.items()}


@dataclass(frozen=True)
class Gate:
    """The adaptive part of a step: ``loss`` L (eq. 1c), ``value`` phi of it, ``gains`` by group."""

    loss: float
    value: float
    gains: dict[str, float]

    @property
    def mean(self) -> float:
        """The gain for the metrics: that of the step, or the mean over groups."""
        return math.fsum(self.gains.values()) / len(self.gains) if self.gains else 0.0


def gate_of(settings: LossSettings, shares: Sequence[Mapping[str, PartSum]]) -> Gate:
    """Return the gate of a step from the part sums of all replicas. Raises LossNotFinite."""
    by_group: dict[str, list[PartSum]] = {}
    for share in shares:
        for group, part in share.items():
            by_group.setdefault(group, []).append(part)
    groups = {group: total(parts) for group, parts in by_group.items()}
    whole, phi = total(groups.values()), Adaptive.of(settings.clip)
    if settings.clip.scope == "batch":
        gain = phi.gain(whole.loss, whole.scale)
        return Gate(whole.loss, phi.value(whole.loss, whole.scale), dict.fromkeys(groups, gain))
    means = {g: (p.loss / p.weight, p.scale / p.weight) for g, p in groups.items()}
    value = math.fsum(groups[g].weight * phi.value(*mean) for g, mean in means.items())
    return Gate(whole.loss, value, {g: phi.gain(*mean) for g, mean in means.items()})
