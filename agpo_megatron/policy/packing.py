"""Packed sequences: a micro-batch is one row of tokens, its sequences end to end, with the indices of trained rows.

Rows are selected first: position t of a sequence predicts token t + 1, and only positions whose next token has a
non-zero loss weight become rows. Their indices are host integers, so later stages never wait for the device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from agpo_megatron.algorithm.loss_rows import LossRows
from agpo_megatron.config.schema import PolicyConfig
from agpo_megatron.samples import COLUMNS, Array, TrainSequence

PAD_TOKEN = 0


@dataclass(frozen=True)
class RowSpan:
    """Rows ``[start, stop)`` of the pack predict tokens of ``sample_id``; the full sequence has ``length`` tokens."""

    sample_id: str
    start: int
    stop: int
    length: int


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch on the host (CPU). T tokens, N rows, S sequences (without padding).

    ``tokens`` [T] int64, ``positions`` [T] int64 (restart at 0 in each sequence), ``lengths``: sequence lengths,
    longest first, each including the padding to its multiple; the remaining padding forms trailing sequences
    (``sum(lengths) == T``).
    ``rows`` [N] int64: positions in [0, T) whose next token is trained; ``targets`` [N] int64: that token; ``loss``:
    the inputs of the loss for these rows.
    """

    tokens: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    rows: Tensor
    targets: Tensor
    loss: LossRows
    spans: tuple[RowSpan, ...]

    def to(self, device: torch.device) -> PackedBatch:
        """Move all tensors to ``device``, except ``rows``, which are read on the host."""
        if device.type == "cpu":
            return self

        def there(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        return replace(
            self,
            tokens=there(self.tokens),
            positions=there(self.positions),
            targets=there(self.targets),
            loss=self.loss.to(device),
        )


FP8_ROWS = {"none": 16, "tensorwise": 16, "delayed": 16, "blockwise": 128, "mxfp8": 32}
"""Rows that the activations of one matmul must be a multiple of, by FP8 recipe. Transformer Engine 2.20.2 asserts 8
(``utils.py``, ``assert_dim_for_fp8_exec``), the gradient of the weights sums over the rows and needs 16, and tensors
whose rows are not whole blocks (``Float8BlockQuantizer``: 128, ``MXFP8Quantizer``: 32) are exchanged in bf16."""


def pack_multiple(policy: PolicyConfig) -> int:
    """Return the divisor of a pack's token count, so that every rank's matmuls get whole blocks of rows.

    A context-parallel rank has 1 / CP of the rows. Sequence parallelism cuts those into TP equal parts, and Transformer
    Engine quantises each part before it gathers them, so each part must be whole blocks with FP8. Without FP8 the parts
    must only be equal.
    """
    rows = FP8_ROWS[policy.fp8.recipe]
    if policy.fp8.recipe != "none" and policy.sequence_parallel:
        return policy.context_parallel * policy.tensor_parallel * rows
    return policy.context_parallel * math.lcm(policy.tensor_parallel, rows)


def sequence_multiple(policy: PolicyConfig) -> int:
    """Return the divisor of each sequence's length: every context-parallel rank holds two equal chunks of it."""
    return 2 * policy.context_parallel if policy.context_parallel > 1 else 1


def pack(
    sequences: Sequence[TrainSequence],
    multiple: int,
    *,
    each: int = 1,
    every_token: bool = False,
    total: int | None = None,
) -> PackedBatch:
    """Lay ``sequences`` end to end, longest first: pad each to a multiple of ``each``, then the pack to a multiple of
    ``multiple``, which ``each`` divides, or to ``total`` tokens.

    ``every_token``: all tokens but the first of each sequence become rows, whatever their weight (scoring).
    An empty list gives a filler: ``multiple`` padding tokens and no rows.
    """
    # Longest first: sequences of similar length are then neighbours, which the attention core batches as slices.
    ordered = sorted(sequences, key=lambda s: -s.length)
    lengths = [_round_up(s.length, each) for s in ordered]
    starts = list(itertools.accumulate(lengths, initial=0))
    lengths += _padding(sum(lengths), lengths, multiple, total)
    tokens = np.full(sum(lengths), PAD_TOKEN, dtype=np.int64)
    for start, s in zip(starts, ordered, strict=False):
        tokens[start : start + s.length] = s.tokens
    # Indices of the predicted tokens in their sequences.
    chosen = [
        np.arange(1, s.length) if every_token else len(s.prompt_tokens) + s.trained()
        for s in ordered
    ]
    rows = _joined([start + t - 1 for start, t in zip(starts, chosen, strict=False)], np.int64)
    ends = list(itertools.accumulate((len(t) for t in chosen), initial=0))
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(_joined([np.arange(n) for n in lengths], np.int64)),
        lengths=tuple(lengths),
        rows=torch.from_numpy(rows),
        targets=torch.from_numpy(tokens[rows + 1]),
        loss=_loss_rows(ordered, chosen),
        spans=tuple(
            RowSpan(s.sample_id, start, stop, s.length)
            for s, (start, stop) in zip(ordered, itertools.pairwise(ends), strict=True)
        ),
    )


def _loss_rows(sequences: Sequence[TrainSequence], chosen: Sequence[Array]) -> LossRows:
    """Collect every column that some sequence has, at the chosen tokens of each; prompts and other sequences have its
    default."""
    per_token, per_sequence = {}, {}
    for column in COLUMNS:
        if column.default is None or not any(column.name in s.columns for s in sequences):
            continue
        if column.per == "sequence":
            values = [s.scalar(column.name) for s in sequences]
            per_sequence[column.name] = torch.tensor(values, dtype=torch.float32)
            continue
        parts = []
        for s, places in zip(sequences, chosen, strict=True):
            filled = np.full(len(places), column.default, np.float32)
            if column.name in s.columns:
                in_response = places >= len(s.prompt_tokens)
                known = places[in_response] - len(s.prompt_tokens)
                filled[in_response] = s.columns[column.name][known]
            parts.append(filled)
        per_token[column.name] = torch.from_numpy(_joined(parts, np.float32))
    sequence = np.repeat(np.arange(len(sequences)), [len(places) for places in chosen])
    return LossRows(per_token, per_sequence, torch.from_numpy(sequence), len(sequences))


def _joined(parts: Sequence[Array], dtype: type) -> Array:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype, copy=False)


def pack_all(
    micro_batches: Sequence[Sequence[TrainSequence]],
    multiple: int,
    count: int,
    *,
    each: int = 1,
    same_length: bool,
    every_token: bool = False,
) -> list[PackedBatch]:
    """Return ``count`` packs: one per micro-batch, then fillers of weight 0 for a rank with fewer micro-batches.

    ``same_length``: pad all to the longest (the interleaved pipeline exchanges tensors of one shape).
    """
    work = [*micro_batches, *([[]] * (count - len(micro_batches)))]
    total = None
    if same_length:
        sizes = [sum(_round_up(s.length, each) for s in batch) for batch in work]
        total = max(_round_up(size or 1, multiple) for size in sizes)
    return [
        pack(batch, multiple, each=each, every_token=every_token, total=total) for batch in work
    ]


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _padding(length: int, lengths: Sequence[int], multiple: int, total: int | None) -> list[int]:
    """Return the lengths of the padding sequences: none is longer than the longest real one."""
    pad = (total or _round_up(max(length, 1), multiple)) - length
    longest = lengths[0] if lengths else pad
    return [min(longest, pad - done) for done in range(0, pad, longest)] if pad else []
