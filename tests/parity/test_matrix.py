"""One batch, one answer: every row of the matrix against the fp64 reference that has no layout."""

from __future__ import annotations

import matrix
import pytest
from matrix import Row

from agpo_megatron.config.schema import PolicyConfig
from agpo_megatron.parity import models
from agpo_megatron.parity.comparison import EXPERTS, FP32, failures
from agpo_megatron.parity.contract import Contract
from agpo_megatron.parity.reference import Objective

SMALL = matrix.rows(4)
LARGE = matrix.rows(8, covered=frozenset().union(*(matrix.pairs_of(r) for r in SMALL)))


def policy_of(row: Row) -> PolicyConfig:
    return PolicyConfig(
        tensor_parallel=row["TP"],
        sequence_parallel=row["SP"],
        pipeline_parallel=row["PP"],
        virtual_pipeline=row["VPP"],
        context_parallel=row["CP"],
        data_parallel=row["DP"],
        expert_parallel=1 if row["EP"] == "dense" else row["EP"],
        recompute=row["recompute"],
        distributed_optimizer=row["distributed optimizer"],
        dtype="fp32",
        logprob_chunk=32,
    )


def check(contract: Contract, row: Row) -> None:
    layers = max(4, row["PP"] * row["VPP"])
    kind, family = ("dense", models.DENSE) if row["EP"] == "dense" else ("experts", models.EXPERTS)
    config = {**family[row["embeddings"]], "num_hidden_layers": layers}
    objective = Objective(
        aggregation=row["aggregation"],
        adaptive=row["adaptive"],
        minimum=-100.0,
        temperature=0.7,
    )
    step = contract.step(
        contract.model(f"{kind}-{row['embeddings']}-{layers}", config),
        policy_of(row),
        objective,
        row["micro-batch"],
    )
    limits = FP32 if kind == "dense" else EXPERTS
    assert list(failures(step.deviations(limits))) == []


@pytest.mark.parametrize("row", SMALL, ids=matrix.name_of)
def test_on_up_to_four_ranks(contract: Contract, row: Row) -> None:
    check(contract, row)


@pytest.mark.full
@pytest.mark.parametrize("row", LARGE, ids=matrix.name_of)
def test_on_up_to_eight_ranks(contract: Contract, row: Row) -> None:
    check(contract, row)


def test_every_admissible_pair_is_in_a_row() -> None:
    """A pair that no row of up to 8 ranks holds is one that an exclusion forbids, or needs more ranks."""
    held = frozenset().union(*(matrix.pairs_of(r) for r in [*SMALL, *LARGE]))
    for (a, x), (b, y) in matrix.all_pairs() - held:
        least = {axis: values[0] for axis, values in matrix.AXES.items()}
        row = {**least, a: x, b: y}
        assert matrix.reason_against(row) or matrix.world(row) > 8, (a, x, b, y)
