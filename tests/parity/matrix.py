"""The matrix: every admissible pair of values of any two axes at least once, in as few rows as a greedy search finds.

A row is one layout, one way to cut the batch, one loss, one model. ``EXCLUSIONS`` says what cannot be, and why.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

from agpo_megatron.config.schema import PolicyConfig
from agpo_megatron.parity import models
from agpo_megatron.parity.comparison import EXPERTS, FP32, Limits
from agpo_megatron.parity.contract import Compared, Contract
from agpo_megatron.parity.reference import Objective

Row = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]

AXES: dict[str, tuple[Any, ...]] = {
    "TP": (1, 2, 4),
    "SP": (False, True),
    "PP": (1, 2, 4),
    "VPP": (1, 2),
    "CP": (1, 2),
    "DP": (1, 2, 4),
    "EP": ("dense", 1, 2),
    "micro-batch": ("one", "packed", "big"),
    "aggregation": (
        "token_mean",
        "seq_mean_token_mean",
        "seq_mean_token_sum",
        "seq_mean_token_sum_norm",
    ),
    "adaptive": ("none", "max0", "exp"),
    "embeddings": ("untied", "tied"),
    "recompute": ("none", "selective", "full"),
    "distributed optimizer": (False, True),
}

EXCLUSIONS: list[tuple[str, Callable[[Row], bool]]] = [
    (
        "sequence parallelism shards over tensor-parallel ranks: refused at TP 1",
        lambda r: r["SP"] and r["TP"] == 1,
    ),
    (
        "the interleaved schedule needs several stages: refused at PP 1",
        lambda r: r["VPP"] > 1 and r["PP"] == 1,
    ),
    (
        "ranks share experts out over CP x DP: refused where EP does not divide it",
        lambda r: r["EP"] == 2 and r["CP"] * r["DP"] % 2,
    ),
    (
        "experts under TP need SP: megatron-core refuses to train them otherwise",
        lambda r: r["EP"] != "dense" and r["TP"] > 1 and not r["SP"],
    ),
]


def world(row: Row) -> int:
    return int(row["TP"] * row["PP"] * row["CP"] * row["DP"])


def reason_against(row: Row) -> str | None:
    """Why this row cannot be, None if it can."""
    return next((reason for reason, applies in EXCLUSIONS if applies(row)), None)


def pairs_of(row: Row) -> set[Pair]:
    return set(itertools.combinations(row.items(), 2))


def all_pairs() -> set[Pair]:
    return {
        ((a, x), (b, y))
        for a, b in itertools.combinations(AXES, 2)
        for x, y in itertools.product(AXES[a], AXES[b])
    }


def completions(pair: Pair, ranks: int, rng: random.Random) -> Iterator[Row]:
    """Admissible rows that hold ``pair``, the rest at random; simplest values when chance finds none."""
    fixed = dict(pair)
    for attempt in range(200):
        row = {
            axis: fixed[axis]
            if axis in fixed
            else (values[0] if attempt > 150 and rng.random() < 0.7 else rng.choice(values))
            for axis, values in AXES.items()
        }
        if world(row) <= ranks and reason_against(row) is None:
            yield row


def rows(ranks: int, covered: frozenset[Pair] = frozenset()) -> list[Row]:
    """Rows of at most ``ranks`` ranks that hold every admissible pair beyond those ``covered``. Deterministic."""
    rng = random.Random(5)
    order = {axis: i for i, axis in enumerate(AXES)}
    missing = sorted(
        all_pairs() - covered,
        key=lambda p: (order[p[0][0]], order[p[1][0]], str(p)),
    )
    chosen: list[Row] = []
    while missing:
        candidates = list(completions(missing[0], ranks, rng))
        if not candidates:
            missing.pop(0)  # not admissible on so few ranks
            continue
        best = max(candidates, key=lambda r: len(pairs_of(r).intersection(missing)))
        chosen.append(best)
        held = pairs_of(best)
        missing = [p for p in missing if p not in held]
    return chosen


def tiers() -> tuple[list[Row], list[Row]]:
    """Rows of up to four ranks, and the rows of up to eight for the pairs that those cannot hold."""
    small = rows(4)
    return small, rows(8, covered=frozenset().union(*(pairs_of(r) for r in small)))


def step_of(contract: Contract, row: Row) -> tuple[Compared, Limits]:
    """The row, executed, and what it is allowed."""
    layers = max(4, row["PP"] * row["VPP"])
    dense = row["EP"] == "dense"
    kind, family = ("dense", models.DENSE) if dense else ("experts", models.EXPERTS)
    config = {**family[row["embeddings"]], "num_hidden_layers": layers}
    policy = PolicyConfig(
        tensor_parallel=row["TP"],
        sequence_parallel=row["SP"],
        pipeline_parallel=row["PP"],
        virtual_pipeline=row["VPP"],
        context_parallel=row["CP"],
        data_parallel=row["DP"],
        expert_parallel=1 if dense else row["EP"],
        recompute=row["recompute"],
        distributed_optimizer=row["distributed optimizer"],
        dtype="fp32",
        logprob_chunk=32,
    )
    objective = Objective(
        aggregation=row["aggregation"],
        adaptive=row["adaptive"],
        minimum=-100.0,  # open: a closed gate has no gradient to compare
        temperature=0.7,
    )
    model = contract.model(f"{kind}-{row['embeddings']}-{layers}", config)
    step = contract.step(model, policy, objective, row["micro-batch"])
    return step, FP32 if dense else EXPERTS


def name_of(row: Row) -> str:
    """A short name: sizes that are not 1, switches that are on, then the words."""
    sizes = [f"{a.lower()}{row[a]}" for a in ("TP", "PP", "VPP", "CP", "DP") if row[a] > 1]
    switches = [n for a, n in (("SP", "sp"), ("distributed optimizer", "dopt")) if row[a]]
    if row["EP"] != "dense":
        sizes.append(f"ep{row['EP']}")
    words = [row[a] for a in ("embeddings", "micro-batch", "aggregation")]
    words += [f"{a}-{row[a]}" for a in ("adaptive", "recompute") if row[a] != "none"]
    return "-".join([*sizes, *switches, *words]) or "single"
