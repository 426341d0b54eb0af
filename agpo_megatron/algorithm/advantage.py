"""Advantages from rewards: the estimators, and the treatment of zero-variance groups (A1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from agpo_megatron.algorithm.settings import Estimator, ZeroVariance

WITHOUT_GROUP_BASELINE = ("reinforce_pp", "batch_norm")


def is_zero_variance(raw_rewards: Sequence[float], tol: float) -> bool:
    """Return whether all rewards of a group are equal:  max - min <= tol,  in double precision.

    Call it on the RAW rewards, before any length term. This test, and never
    ``advantage == 0``, decides whether the loss mask drops a group: normalising equal non-dyadic
    rewards in single precision leaves rounding noise that the small epsilon blows up (0.9 thirty
    times gives |A| = 0.15), and a sample exactly at the mean of a mixed group has advantage 0
    though its group is informative.

    Raises ValueError when the group is empty or a reward is not finite.
    """
    if not raw_rewards:
        raise ValueError("a group without rewards has no variance; every group needs samples")
    _check_finite(raw_rewards)
    return max(raw_rewards) - min(raw_rewards) <= tol


def step_advantages(
    raw: Sequence[Sequence[float]],
    shaped: Sequence[Sequence[float]],
    token_counts: Sequence[Sequence[int]],
    *,
    estimator: Estimator,
    zero_variance: ZeroVariance,
    tol: float,
    std_eps: float,
    correct: Sequence[Sequence[bool]],
    ddof: Literal[0, 1] = 1,
) -> list[list[float]]:
    """Return the advantages of all responses of a step, by group; all tokens of a response share one.

    ``raw``: rewards of the functions by group, which alone decide zero variance. ``shaped``: the
    same plus length and KL terms; these are normalised. ``token_counts``: trained tokens n of each
    response. ``correct``: which responses are right.
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
    for group, shaped_group, counts in zip(raw, shaped, token_counts, strict=True):
        if not len(group) == len(shaped_group) == len(counts):
            raise ValueError(
                f"advantages: {len(group)} raw rewards, {len(shaped_group)} shaped ones and "
                f"{len(counts)} token counts in one group"
            )
        _check_finite(shaped_group)
    no_variance = [is_zero_variance(group, tol) for group in raw]
    match estimator:
        case "group_norm":
            values = [_normalised(group, std_eps, ddof) for group in shaped]
        case "group_center":
            values = [_centred(group) for group in shaped]
        case "rloo":
            values = [
                [x * len(group) / (len(group) - 1) for x in _centred(group)]
                if len(group) > 1
                else [0.0]
                for group in shaped
            ]
        case "batch_norm":
            values = _whitened(shaped, [[1] * len(group) for group in shaped], std_eps, ddof)
        case "reinforce_pp":
            values = _whitened(shaped, token_counts, std_eps, ddof)
        case "reinforce_pp_baseline":
            values = _whitened([_centred(g) for g in shaped], token_counts, std_eps, ddof)
        case _:
            raise ValueError(f"unknown advantage estimator {estimator!r}")
    for i, group in enumerate(raw):
        if no_variance[i] and zero_variance == "constant":
            values[i] = [_zero_variance_constant(correct[i])] * len(group)
        elif no_variance[i] and estimator not in WITHOUT_GROUP_BASELINE:
            values[i] = [0.0] * len(group)
    return values


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


def _normalised(rewards: Sequence[float], std_eps: float, ddof: int) -> list[float]:
    if len(rewards) == 1:
        return [0.0]
    centred = _centred(rewards)
    sigma = math.sqrt(math.fsum(x * x for x in centred) / (len(centred) - ddof))
    return [x / (sigma + std_eps) for x in centred]


def _whitened(
    groups: Sequence[Sequence[float]],
    counts: Sequence[Sequence[int]],
    std_eps: float,
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
    scale = math.sqrt(variance) + std_eps
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
