"""Packed sequences: a micro-batch is one row of tokens, its sequences end to end, and the few positions that train.

Row selection comes first: position t of a sequence predicts token t + 1, and only positions whose next token has a
non-zero loss weight become rows. Their indices are host integers, so later stages never wait for the device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from agpo_megatron.config.schema import PolicyConfig
from agpo_megatron.types import TrainSequence

PAD_TOKEN = 0
_PER_ROW = (
    "targets",
    "sequence",
    "weights",
    "correction",
    "advantages",
    "rollout_logprobs",
    "has_rollout",
    "old_logprobs",
    "ref_logprobs",
)


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

    ``tokens`` [T] int64, ``positions`` [T] int64 (restart at 0 in each sequence), ``lengths``: of the sequences,
    longest first, each with the padding that makes it divisible, the rest of the padding as trailing sequences of
    their own (``sum(lengths) == T``).
    ``rows`` [N] int64: positions in [0, T) whose next token trains; ``targets`` [N] int64: that token;
    ``sequence`` [N] int64 in [0, S): whose row it is. ``weights`` [N] fp32: w of L = sum w l; ``correction`` [N] fp32:
    factor on its policy loss; ``advantages`` [N] fp32; ``rollout_logprobs`` [N] fp32 and ``has_rollout`` [N] bool,
    false for sequences whose list of them is empty; ``old_logprobs``, ``ref_logprobs`` [N] fp32 or None (the current
    policy is its own old policy; no reference).
    ``gains`` [S] fp32 or None: factors on the policy loss of whole sequences, where the adaptive part is known.
    """

    tokens: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    rows: Tensor
    targets: Tensor
    sequence: Tensor
    weights: Tensor
    correction: Tensor
    advantages: Tensor
    rollout_logprobs: Tensor
    has_rollout: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    spans: tuple[RowSpan, ...]
    gains: Tensor | None = None

    def to(self, device: torch.device) -> PackedBatch:
        """The batch with its tensors on ``device``, but for ``rows``, which are read on the host."""
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and name != "rows"
        }
        return replace(self, **moved)

    def part(self, rows: slice | Tensor) -> PackedBatch:
        """What the batch says of some of its rows, which is all that a loss looks at; ``rows`` and the rest stay."""
        whole = {name: getattr(self, name) for name in _PER_ROW}
        cut: dict[str, Any] = {n: None if x is None else x[rows] for n, x in whole.items()}
        return replace(self, **cut)


FP8_ROWS = {"none": 16, "tensorwise": 16, "delayed": 16, "blockwise": 128, "mxfp8": 32}
"""Rows that the activations of one matmul must be a multiple of, by FP8 recipe. Transformer Engine 2.20.2 asserts 8
(``utils.py``, ``assert_dim_for_fp8_exec``), the gradient of the weights sums over the rows and needs 16, and tensors
whose rows are not whole blocks (``Float8BlockQuantizer``: 128, ``MXFP8Quantizer``: 32) are exchanged in bf16."""


def pack_multiple(policy: PolicyConfig) -> int:
    """What the token count of a pack must divide by, so that every rank's matmuls get whole blocks of rows.

    A context-parallel rank has 1 / CP of the rows. Sequence parallelism cuts those into TP equal parts, and Transformer
    Engine quantises each part before it gathers them, so each part must be whole blocks with FP8. Without FP8 the parts
    must only be equal.
    """
    rows = FP8_ROWS[policy.fp8.recipe]
    if policy.fp8.recipe != "none" and policy.sequence_parallel:
        return policy.context_parallel * policy.tensor_parallel * rows
    return policy.context_parallel * math.lcm(policy.tensor_parallel, rows)


def sequence_multiple(policy: PolicyConfig) -> int:
    """What each sequence's length must divide by: context-parallel ranks hold two equal chunks of it each."""
    return 2 * policy.context_parallel if policy.context_parallel > 1 else 1


def pack(
    sequences: Sequence[TrainSequence],
    multiple: int,
    *,
    each: int = 1,
    every_token: bool = False,
    total: int | None = None,
) -> PackedBatch:
    """Lay ``sequences`` end to end, longest first, and pad to a multiple of ``multiple`` (or to ``total`` tokens), each
    one to a multiple of ``each`` before, which divides ``multiple``.

    ``every_token``: all tokens but the first of each sequence become rows, whatever their weight (scoring).
    An empty list gives a filler: ``multiple`` padding tokens and no rows.
    Raises ValueError naming the sample whose lists do not fit, and for an old or reference log-prob that is missing.
    """
    # Longest first: sequences of similar length are then neighbours, which the attention core batches as slices.
    ordered = sorted(sequences, key=lambda s: -len(s.tokens))
    for sequence in ordered:
        _check(sequence)
    lengths = [_round_up(len(s.tokens), each) for s in ordered]
    tokens = list(
        itertools.chain.from_iterable(
            [*s.tokens, *[PAD_TOKEN] * (n - len(s.tokens))]
            for s, n in zip(ordered, lengths, strict=True)
        )
    )
    starts = list(itertools.accumulate(lengths, initial=0))
    _pad(tokens, lengths, multiple, total)
    chosen = [list(range(1, len(s.tokens))) if every_token else s.trained() for s in ordered]
    rows = [first + t - 1 for first, kept in zip(starts, chosen, strict=False) for t in kept]
    ends = list(itertools.accumulate((len(kept) for kept in chosen), initial=0))
    counts = torch.tensor([len(kept) for kept in chosen], dtype=torch.int64)

    def per_sequence(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).repeat_interleave(counts)

    def per_token(name: str, missing: float) -> Tensor:
        lists = [getattr(s, name) for s in ordered]
        values = [
            v[t] if v else missing for v, kept in zip(lists, chosen, strict=True) for t in kept
        ]
        return torch.tensor(values, dtype=torch.float32)

    def optional(name: str) -> Tensor | None:
        trained = [s for s, kept in zip(ordered, chosen, strict=True) if kept]
        without = [s.sample_id for s in trained if not getattr(s, name)]
        if len(without) == len(trained):
            return None
        if without:
            raise ValueError(
                f"sample {without[0]} has no {name}, others have; score the whole batch"
            )
        return per_token(name, 0.0)

    return PackedBatch(
        tokens=torch.tensor(tokens, dtype=torch.int64),
        positions=torch.cat([torch.arange(n) for n in lengths]),
        lengths=tuple(lengths),
        rows=torch.tensor(rows, dtype=torch.int64),
        targets=torch.tensor(
            [s.tokens[t] for s, kept in zip(ordered, chosen, strict=True) for t in kept],
            dtype=torch.int64,
        ),
        sequence=torch.arange(len(ordered)).repeat_interleave(counts),
        weights=per_sequence([s.loss_weight for s in ordered]),
        correction=per_token("correction", 1.0),
        advantages=per_sequence([s.advantage for s in ordered]),
        rollout_logprobs=per_token("rollout_logprobs", 0.0),
        has_rollout=per_sequence([float(bool(s.rollout_logprobs)) for s in ordered]).bool(),
        old_logprobs=None if every_token else optional("old_logprobs"),
        ref_logprobs=None if every_token else optional("ref_logprobs"),
        spans=tuple(
            RowSpan(s.sample_id, start, stop, len(s.tokens))
            for s, (start, stop) in zip(ordered, itertools.pairwise(ends), strict=True)
        ),
    )


def pack_all(
    micro_batches: Sequence[Sequence[TrainSequence]],
    multiple: int,
    count: int,
    *,
    each: int = 1,
    same_length: bool,
    every_token: bool = False,
) -> list[PackedBatch]:
    """``count`` packs: one per micro-batch, then fillers of weight 0 for a rank with less work than others.

    ``same_length``: pad all to the longest (the interleaved pipeline exchanges tensors of one shape).
    """
    work = [*micro_batches, *([[]] * (count - len(micro_batches)))]
    total = None
    if same_length:
        sizes = [sum(_round_up(len(s.tokens), each) for s in batch) for batch in work]
        total = max(_round_up(size or 1, multiple) for size in sizes)
    return [
        pack(batch, multiple, each=each, every_token=every_token, total=total) for batch in work
    ]


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _pad(tokens: list[int], lengths: list[int], multiple: int, total: int | None) -> None:
    """Append padding tokens in place, as sequences no longer than the longest real one."""
    pad = (total or _round_up(max(len(tokens), 1), multiple)) - len(tokens)
    longest = lengths[0] if lengths else pad
    while pad > 0:
        part = min(pad, longest)
        tokens += [PAD_TOKEN] * part
        lengths.append(part)
        pad -= part


def _check(s: TrainSequence) -> None:
    n = len(s.tokens)
    if n == 0:
        raise ValueError(f"sample {s.sample_id} has no tokens; leave it out of the batch")
    if len(s.loss_mask) != n:
        raise ValueError(f"sample {s.sample_id}: {n} tokens but {len(s.loss_mask)} mask entries")
    for name in ("rollout_logprobs", "old_logprobs", "ref_logprobs", "correction"):
        if len(getattr(s, name)) not in (0, n):
            raise ValueError(
                f"sample {s.sample_id}: {n} tokens but {len(getattr(s, name))} {name}; "
                "all are aligned with the tokens"
            )
