"""Comparison of a layout with the reference: per quantity the deviation, its limit, and the worst tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agpo_megatron.config.schema import TrainConfig
from agpo_megatron.parity.cases import CaseResult
from agpo_megatron.parity.reference import AdamW, Truth


@dataclass(frozen=True)
class Limits:
    """Largest deviation of each quantity, relative to its largest entry (loss and norm: to the larger of them and 1).

    ``step``: for the change of the parameters by the optimizer. It includes the rounding of the parameters themselves,
    lr / |parameter| above the rest.
    """

    loss: float = 1e-6
    logprob: float = 1e-6
    entropy: float = 1e-6
    gradient: float = 1e-5
    step: float = 1e-4


FP32 = Limits()
EXPERTS = Limits(gradient=1e-4, step=1e-3)
"""Limits for mixtures of experts: the order of token sums differs per expert."""
BF16 = Limits(loss=2e-2, logprob=2e-2, entropy=2e-2, gradient=1e-1, step=float("inf"))
"""Limits for bf16: activations keep 8 bits (2^-8 = 4e-3) and pass through four layers. Sums of many roundings stay
within a few of them; single entries of a gradient, which are sums of both signs, within some more."""


@dataclass(frozen=True)
class Deviation:
    """The ``error`` of one quantity; ``worst``: the tensor or sample that has it."""

    quantity: str
    error: float
    limit: float
    worst: str = ""

    @property
    def passes(self) -> bool:
        return self.error <= self.limit  # false for NaN


def deviations(
    found: CaseResult,
    truth: Truth,
    start: Mapping[str, Tensor],
    train: TrainConfig,
    limits: Limits = FP32,
) -> list[Deviation]:
    """Return the deviations of one step of ``found`` from the weights ``start`` [Hugging Face names, fp64].

    Raises ValueError for tensors or samples that are missing or too many.
    """
    (stats,) = found.stats
    stepped, norm = optimizer(train).step(start, truth.gradients)
    moved = {n: w.double() - start[n] for n, w in found.weights.items()}
    logprobs = {k: torch.from_numpy(lp[1:]) for k, (lp, _) in found.scores.items()}
    entropies = {k: torch.tensor([h]) for k, (lp, h) in found.scores.items() if len(lp) > 1}
    return [
        _scalar("loss", stats["loss/unclipped"], truth.loss, limits.loss),
        _scalar("adapted loss", stats["loss/policy"], truth.value, limits.loss),
        _scalar("mean entropy", stats["policy/entropy"], truth.entropy, limits.entropy),
        _scalar("grad norm", stats["grad_norm"], norm, limits.gradient),
        worst("log-prob", logprobs, truth.logprobs, limits.logprob, together=True),
        worst(
            "entropy",
            entropies,
            {k: h.mean()[None] for k, h in truth.entropies.items() if len(h)},
            limits.entropy,
            together=True,
        ),
        worst("gradient", found.gradients, truth.gradients, limits.gradient),
        worst("step", moved, {n: stepped[n] - start[n] for n in start}, limits.step),
    ]


def update_deviations(
    found: CaseResult,
    truths: Sequence[Truth],
    start: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    limits: Limits,
) -> list[Deviation]:
    """Return the deviations of several steps from the weights ``start`` to ``weights``: loss, mean ratio and gradient
    norm of each, the gradient of the last, and the change of the parameters over all of them.

    Deviations of one step change the weights of the next: the limits are those of one step times the number of steps.
    """
    count = len(truths)
    each = []
    for number, (metrics, truth) in enumerate(zip(found.stats, truths, strict=True), start=1):
        at = f"update {number}"
        norm = math.sqrt(sum(float(g.pow(2).sum()) for g in truth.gradients.values()))
        ratio = float(truth.ratios.mean())
        each += [
            _scalar(f"loss, {at}", metrics["loss/unclipped"], truth.loss, limits.loss * count),
            _scalar(f"ratio, {at}", metrics["policy/ratio_mean"], ratio, limits.loss * count),
            Deviation(
                f"grad norm, {at}",
                abs(metrics["grad_norm"] - norm) / norm,
                limits.gradient * count,
            ),
        ]
    moved = {n: w.double() - start[n] for n, w in found.weights.items()}
    expected = {n: weights[n] - start[n] for n in start}
    return [
        *each,
        worst("gradient", found.gradients, truths[-1].gradients, limits.gradient * count),
        worst("weights", moved, expected, limits.step * count),
    ]


def optimizer(train: TrainConfig) -> AdamW:
    """Return the reference's optimizer with the settings of ``train``."""
    return AdamW(
        lr=train.lr,
        weight_decay=train.weight_decay,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_eps,
        grad_clip=train.grad_clip,
    )


def gradient_of_each_tensor(found: CaseResult, truth: Truth, limits: Limits) -> list[Deviation]:
    """Return the deviation of each tensor's gradient, worst first."""
    each = [
        worst("gradient", {n: found.gradients[n]}, {n: g}, limits.gradient)
        for n, g in truth.gradients.items()
    ]
    return sorted(each, key=lambda d: -_order(d.error))


def worst(
    quantity: str,
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    limit: float,
    *,
    together: bool = False,
) -> Deviation:
    """Return the largest |found - expected| of any tensor over that tensor's largest entry (``together``: over the
    largest of all). Raises ValueError when names or shapes differ."""
    if found.keys() != expected.keys():
        raise ValueError(f"{quantity}: {sorted(found.keys() ^ expected.keys())} on one side only")
    scale = max((_largest(e) for e in expected.values()), default=0.0) if together else None
    return max(
        (
            Deviation(
                quantity,
                _largest(found[n].double() - e) / (scale or _largest(e) or 1e-12),
                limit,
                n,
            )
            for n, e in expected.items()
        ),
        key=lambda d: _order(d.error),
    )


def failures(found: list[Deviation]) -> Iterator[str]:
    """Yield a line for each deviation that does not pass."""
    for d in found:
        if not d.passes:
            at = f" in {d.worst}" if d.worst else ""
            yield f"{d.quantity} is off by {d.error:.1e}{at}, more than {d.limit:.0e}"


def _scalar(quantity: str, found: float, expected: float, limit: float) -> Deviation:
    return Deviation(quantity, abs(found - expected) / max(1.0, abs(expected)), limit)


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _order(error: float) -> float:
    """Return the sort key of an error; NaN is worst."""
    return float("inf") if error != error else error
