"""Limits of a step's metrics: committed with its batch, compared on every rank before the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FAR = 1.0
"""Nats by which the log-probs of server and trainer differ at a token that counts as far apart."""


@dataclass(frozen=True)
class Limit:
    """Largest (``above``) or smallest healthy value of a metric. ``guard``: the name of who watches it."""

    guard: str
    metric: str
    bound: float
    above: bool = True

    def broken_by(self, metrics: Mapping[str, float]) -> bool:
        """Return whether the metric is there and beyond the bound. NaN is beyond none: ``not_finite`` sees to it."""
        value = metrics.get(self.metric, self.bound)
        return value > self.bound if self.above else value < self.bound


def broken(limits: Sequence[Limit], metrics: Mapping[str, float]) -> list[Limit]:
    """Return the limits that ``metrics`` break."""
    return [limit for limit in limits if limit.broken_by(metrics)]


def not_finite(metrics: Mapping[str, float]) -> list[str]:
    """Return which of loss and gradient norm are not finite numbers."""
    return [
        key
        for key in ("loss/policy", "loss/unclipped", "grad_norm")
        if not math.isfinite(metrics.get(key, 0.0))
    ]
