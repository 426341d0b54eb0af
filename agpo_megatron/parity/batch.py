"""The recorded batch that every layout trains on, and the ways to cut it into micro-batches.

It covers known pitfalls: sequences of 1 to 40 tokens, one longer than the packing budget, groups split over ranks, a
sequence with an empty loss mask, a group that AGPO's loss mask drops, ratios on both sides of the clip.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from torch import Tensor

from agpo_megatron.algorithm.aggregation import sequence_weights
from agpo_megatron.algorithm.correction import rollout_correction
from agpo_megatron.algorithm.settings import AggregationMode
from agpo_megatron.samples import TrainSequence, group_of

LENGTHS = (40, 7, 23, 1, 2, 16, 31, 12, 9, 26, 5)
GROUP = 3
BUDGET = 32
"""Tokens per micro-batch when packing; the longest sequence exceeds it."""

Split = Literal["one", "packed", "big"]
Division = list[list[list[TrainSequence]]]
"""Micro-batches of each data-parallel replica: ``plan[replica][micro_batch]``."""


@dataclass(frozen=True)
class Recorded:
    """One sequence of the batch, without a loss weight: weights are computed from the whole batch.

    ``loss_mask``: 1 for trained tokens. ``old_logprobs``, ``ref_logprobs``, ``rollout_logprobs``: aligned with the
    tokens; empty: ratio 1, no reference, no server. ``kept``: false for sequences of a group that the loss mask drops.
    """

    sample_id: str
    tokens: list[int]
    loss_mask: list[int]
    advantage: float
    kept: bool = True
    old_logprobs: list[float] = field(default_factory=list)
    ref_logprobs: list[float] = field(default_factory=list)
    rollout_logprobs: list[float] = field(default_factory=list)

    @property
    def group_id(self) -> str:
        return group_of(self.sample_id)


def recorded(lengths: Sequence[int] = LENGTHS, *, vocab: int, seed: int = 0) -> list[Recorded]:
    """Make a seeded batch: the first third of each sequence is prompt, one response token in six is off the loss mask,
    advantages have both signs. Every tenth sequence has an empty mask; the last group is dropped."""
    rng = random.Random(seed)
    batch = []
    for i, n in enumerate(lengths):
        prompt = max(1, n // 3)
        mask = [0] * prompt + [int(rng.random() > 1 / 6) for _ in range(n - prompt)]
        batch.append(
            Recorded(
                sample_id=f"g{i // GROUP}.{i % GROUP}",
                tokens=[rng.randrange(vocab) for _ in range(n)],
                loss_mask=[0] * n if i % 10 == 4 else mask,
                advantage=rng.uniform(-1.5, 1.5),
                kept=i < len(lengths) - 2,
            )
        )
    return batch


def off_policy(batch: Sequence[Recorded], logprobs: Mapping[str, Tensor]) -> list[Recorded]:
    """Add old and reference log-probs to the batch: ``logprobs`` ([n - 1] by sample id, of the current weights) plus
    random shifts, which take about every third ratio beyond its clip."""
    rng = random.Random(1)

    def shifted(values: list[float], by: float) -> list[float]:
        return [0.0, *(x + rng.uniform(-by, by) for x in values)]

    moved = []
    for s in batch:
        values = logprobs[s.sample_id].tolist()
        old, ref = shifted(values, 0.4), shifted(values, 0.8)
        moved.append(replace(s, old_logprobs=old, ref_logprobs=ref))
    return moved


def train_sequences(
    batch: Sequence[Recorded],
    aggregation: AggregationMode,
    norm_length: int,
    tis: float | None = None,
) -> list[TrainSequence]:
    """Build the sequences as the controller does: loss weights from the masks of the whole batch, and, where old
    log-probs were scored, the rollout correction with the bound ``tis``."""
    trained = [sum(s.loss_mask) if s.kept else 0 for s in batch]
    weights = sequence_weights(trained, trained, aggregation, norm_length)
    return [_train_sequence(s, w, tis) for s, w in zip(batch, weights, strict=True)]


def stale(
    batch: Sequence[Recorded], logprobs: Mapping[str, Tensor], by: float = 1.2
) -> list[Recorded]:
    """Add log-probs of a server with other weights: ``logprobs`` ([n - 1] by sample id) plus random shifts."""
    rng = random.Random(2)
    return [
        replace(
            s,
            rollout_logprobs=[
                0.0,
                *(x + rng.uniform(-by, by) for x in logprobs[s.sample_id].tolist()),
            ],
        )
        for s in batch
    ]


def _train_sequence(s: Recorded, weight: float, tis: float | None) -> TrainSequence:
    """Build one sequence whose response is everything after the first token; the mask selects trained tokens."""
    known = {
        "old_logprobs": s.old_logprobs,
        "ref_logprobs": s.ref_logprobs,
        "rollout_logprobs": s.rollout_logprobs,
    }
    columns = {n: np.array(v[1:], dtype=np.float32) for n, v in known.items() if v}
    if tis is not None and s.old_logprobs:
        columns["correction"] = rollout_correction(
            columns["old_logprobs"],
            columns["rollout_logprobs"],
            np.array(s.loss_mask[1:], dtype=np.uint8),
            kind="tis",
            level="token",
            low=0.0,
            high=tis,
        )
    return TrainSequence(
        s.sample_id,
        np.array(s.tokens[:1], dtype=np.int32),
        np.array(s.tokens[1:], dtype=np.int32),
        np.array(s.loss_mask[1:], dtype=np.uint8),
        # Old log-probs count from the second update of a batch on.
        {
            "loss_weight": weight,
            "advantage": s.advantage,
            "update": int(bool(s.old_logprobs)),
            **columns,
        },
    )


def split(sequences: Sequence[TrainSequence], replicas: int, how: Split) -> Division:
    """Deal the sequences out to replicas in turn (which splits groups), then cut each share: "one" sequence per
    micro-batch, "packed" in order up to the budget, or one "big" micro-batch."""
    shares = [list(sequences[r::replicas]) for r in range(replicas)]
    if how == "one":
        return [[[s] for s in share] for share in shares]
    if how == "big":
        return [[share] for share in shares]
    plan: Division = []
    for share in shares:
        packs: list[list[TrainSequence]] = [[]]
        for s in share:
            if packs[-1] and sum(x.length for x in packs[-1]) + s.length > BUDGET:
                packs.append([])
            packs[-1].append(s)
        plan.append(packs)
    return plan
