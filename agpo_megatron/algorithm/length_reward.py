"""Length terms of the reward: bonus or penalty of a response for its length, beside its accuracy.

The terms are added to the raw accuracy rewards, and only the sum is normalised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal


def agpo_length_bonus(
    correct: Sequence[bool],
    lengths: Sequence[int],
    weight: float,
    *,
    groups: Literal["mixed", "all"] = "mixed",
    tie: Literal["zero", "full"] = "zero",
) -> list[float]:
    """Return AGPO's length reward of one group (A2): shorter right answers earn more.

    ``correct``: the G verdicts. ``lengths``: the G response lengths in tokens, end token included.
    ``weight``: lambda. Returns G numbers in [0, weight]::

        bonus_i = lambda (1 - (L_i - Lmin) / (Lmax - Lmin))   if i is correct                (A2)
                = 0                                           if i is wrong
        Lmin, Lmax over the correct responses of the group only

    ``groups``: "mixed" pays nothing where all are right (so that zero-variance groups keep zero
    variance); "all" pays there too. ``tie``: bonus of the correct responses when all of them have
    the same length, as with a single correct one: 0, or the full lambda.

    Source: arXiv:2503.15952 v1, in the form of the authors' reward manager of May 2025, which
    multiplies r_acc (1 + ...): the same for r_acc = 1. "full" is their earlier draft.
    Raises ValueError when the two lists differ in length.
    """
    _check_pairs(correct, lengths)
    considered = [length for length, right in zip(lengths, correct, strict=True) if right]
    if not considered or (groups == "mixed" and len(considered) == len(lengths)):
        return [0.0] * len(lengths)
    shortest, longest = min(considered), max(considered)
    if shortest == longest:
        tied = weight if tie == "full" else 0.0
        return [tied if right else 0.0 for right in correct]
    # The bracket of A2 as (Lmax - L) / (Lmax - Lmin): one rounding less.
    return [
        weight * ((longest - length) / (longest - shortest)) if right else 0.0
        for length, right in zip(lengths, correct, strict=True)
    ]


def kimi_length_reward(
    correct: Sequence[bool], lengths: Sequence[int], weight: float
) -> list[float]:
    """Return Kimi k1.5's length reward of one group, in [-weight / 2, weight / 2].

    ::

        lambda_i = 1/2 - (L_i - Lmin) / (Lmax - Lmin)      Lmin, Lmax over ALL responses
        term_i   = weight lambda_i                         if i is correct
                 = weight min(0, lambda_i)                 if i is wrong
                 = 0                                       if all lengths are equal

    Unlike A2 it also punishes long wrong answers and acts in every group.
    Source: arXiv:2501.12599, section 2.3.3. Raises ValueError when the lists differ in length.
    """
    _check_pairs(correct, lengths)
    shortest, longest = min(lengths), max(lengths)
    if shortest == longest:
        return [0.0] * len(lengths)
    shares = [0.5 - (length - shortest) / (longest - shortest) for length in lengths]
    return [
        weight * (share if right else min(0.0, share))
        for share, right in zip(shares, correct, strict=True)
    ]


def cosine_length_reward(
    correct: Sequence[bool], lengths: Sequence[int], weight: float, max_length: int
) -> list[float]:
    """Return the cosine length reward, in [-weight, weight]; each response by itself.

    ::

        c_i    = (1 + cos(pi L_i / max_length)) / 2        1 at length 0, 0 at max_length
        term_i = +weight c_i    if i is correct            short right answers earn most
               = -weight c_i    if i is wrong              short wrong answers lose most
               = -weight        if L_i >= max_length       truncated, right or wrong

    Source: the form of arXiv:2502.03373 (section 3.1) with one weight for its three scales.
    Raises ValueError when the lists differ in length.
    """
    _check_pairs(correct, lengths)
    terms = []
    for right, length in zip(correct, lengths, strict=True):
        if length >= max_length:
            terms.append(-weight)
        else:
            share = 0.5 * (1.0 + math.cos(math.pi * length / max_length))
            terms.append(weight * (share if right else -share))
    return terms


def dapo_overlong_penalty(
    lengths: Sequence[int], weight: float, max_length: int, buffer: int
) -> list[float]:
    """Return DAPO's soft overlong penalty, in [-weight, 0], for right and wrong answers alike.

    ::

        term_i = 0                                           L_i <= max_length - buffer
               = -weight (L_i - (max_length - buffer)) / buffer   up to max_length
               = -weight                                     beyond

    Source: arXiv:2503.14476, eq. 13 (20480 and 4096 tokens, weight 1).
    Raises ValueError unless 0 < buffer <= max_length.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(
            f"overlong penalty: buffer {buffer} must lie between 1 and max_length {max_length}"
        )
    free = max_length - buffer
    return [-weight * min(max(length - free, 0), buffer) / buffer for length in lengths]


def _check_pairs(correct: Sequence[bool], lengths: Sequence[int]) -> None:
    if len(correct) != len(lengths):
        raise ValueError(
            f"length reward: {len(correct)} verdicts but {len(lengths)} lengths; "
            "one of each per response is needed"
        )
