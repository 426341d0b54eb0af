"""Levels of adaptive gates: the number that the controller decides for each optimizer step.

These gates are this project's, not the paper's. Each depends on more than the loss L of its step (eq. 1c), so the
controller, which knows every L before anything trains, turns it into a gate that trainers know already:

``clip.kind`` exp, elu or softplus with ``clip.tau: null``: the level is tau, the running standard deviation of L over
the steps before, each weighing ``MEMORY`` of the next (West 1979, with forgetting)::

    W <- MEMORY W + 1,    m' = m + (L - m) / W,    S <- MEMORY S + (L - m) (L - m'),    tau = sqrt(S / W)     (G1)

so that the gain is a function of L in deviations, and no scale has to be chosen. Until two losses are known tau is 1.

``max0_se``: the level is c of max0 (A4): closed only where L is below 0 by more than chance, ``clip.min`` standard
errors, -2 or lower. With S_g the sum of group g, K groups that train, L = sum S_g::

    L' = max(L, c),    c = clip.min SE(L),    SE^2 = K / (K - 1) sum_g (S_g - L / K)^2                       (G2)

A single group has no standard error and closes nothing.

``random``, a control for comparisons: the level is the gain, 0 or 1. A step is closed with the share of the steps
before on which max0 would have been (L <= 0, or 0 but for rounding), drawn without a look at its own L::

    P(closed) = #{earlier steps with L <= 0} / #{earlier steps};    the first step is open                   (G3)

Levels are in the batch record, so layouts, resume and replay agree on them; ``state`` is the running sums that the next
batch goes on from. A step without anything to train leaves them alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from agpo_megatron.algorithm.settings import TIE, ClipSettings

MEMORY = 0.95
"""Weight of a loss in the running deviation relative to that of the step after: a memory of about 20 steps."""
SMALLEST_TAU = 1e-6
"""The running deviation is not taken below this: losses that never differ say nothing of their scale."""


def gate_levels(
    clip: ClipSettings,
    group_sums: Sequence[Mapping[str, float]],
    scales: Sequence[float],
    state: Sequence[float],
    *,
    seed: int,
    first_step: int,
) -> tuple[list[float], list[float]]:
    """Return (levels, state after the batch); both empty for a gate that needs no level.

    ``group_sums``: for each optimizer step of the batch, the sum -sum w n A of each group that trains in it;
    ``scales``: sum |w n A|, which rounding is measured by.
    ``state``: after the batch before; empty at the start of a run.
    """
    if not clip.has_level:
        return [], []
    levels: list[float] = []
    state = list(state)
    for update, (sums, scale) in enumerate(zip(group_sums, scales, strict=True)):
        loss = math.fsum(sums.values())
        if clip.kind == "max0_se":
            levels.append(clip.min * standard_error(list(sums.values())))
        elif clip.kind == "random":
            steps, closed = state or [0.0, 0.0]
            draw = np.random.Generator(np.random.PCG64([seed, first_step + update, 1])).random()
            levels.append(0.0 if steps and draw < closed / steps else 1.0)
            state = [steps + 1, closed + (loss <= TIE * scale)] if sums else state
        else:
            weight, mean, squares = state or [0.0, 0.0, 0.0]
            known = weight > 1
            levels.append(max(math.sqrt(squares / weight), SMALLEST_TAU) if known else 1.0)
            if sums:
                weight = MEMORY * weight + 1
                moved = mean + (loss - mean) / weight
                squares = MEMORY * squares + (loss - mean) * (loss - moved)
                state = [weight, moved, squares]
    return levels, state


def standard_error(sums: Sequence[float]) -> float:
    """Return the standard error of the sum of K independent group sums (eq. G2); infinite for a single one."""
    count = len(sums)
    if count < 2:
        return math.inf if count else 0.0
    mean = math.fsum(sums) / count
    return math.sqrt(count / (count - 1) * math.fsum((s - mean) ** 2 for s in sums))
