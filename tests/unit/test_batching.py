"""From groups to step records and micro-batches: values, not shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agpo_megatron.config.presets import apply_preset
from agpo_megatron.config.schema import AlgorithmConfig, RewardConfig
from agpo_megatron.controller.batching import StepRequest, build_step, plan_micro_batches, staleness
from agpo_megatron.journal.records import SampleRef
from agpo_megatron.journal.writer import JournaledGroup
from agpo_megatron.types import Group, Prompt, Sample, VersionSpan, WeightVersion


def journaled(position: int, accuracies: list[float], lengths: list[int]) -> JournaledGroup:
    prompt = Prompt(position, [1, 2], "x")
    samples = [
        Sample(
            prompt.group_id,
            i,
            [1, 2],
            [5] * n,
            [-1.0] * n,
            [1] * n,
            [VersionSpan("0.1.", 0, n)],
            "stop",
            accuracy=a,
        )
        for i, (a, n) in enumerate(zip(accuracies, lengths, strict=True))
    ]
    refs = [SampleRef(f"s{position}", i) for i in range(len(samples))]
    return JournaledGroup(Group(prompt, samples), refs, "digest")


def algorithm(preset: str) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate(apply_preset({"preset": preset}))


def step(groups: list[JournaledGroup], preset: str, **changes):
    request = {
        "step": 1,
        "cursor": len(groups),
        "version": WeightVersion(0, 1),
        "algorithm": algorithm(preset),
        "reward": RewardConfig(),
        "max_response_tokens": 1000,
        **changes,
    }
    return build_step(groups, StepRequest(**request))


def on_policy(record) -> float:
    return -sum(row.loss_weight * row.trained * row.advantage for row in record.rows)


# rewards [[1,0],[1,1],[0,1]], lengths [[2,6],[5,3],[1,3]]
E4 = [journaled(0, [1, 0], [2, 6]), journaled(1, [1, 1], [5, 3]), journaled(2, [0, 1], [1, 3])]


def test_the_loss_mask_leaves_numerator_and_denominator() -> None:
    record = step(E4, "agpo_v3")
    assert on_policy(record) == pytest.approx(0.117851, abs=1e-6)
    assert [row.trained for row in record.rows] == [2, 6, 0, 0, 1, 3]
    assert record.rows[2].loss_weight == 0
    assert record.metrics["mask/kept_tokens"] == 12
    assert record.metrics["mask/kept_groups"] == 2
    assert record.metrics["tokens/skipped"] == (5 + 2) + (3 + 2)


def test_grpo_keeps_the_whole_denominator() -> None:
    record = step(E4, "grpo")
    assert on_policy(record) == pytest.approx(0.070711, abs=1e-6)
    assert record.metrics["mask/kept_tokens"] == 20


def test_v1_gives_homogeneous_groups_a_signal() -> None:
    record = step(E4, "agpo_v1")
    assert [row.advantage for row in record.rows[2:4]] == [1.0, 1.0]
    assert record.rows[2].loss_weight > 0


def test_length_reward_acts_in_mixed_groups_and_is_reported() -> None:
    record = step([journaled(0, [1, 1, 1, 0, 0, 1], [100, 200, 400, 50, 900, 300])], "agpo")
    assert [round(r.reward, 6) for r in record.rows] == [1.1, 1.066667, 1.0, 0.0, 0.0, 1.033333]
    assert record.rows[0].advantage == pytest.approx(0.73632, abs=1e-5)
    assert record.metrics["reward/accuracy"] == pytest.approx(4 / 6)
    assert record.metrics["reward/length"] == pytest.approx(0.2 / 6)
    assert record.metrics["response/tokens_correct_mean"] == 250
    assert step(E4[1:2] + E4[:1], "agpo").metrics["group/all_correct_frac"] == 0.5


def test_an_all_masked_step_has_no_weight_and_no_nan() -> None:
    record = step([journaled(0, [1, 1], [3, 4]), journaled(1, [0, 0], [3, 4])], "agpo")
    assert not any(row.has_weight for row in record.rows)
    assert record.metrics["group/zero_variance_frac"] == 1.0
    assert record.metrics["group/all_wrong_frac"] == 0.5
    assert all(v == v for v in record.metrics.values())


def test_staleness_counts_optimizer_steps_per_token() -> None:
    sample = journaled(0, [1, 0], [4, 4]).group.samples[0]
    mixed = replace(sample, versions=[VersionSpan("3.1.a", 0, 1), VersionSpan("5.2.b", 1, 4)])
    assert staleness(mixed, 5) == pytest.approx(2 / 4)


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
