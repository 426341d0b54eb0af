"""The recorded batch that every layout trains on, and the ways to cut it into micro-batches.

It holds what has gone wrong elsewhere: sequences of 1 to 40 tokens, one longer than the packing budget, groups that
end up on different ranks, a sequence whose mask trains nothing, a group that AGPO's loss mask drops, ratios on both
sides of the clip.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from agpo_megatron.algorithm.aggregation import AggregationMode, token_weights
from agpo_megatron.types import TrainSequence

LENGTHS = (40, 7, 23, 1, 2, 16, 31, 12, 9, 26, 5)
GROUP = 3
BUDGET = 32
"""Tokens per micro-batch when packing; the longest sequence exceeds it."""

Split = Literal["one", "packed", "big"]
Plan = list[list[list[TrainSequence]]]
"""Micro-batches of each data-parallel replica: ``plan[replica][micro_batch]``."""


@dataclass(frozen=True)
class Recorded:
    """One sequence of the batch, without any loss weight: those follow from the whole batch.

    ``loss_mask``: 1 where a token trains. ``old_logprobs``: aligned with the tokens; empty: on-policy, ratio 1.
    ``kept``: false for sequences of a group that the loss mask drops.
    """

    sample_id: str
    tokens: list[int]
    loss_mask: list[int]
    advantage: float
    kept: bool = True
    old_logprobs: list[float] = field(default_factory=list)


def recorded(lengths: Sequence[int] = LENGTHS, *, vocab: int, seed: int = 0) -> list[Recorded]:
    """A seeded batch: the first third of each sequence is prompt, one trained token in six is masked, advantages have
    both signs. In every tenth sequence nothing trains; the last group is dropped."""
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


def with_old(batch: Sequence[Recorded], logprobs: Any, seed: int = 1) -> list[Recorded]:
    """The batch off-policy: old log-probs are ``logprobs[sample_id]`` ([n - 1], of the current weights) and a shift
    that takes about every third ratio beyond the clip."""
    rng = random.Random(seed)
    return [
        replace(
            s,
            old_logprobs=[
                0.0,
                *(x + rng.uniform(-0.4, 0.4) for x in logprobs[s.sample_id].tolist()),
            ],
        )
        for s in batch
    ]


def train_sequences(
    batch: Sequence[Recorded], aggregation: AggregationMode, norm_length: int
) -> list[TrainSequence]:
    """As the controller would send them: every token's loss weight from the masks of the whole batch."""
    weights = token_weights(
        [s.loss_mask for s in batch], [s.kept for s in batch], aggregation, norm_length
    )
    return [
        TrainSequence(s.sample_id, s.tokens, w, s.advantage)
        for s, w in zip(batch, weights, strict=True)
    ]


def split(sequences: Sequence[TrainSequence], replicas: int, how: Split) -> Plan:
    """Deal the sequences out to replicas in turn (groups come apart), then cut each share: "one" sequence per
    micro-batch, "packed" in order up to the budget, or one "big" micro-batch."""
    shares = [list(sequences[r::replicas]) for r in range(replicas)]
    if how == "one":
        return [[[s] for s in share] for share in shares]
    if how == "big":
        return [[share] for share in shares]
    plan: Plan = []
    for share in shares:
        packs: list[list[TrainSequence]] = [[]]
        for s in share:
            if packs[-1] and sum(len(x.tokens) for x in packs[-1]) + len(s.tokens) > BUDGET:
                packs.append([])
            packs[-1].append(s)
        plan.append(packs)
    return plan
