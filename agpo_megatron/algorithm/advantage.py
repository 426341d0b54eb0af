"""Advantages from rewards: the estimators, and the treatment of zero-variance groups (A1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from agpo_megatron.algorithm.settings import Estimator, ZeroVariance

WITHOUT_GROUP_BASELINE = ("reinforce_pp", "batch_norm")
STD_EPS = 1e-6
"""Epsilon beside the standard deviation."""
ZERO_VARIANCE = 1e-6
"""Rewards of a group that differ by at most this are equal."""
ROUNDING = 1e-12
"""An advantage of at most this fraction of the largest one of the step is the rounding of a mean, and 0."""


def is_zero_variance(rewards: Sequence[float]) -> bool:
    """Return whether all rewards of a group are equal:  max - min <= ZERO_VARIANCE,  in double precision.

    This test, and never ``advantage == 0``, decides whether the loss mask drops a group: normalising
    equal non-dyadic rewards in single precision leaves rounding noise that the small epsilon blows
    up (0.9 thirty times gives |A| = 0.15), and a sample exactly at the mean of a mixed group has
    advantage 0 though its group is informative. ``step.varied_groups`` says which rewards it gets.

    Raises ValueError when the group is empty or a reward is not finite.
    """
    if not rewards:
        raise ValueError("a group without rewards has no variance; every group needs samples")
    _check_finite(rewards)
    return max(rewards) - min(rewards) <= ZERO_VARIANCE


def step_advantages(
    rewards: Sequence[Sequence[float]],
    token_counts: Sequence[Sequence[int]],
    varied: Sequence[bool],
    *,
    estimator: Estimator,
    zero_variance: ZeroVariance,
    correct: Sequence[Sequence[bool]],
    length_projection: float = 0.0,
    ddof: Literal[0, 1] = 1,
) -> list[list[float]]:
    """Return the advantages of all responses of a step, by group; all tokens of a response share one.

    ``rewards``: with length and KL terms, by group; these are normalised. ``token_counts``: trained
    tokens n of each response. ``varied``: which groups have variance. ``correct``: which responses
    are right. ``length_projection``: s of ``without_length``. Advantages that are 0 but for rounding are exactly 0.
    With mu, sigma (``ddof``) of the group and G its size::

        group_norm             (r - mu) / (sigma + eps)                       GRPO 2402.03300   (A1)
        group_center           r - mu                                         Dr. GRPO 2503.20783
        rloo                   G / (G - 1) (r - mu)                           RLOO 2402.14740
        batch_norm             (r - mu_B) / (sigma_B + eps)       over the samples of the step
        reinforce_pp           (r - mu_T) / (sigma_T + eps)       over its tokens     2501.03262
        reinforce_pp_baseline  the same whitening of r - mu                           2501.03262

    "Over its tokens" counts each response n times: every token has the return of its response.

    Zero-variance groups::

        "zero", "resample"  0 where the estimator has a group baseline (then the loss mask may drop
                            the group; under "resample" the controller has tried to replace it);
                            reinforce_pp and batch_norm have none and treat it as any other group
        "constant"          +1, -1, 0 for all right, all wrong, neither               (v1, A1)

    The authors' code tests for 0 and 1 although its rewards are -1 and +1, so it never gives -1;
    ``correct`` avoids that. Results do not depend on the order of groups or samples.
    Raises ValueError for lists of different length or a reward that is not finite.
    """
    for group, counts in zip(rewards, token_counts, strict=True):
        if len(group) != len(counts):
            raise ValueError(
                f"advantages: {len(group)} rewards and {len(counts)} token counts in one group"
            )
        _check_finite(group)
    match estimator:
        case "group_norm":
            values = [_normalised(group, ddof) for group in rewards]
        case "group_center":
            values = [_centred(group) for group in rewards]
        case "rloo":
            values = [
                [x * len(group) / (len(group) - 1) for x in _centred(group)]
                if len(group) > 1
                else [0.0]
                for group in rewards
            ]
        case "batch_norm":
            values = _whitened(rewards, [[1] * len(group) for group in rewards], ddof)
        case "reinforce_pp":
            values = _whitened(rewards, token_counts, ddof)
        case "reinforce_pp_baseline":
            values = _whitened([_centred(g) for g in rewards], token_counts, ddof)
        case _:
            raise ValueError(f"unknown advantage estimator {estimator!r}")
    for i, group in enumerate(rewards):
        if not varied[i] and zero_variance == "constant":
            values[i] = [_zero_variance_constant(correct[i])] * len(group)
        elif not varied[i] and estimator not in WITHOUT_GROUP_BASELINE:
            values[i] = [0.0] * len(group)
    bound = ROUNDING * max((abs(a) for group in values for a in group), default=0.0)
    if length_projection:
        values = [
            without_length(group, counts, length_projection)
            for group, counts in zip(values, token_counts, strict=True)
        ]
    return [[a if abs(a) > bound else 0.0 for a in group] for group in values]


def without_length(advantages: Sequence[float], counts: Sequence[int], share: float) -> list[float]:
    """Return the advantages of a group without what they owe to length alone, where that is a reward of length::

        A' = A - s max(0, sum(d A) / sum(d^2)) d,    d = n - mean(n)                                     (G3)

    The slope is that of the regression of A on n in the group; a negative one, short answers being the better ones, is
    left alone. A' still adds up to what A did, and at s = 1 its covariance with length is 0 where it was positive.
    This project's own. ``share``: s; ``counts``: trained tokens n.
    """
    mean = math.fsum(counts) / len(counts)
    off = [n - mean for n in counts]
    square = math.fsum(d * d for d in off)
    slope = (
        math.fsum(d * a for d, a in zip(off, advantages, strict=True)) / square if square else 0.0
    )
    return [a - share * max(0.0, slope) * d for a, d in zip(advantages, off, strict=True)]


def length_advantage_covariance(lengths: Sequence[int], advantages: Sequence[float]) -> float:
    """Return the population covariance (ddof 0) of response length and advantage: Cov of eq. 1c.

    0 for no sequences. ``lengths``: trained tokens n_i per sequence. Raises ValueError on a length
    mismatch.
    """
    if len(lengths) != len(advantages):
        raise ValueError(f"covariance: {len(lengths)} lengths but {len(advantages)} advantages")
    if not lengths:
        return 0.0
    mean_length = math.fsum(lengths) / len(lengths)
    mean_advantage = math.fsum(advantages) / len(advantages)
    return math.fsum(
        (n - mean_length) * (a - mean_advantage) for n, a in zip(lengths, advantages, strict=True)
    ) / len(lengths)


def _centred(rewards: Sequence[float]) -> list[float]:
    """Return r - mu, from exactly summed deviations above the minimum: the result does not depend
    on the order of the samples, and equal rewards give exactly 0."""
    lowest = min(rewards)
    above = [reward - lowest for reward in rewards]
    mean = math.fsum(above) / len(above)
    return [x - mean for x in above]


def _normalised(rewards: Sequence[float], ddof: int) -> list[float]:
    if len(rewards) == 1:
        return [0.0]
    centred = _centred(rewards)
    sigma = math.sqrt(math.fsum(x * x for x in centred) / (len(centred) - ddof))
    return [x / (sigma + STD_EPS) for x in centred]


def _whitened(
    groups: Sequence[Sequence[float]],
    counts: Sequence[Sequence[int]],
    ddof: int,
) -> list[list[float]]:
    """Scale to mean 0 and deviation 1 over the whole step, each value counted ``counts`` times."""
    flat = [(x, n) for g, c in zip(groups, counts, strict=True) for x, n in zip(g, c, strict=True)]
    total = sum(n for _, n in flat)
    if total <= ddof:
        return [[0.0] * len(group) for group in groups]
    lowest = min(x for x, _ in flat)
    mean = math.fsum((x - lowest) * n for x, n in flat) / total
    variance = math.fsum(n * (x - lowest - mean) ** 2 for x, n in flat) / (total - ddof)
    scale = math.sqrt(variance) + STD_EPS
    return [[(x - lowest - mean) / scale for x in group] for group in groups]


def _zero_variance_constant(correct: Sequence[bool]) -> float:
    """Return +1 for all right, -1 for all wrong, 0 for equal rewards of right and wrong answers."""
    return 1.0 if all(correct) else 0.0 if any(correct) else -1.0


def _check_finite(rewards: Sequence[float]) -> None:
    for reward in rewards:
        if not math.isfinite(reward):
            raise ValueError(
                f"reward {reward} is not finite; the reward function must return an ordinary number"
            )
