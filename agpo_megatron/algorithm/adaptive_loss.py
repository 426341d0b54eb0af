"""AGPO's loss clip (v3, eq. A4): a lower bound on the policy loss of a whole optimizer step.

    L_AGPO = max(L, c)          c = 0 in the paper          (A4)

The bound acts on the aggregated loss L of all ranks and micro-batches, not on a part of it:
max(., c) is not linear, so a bound per micro-batch would make the result depend on how the batch is
split. Its gradient is that of L times the gate 1[L > c]; a closed gate leaves an exactly zero one.

What the gate reacts to. On policy (rho = 1), with complete groups (advantages add up to 0) and
token-mean weights,

    L = - sum_i n_i A_i / sum_i n_i = - Cov(n, A) / mean(n)          (1c)

with n_i the trained tokens of sequence i: L < 0 exactly when longer responses have the higher
advantage. The gate drops the updates that would reward length and keeps those in which the long
answers are the wrong ones. With seq_mean_token_mean the same value is identically 0, and the gate
would act on rounding noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

TIE = 1e-6
"""Losses closer than this part of their ``scale`` are equal: about ten roundings of float32."""


def clip_gate(loss: float, minimum: float, scale: float = 1.0) -> float:
    """Factor on the gradient of the policy loss: 1 if ``loss > minimum``, else 0 (eq. A4).

    ``loss``: the policy loss of the whole optimizer step, without KL and entropy terms. ``scale``: size of the terms
    it is the sum of, sum |w A| over the whole step (about 1 with token_mean, hundreds with seq_mean_token_sum). A tie
    (responses of equal length make L exactly 0) is a closed gate, and the rounding of such a sum must not open it: the
    gate opens above ``minimum + TIE * scale``.
    Raises ValueError when the loss is not finite: a closed gate would hide it.
    """
    if not math.isfinite(loss):
        raise ValueError(
            f"policy loss is {loss}; look for non-finite log-probs or advantages in this batch"
        )
    return 1.0 if loss > minimum + TIE * scale else 0.0


def clipped_value(loss: float, minimum: float, scale: float = 1.0) -> float:
    """The loss as eq. A4 reports it, max(loss, minimum): ``loss`` where ``clip_gate`` is open, else ``minimum``."""
    return loss if clip_gate(loss, minimum, scale) == 1.0 else minimum


def on_policy_loss(weights: Sequence[Sequence[float]], advantages: Sequence[float]) -> float:
    """Policy loss at ratio 1,  L = - sum_{i,t} w_{i,t} A_i:  known before any forward pass.

    ``weights``: per sequence its token weights, as ``token_weights`` returns them. ``advantages``:
    one per sequence. Exactly rounded sums, so the order of the sequences does not matter. Raises
    ValueError on a length mismatch.
    """
    if len(weights) != len(advantages):
        raise ValueError(
            f"on-policy loss: {len(weights)} weight rows but {len(advantages)} advantages"
        )
    return math.fsum(
        -advantage * math.fsum(row) for row, advantage in zip(weights, advantages, strict=True)
    )


def length_advantage_covariance(lengths: Sequence[int], advantages: Sequence[float]) -> float:
    """Population covariance (ddof 0) of response length and advantage: the Cov of eq. 1c.

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
