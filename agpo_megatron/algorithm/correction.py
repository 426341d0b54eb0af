"""Rollout correction: weights for the gap between the server's policy and the trainer's.

Both hold the same weights but not the same arithmetic. With old the trainer's log-probs before the
update and rollout the server's, the mismatch of a token is q_t = exp(old_t - rollout_t); it weighs
the policy loss of the token, without gradient.
"""

from __future__ import annotations

import numpy as np

from agpo_megatron.algorithm.settings import CorrectionKind, CorrectionLevel
from agpo_megatron.samples import Floats, Mask

_LIMIT = 20.0


def rollout_correction(
    old_logprobs: Floats,
    rollout_logprobs: Floats,
    loss_mask: Mask,
    *,
    kind: CorrectionKind,
    level: CorrectionLevel,
    low: float,
    high: float,
) -> Floats:
    """Weights of the tokens of one sequence, [n] float32; 0 off ``loss_mask`` and where a token is refused.

    ::

        level   token          q_t
                sequence       prod_t q_t          over the mask; its log limited to +-20
                sequence_mean  (prod_t q_t)^(1/n)  geometric mean

        kind    tis            min(q, high)                 truncated importance sampling
                mis            q 1[low <= q <= high]        masked importance sampling
                icepop         the same; token level by definition, [0.5, 5] in arXiv:2510.18855

    A refused token may leave the denominators or stay in them: the caller decides (it knows the
    whole step). Raises ValueError for lists that do not fit.
    """
    if not len(old_logprobs) == len(rollout_logprobs) == len(loss_mask):
        raise ValueError(
            f"rollout correction: {len(old_logprobs)} old log-probs, {len(rollout_logprobs)} "
            f"rollout log-probs and {len(loss_mask)} mask entries"
        )
    gap = np.subtract(
        old_logprobs,
        rollout_logprobs,
        where=loss_mask != 0,
        out=np.zeros(len(loss_mask), np.float32),
    )
    if level != "token":
        total = float(gap.sum(dtype=np.float64))
        if level == "sequence_mean":
            total /= max(int(np.count_nonzero(loss_mask)), 1)
        gap = np.full_like(gap, total)
    q = np.exp(np.clip(gap, -_LIMIT, _LIMIT))
    accepted = loss_mask != 0
    if kind != "tis":
        accepted &= (q >= low) & (q <= high)
    return np.where(accepted, np.minimum(q, np.float32(high)), np.float32(0))
