"""Length term of the reward: among the right answers of a mixed group, shorter earns more (A2)."""

from __future__ import annotations

from collections.abc import Sequence


def agpo_length_bonus(
    correct: Sequence[bool], lengths: Sequence[int], weight: float
) -> list[float]:
    """What each response of one group earns for being short, to be added to its accuracy reward.

    ``correct``: the G verdicts. ``lengths``: the G response lengths in tokens, end token included.
    ``weight``: lambda. Returns G numbers in [0, weight]::

        bonus_i = lambda (1 - (L_i - Lmin) / (Lmax - Lmin))   if i is correct                (A2)
                = 0                                           if i is wrong
        Lmin, Lmax over the correct responses of the group only

    and 0 everywhere when the group is not mixed (all right or none right: nothing is told apart,
    and zero-variance groups must stay so) or when the correct ones tie in length (a single correct
    one always does).

    Source: arXiv:2503.15952 v1, in the form of the authors' reward manager of May 2025, which
    multiplies r_acc (1 + ...): the same thing for r_acc = 1.
    Raises ValueError when the two lists differ in length.
    """
    if len(correct) != len(lengths):
        raise ValueError(
            f"length reward: {len(correct)} verdicts but {len(lengths)} lengths; "
            "one of each per response is needed"
        )
    correct_lengths = [length for length, right in zip(lengths, correct, strict=True) if right]
    mixed = 0 < len(correct_lengths) < len(lengths)
    if not mixed or min(correct_lengths) == max(correct_lengths):
        return [0.0] * len(lengths)
    shortest, longest = min(correct_lengths), max(correct_lengths)
    # The bracket of A2 as (Lmax - L) / (Lmax - Lmin): one rounding less.
    return [
        weight * ((longest - length) / (longest - shortest)) if right else 0.0
        for length, right in zip(lengths, correct, strict=True)
    ]
