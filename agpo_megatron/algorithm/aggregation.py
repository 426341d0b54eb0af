"""Aggregation of token losses: the weights w of  L = sum_{i,t} w_{i,t} l_{i,t}.

The weights depend on masks only, so they are computed once, from the masks of a whole optimizer
step, before anything is sharded. Each rank then sums ``w * l`` over its shard, without a division:
the loss cannot depend on data, pipeline or context parallelism, on packing, or on the number of
micro-batches. In every mode the trained tokens of one sequence share one weight, so the weights of
a step are one number per sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

from agpo_megatron.algorithm.settings import AggregationMode


def sequence_weights(
    trained: Sequence[int],
    counted: Sequence[int],
    mode: AggregationMode,
    norm_length: int | None = None,
) -> list[float]:
    """Return the loss weight w_i of each trained token of sequence i, for one optimizer step.

    ``trained``: n_i, tokens left in the numerator after all masks (0: the sequence was dropped).
    ``counted``: d_i, tokens that the denominators count, d_i >= n_i. The setting of denominators
    is the choice of d: with "exclude" d = n, so dropped tokens leave numerator and denominator
    (A3 with token_mean); with "keep" d still counts them (plain GRPO and DAPO: they dilute the
    rest). With B = #{d_i > 0}::

        token_mean               w_i = 1 / sum_j d_j      each token counts the same (DAPO)
        seq_mean_token_mean      w_i = 1 / (d_i B)        each sequence counts the same (GRPO)
        seq_mean_token_sum       w_i = 1 / B              tokens count the same, scale with length
        seq_mean_token_sum_norm  w_i = 1 / (B norm_length)     the same, constant scale (Dr. GRPO)

    and 0 where n_i = 0. If no token is left, all weights are 0, never NaN.

    Raises ValueError for lists of different length, n_i > d_i, an unknown mode, or a missing or
    non-positive ``norm_length``.
    """
    if len(trained) != len(counted):
        raise ValueError(f"weights: {len(trained)} trained counts but {len(counted)} counted ones")
    for i, (n, d) in enumerate(zip(trained, counted, strict=True)):
        if not 0 <= n <= d:
            raise ValueError(
                f"weights: sequence {i} trains {n} tokens, of which {d} are counted; "
                "the denominator must hold what the numerator holds"
            )
    sequences = sum(d > 0 for d in counted)
    match mode:
        case "token_mean":
            divisor = sum(counted)
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
    per_token_mean = mode == "seq_mean_token_mean"
    return [
        1.0 / (divisor * (d if per_token_mean else 1)) if n else 0.0
        for n, d in zip(trained, counted, strict=True)
    ]
