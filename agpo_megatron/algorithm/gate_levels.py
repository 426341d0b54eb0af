"""Levels of adaptive gates: the number that the controller decides for each optimizer step.

These gates are this project's, not the paper's. Each depends on more than the loss L of its step (eq. 1c), so the
controller, which knows every L before anything trains, turns it into a gate that trainers know already:

``clip.kind`` exp, elu or softplus with ``clip.tau: null``: the level is tau, the running standard deviation of L over
the steps before, each weighing ``MEMORY`` of the next (West 1979, with forgetting)::

    W <- MEMORY W + 1,    m' = m + (L - m) / W,    S <- MEMORY S + (L - m) (L - m'),    tau = sqrt(S / W)     (G1)

so that the gain is a function of L in deviations, and no scale has to be chosen. Until two losses are known tau is 1.

``random``, a control for comparisons: the level is the gain, 0 or 1. A step is closed with the share of the steps
before on which max0 would have been (L <= 0, or 0 but for rounding), drawn without a look at its own L::

    P(closed) = #{earlier steps with L <= 0} / #{earlier steps};    the first step is open                   (G2)

Levels are in the batch record, so layouts, resume and replay agree on them; ``state`` is the running sums that the next
batch goes on from. A step without anything to train leaves them alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from agpo_megatron.algorithm.settings import TIE, ClipSettings

MEMORY = 0.95
"""Weight of a loss in the running deviation relative to that of the step after: a memory of about 20 steps."""
SMALLEST_TAU = 1e-6
"""The running deviation is not taken below this: losses that never differ say nothing of their scale."""


def gate_levels(
    clip: ClipSettings,
    losses: Sequence[tuple[float, float]],
    state: Sequence[float],
    *,
    seed: int,
    first_step: int,
) -> tuple[list[float], list[float]]:
    """Return (levels, state after the batch); both empty for a gate that needs no level.

    ``losses``: of each optimizer step of the batch, L and its scale sum |w n A|, which rounding is measured by; both 0
    where nothing trains. ``state``: after the batch before; empty at the start of a run.
    """
    if not clip.has_level:
        return [], []
    levels: list[float] = []
    state = list(state)
    for update, (loss, scale) in enumerate(losses):
        if clip.kind == "random":
            steps, closed = state or [0.0, 0.0]
            draw = np.random.Generator(np.random.PCG64([seed, first_step + update, 1])).random()
            levels.append(0.0 if steps and draw < closed / steps else 1.0)
            state = [steps + 1, closed + (loss <= TIE * scale)] if scale else state
        else:
            weight, mean, squares = state or [0.0, 0.0, 0.0]
            known = weight > 1
            levels.append(max(math.sqrt(squares / weight), SMALLEST_TAU) if known else 1.0)
            if scale:
                weight = MEMORY * weight + 1
                moved = mean + (loss - mean) / weight
                squares = MEMORY * squares + (loss - mean) * (loss - moved)
                state = [weight, moved, squares]
    return levels, state
