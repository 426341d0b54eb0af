"""Rollout correction: weights for the gap between the policy of the server and that of the trainer.

Both hold the same weights but compute them differently. With the old log-probs (trainer, before the
update) and the rollout log-probs (server), the ratio of a token is q_t = exp(old_t - rollout_t); it
weighs the policy loss of the token, without gradient. Truncated weights of single tokens need nothing
but the token's own log-prob: with one update per batch the loss computes them (loss.py); all others
are decided here, before the batch trains.
"""

from __future__ import annotations

import numpy as np

from agpo_megatron.algorithm.kl import LOG_RATIO_LIMIT
from agpo_megatron.algorithm.settings import CorrectionKind, CorrectionLevel
from agpo_megatron.samples import Floats, Mask


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
    """Return the token weights of one sequence, [n] float32; 0 off ``loss_mask`` and for refused tokens.

    ::

        level   token          q_t
                sequence       prod_t q_t          over the mask; its log limited to +-20
                sequence_mean  (prod_t q_t)^(1/n)  geometric mean

        kind    tis            min(q, high)                 truncated importance sampling
                mis            q 1[low <= q <= high]        masked importance sampling
                icepop         the same; token level by definition, [0.5, 5] in arXiv:2510.18855

    The caller, which knows the whole step, decides whether refused tokens leave the denominators.
    Raises ValueError for lists of different length.
    """
    if not len(old_logprobs) == len(rollout_logprobs) == len(loss_mask):
        raise ValueError(
            f"rollout correction: {len(old_logprobs)} old log-probs, {len(rollout_logprobs)} "
            f"rollout log-probs and {len(loss_mask)} mask entries"
        )
    masked = loss_mask != 0
    whole = bool(masked.all())
    gap = np.subtract(old_logprobs, rollout_logprobs, dtype=np.float32)
    if not whole:
        gap[~masked] = 0
    if level != "token":
        total = float(gap.sum(dtype=np.float64))
        if level == "sequence_mean":
            total /= max(int(np.count_nonzero(masked)), 1)
        gap[:] = total
    q = np.exp(np.clip(gap, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT, out=gap), out=gap)
    if kind != "tis":
        q[~((q >= low) & (q <= high))] = 0  # a NaN is refused too
    np.minimum(q, np.float32(high), out=q)
    if not whole:
        q[~masked] = 0
    return q
