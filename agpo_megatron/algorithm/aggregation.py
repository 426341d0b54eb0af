"""How token losses become one number: per-token weights w of  L = sum_{i,t} w_{i,t} l_{i,t}.

The weights depend on masks only, so they are computed once, from the masks of a whole optimizer
step, before anything is sharded. Whoever holds a shard then sums ``w * l`` and divides by nothing:
the loss cannot depend on data, pipeline or context parallelism, on packing, or on the number of
micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

AggregationMode = Literal[
    "token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"
]
Denominators = Literal["exclude", "keep"]


def token_weights(
    loss_masks: Sequence[Sequence[int]],
    kept: Sequence[bool],
    mode: AggregationMode,
    norm_length: int | None = None,
    denominators: Denominators = "exclude",
) -> list[list[float]]:
    """Loss weight of every token of every sequence of one optimizer step, shaped as ``loss_masks``.

    ``loss_masks``: m, 1 where the token is trained on, 0 elsewhere; all sequences of the step, of
    all replicas. ``kept``: false where AGPO's loss mask drops the sequence. With M = m * kept,
    n_i = sum_t M_it and B = #{n_i > 0}::

        token_mean               w = M / sum_j n_j       each token counts the same (DAPO)
        seq_mean_token_mean      w = M / (n_i B)         each sequence counts the same (GRPO)
        seq_mean_token_sum       w = M / B               tokens count the same, scale with length
        seq_mean_token_sum_norm  w = M / (B norm_length) the same, constant scale (Dr. GRPO)

    ``denominators``: "exclude" counts n_j and B over M, so dropped sequences leave the denominator
    too (eq. A3 with token_mean); "keep" counts them over m (plain GRPO and DAPO: dropped sequences
    still dilute the rest). No token left: all weights are 0, never NaN.

    Raises ValueError for lists of different length, mask entries other than 0 and 1, an unknown
    mode, or a missing or non-positive ``norm_length``.
    """
    if len(loss_masks) != len(kept):
        raise ValueError(f"token weights: {len(loss_masks)} loss masks but {len(kept)} kept flags")
    counts = [_count_tokens(i, mask) for i, mask in enumerate(loss_masks)]
    counted = [
        n
        for n, keep in zip(counts, kept, strict=True)
        if n > 0 and (keep or denominators == "keep")
    ]
    total, sequences = sum(counted), len(counted)

    match mode:
        case "token_mean":
            divisor = total
        case "seq_mean_token_mean" | "seq_mean_token_sum":
            divisor = sequences
        case "seq_mean_token_sum_norm":
            if norm_length is None or norm_length < 1:
                raise ValueError(
                    "aggregation seq_mean_token_sum_norm divides by a constant length: "
                    f"norm_length must be a positive number, not {norm_length}"
                )
            divisor = sequences * norm_length
        case _:
            raise ValueError(f"unknown aggregation mode {mode!r}")

    rows: list[list[float]] = []
    for mask, tokens, keep in zip(loss_masks, counts, kept, strict=True):
        per_sequence = tokens if mode == "seq_mean_token_mean" else 1
        w = 1.0 / (divisor * per_sequence) if keep and tokens > 0 else 0.0
        rows.append([w if m else 0.0 for m in mask])
    return rows


def _count_tokens(index: int, mask: Sequence[int]) -> int:
    """Trained tokens of one mask, after making sure that it is one."""
    ones, zeros = mask.count(1), mask.count(0)
    if ones + zeros != len(mask):
        raise ValueError(
            f"loss mask of sequence {index} has entries other than 0 and 1; "
            "scale a sequence through its advantage, not through its mask"
        )
    return ones
