"""Micro-batches: complete, within the budget, balanced."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agpo_megatron.controller.micro_batches import plan_micro_batches


@given(
    lengths=st.lists(st.integers(1, 300), max_size=60),
    ranks=st.integers(1, 4),
    budget=st.integers(16, 256),
    multiple=st.sampled_from([1, 2, 4]),
)
def test_every_sequence_is_planned_once_within_the_budget(
    lengths: list[int], ranks: int, budget: int, multiple: int
) -> None:
    plan = plan_micro_batches(
        lengths, data_parallel=ranks, token_budget=budget, multiple_of=multiple
    )
    assert len(plan) == ranks
    assert {len(rank) for rank in plan} == {len(plan[0])} and len(plan[0]) % multiple == 0
    assert sorted(i for rank in plan for batch in rank for i in batch) == list(range(len(lengths)))
    for rank in plan:
        for batch in rank:
            assert sum(lengths[i] for i in batch) <= budget or len(batch) == 1


def test_ranks_are_balanced_by_cost() -> None:
    lengths = [1000, 10, 10, 10, 500, 490, 10, 10]
    plan = plan_micro_batches(lengths, data_parallel=2, token_budget=1100, hidden_size=128)
    totals = [sum(lengths[i] for batch in rank for i in batch) for rank in plan]
    assert max(totals) / min(totals) < 1.1


def test_an_empty_step_still_gives_every_rank_its_micro_batches() -> None:
    assert plan_micro_batches([], data_parallel=2, token_budget=64, multiple_of=2) == [
        [[], []],
        [[], []],
    ]
