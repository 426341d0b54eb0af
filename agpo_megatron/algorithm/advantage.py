"""From the rewards of one group to its advantages: GRPO's normalisation, AGPO's rule, eq. A1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal


def is_zero_variance(raw_rewards: Sequence[float], tol: float) -> bool:
    """Whether all rewards of a group agree:  max - min <= tol,  in double precision.

    To be asked of the RAW accuracy rewards, before any length term. This, and never
    ``advantage == 0``, decides whether the loss mask drops a group: normalising identical
    non-dyadic rewards in single precision leaves rounding noise that the small epsilon blows up
    (0.9 thirty times gives |A| = 0.15), and a member that sits exactly at the mean of a mixed group
    has a zero advantage though its group is informative.

    Raises ValueError when the group is empty or a reward is not finite.
    """
    if not raw_rewards:
        raise ValueError("a group without rewards has no variance; every group needs samples")
    _check_finite(raw_rewards)
    return max(raw_rewards) - min(raw_rewards) <= tol


def group_advantages(
    raw: Sequence[float],
    shaped: Sequence[float],
    *,
    zero_variance: Literal["zero", "constant"],
    tol: float,
    std_eps: float,
    r_max: float,
    r_min: float,
) -> list[float]:
    """Advantages of the G responses of one group; all tokens of a response share its advantage.

    ``raw``: accuracy rewards, which alone decide zero variance. ``shaped``: the same plus the
    length term, which the normalisation uses. ``r_max``, ``r_min``: raw reward of a right and of a
    wrong answer::

        mixed group     A_i = (r_i - mu) / (sigma + eps)   r shaped, sigma with ddof 1       (A1)
        zero variance   A_i = 0           under "zero" (v3: the loss mask then drops the group)
                        A_i = +1, -1, 0   under "constant" (v1), for r = r_max, r = r_min, neither

    Source: GRPO arXiv:2402.03300; the constants arXiv:2503.15952 v1. The authors' code tests for 0
    and 1 although its rewards are -1 and +1, so that -1 is never given there; with ``r_max`` and
    ``r_min`` it is.
    Raises ValueError when ``raw`` and ``shaped`` differ in length, are empty, or hold a number that
    is not finite.
    """
    if len(raw) != len(shaped):
        raise ValueError(f"advantages: {len(raw)} raw rewards but {len(shaped)} shaped ones")
    if is_zero_variance(raw, tol):
        constant = (
            _zero_variance_constant(raw, r_max, r_min, tol) if zero_variance == "constant" else 0.0
        )
        return [constant] * len(raw)
    _check_finite(shaped)
    # Deviations from the minimum, summed exactly: the result cannot depend on the order of the
    # samples, and equal shaped rewards give exactly 0.
    lowest = min(shaped)
    above = [reward - lowest for reward in shaped]
    mean = math.fsum(above) / len(above)
    centred = [x - mean for x in above]
    sigma = math.sqrt(math.fsum(x * x for x in centred) / (len(centred) - 1))
    return [x / (sigma + std_eps) for x in centred]


def _zero_variance_constant(raw: Sequence[float], r_max: float, r_min: float, tol: float) -> float:
    """+1 for all right, -1 for all wrong, 0 for equal partial rewards."""
    if all(abs(reward - r_max) <= tol for reward in raw):
        return 1.0
    if all(abs(reward - r_min) <= tol for reward in raw):
        return -1.0
    return 0.0


def _check_finite(rewards: Sequence[float]) -> None:
    for reward in rewards:
        if not math.isfinite(reward):
            raise ValueError(
                f"reward {reward} is not finite; the reward function must return an ordinary number"
            )
