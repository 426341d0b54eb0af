"""From groups to step records and micro-batches: values, not shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agpo_megatron.config.presets import apply_preset
from agpo_megatron.config.schema import AlgorithmConfig, RewardConfig
from agpo_megatron.controller.batching import (
    Scores,
    StepRequest,
    build_step,
    plan_micro_batches,
    staleness,
    to_score,
)
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
        "attempt": 1,
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


def settings(preset: str, section: dict) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate(apply_preset({"preset": preset, **section}))


def test_the_authors_mask_drops_samples_at_the_mean() -> None:
    """Rewards 1, 0.. cannot sit at the mean; a length bonus can put one there."""
    groups = [journaled(0, [1, 0], [2, 2]), journaled(1, [1, 1], [3, 3])]
    for preset in ("agpo_v3", "agpo_v3_authors"):
        record = step(groups, preset)
        assert [row.trained for row in record.rows] == [2, 2, 0, 0]


def test_truncated_responses_can_be_masked() -> None:
    group = journaled(0, [1, 0], [4, 6])
    cut = replace(group.group.samples[1], finish_reason="length")
    groups = [replace(group, group=Group(group.group.prompt, [group.group.samples[0], cut]))]
    for denominators, weight in (("exclude", 1 / 4), ("keep", 1 / 10)):
        section = {"loss": {"mask": {"truncated": True, "denominators": denominators}}}
        record = step(groups, "grpo", algorithm=settings("grpo", section))
        assert [row.trained for row in record.rows] == [4, 0]
        assert record.rows[0].loss_weight == pytest.approx(weight)
        assert record.rows[1].advantage < 0 == record.rows[1].loss_weight


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("dr_grpo", 1 / (4 * 1000)),
        ("rloo", 1 / 4),
        ("gspo", 1 / (4 * 2)),
        ("dapo", 1 / 12),
        ("reinforce_pp", 1 / 12),
    ],
)
def test_presets_aggregate_as_their_papers(preset: str, expected: float) -> None:
    record = step([E4[0], E4[2]], preset)
    assert record.rows[0].loss_weight == pytest.approx(expected)


def test_length_rewards_of_other_papers() -> None:
    group = [journaled(0, [1, 0, 1, 0, 1], [100, 200, 300, 400, 500])]
    kimi = settings("grpo", {"length_reward": {"kind": "kimi", "weight": 1.0}})
    record = step(group, "grpo", algorithm=kimi)
    assert [row.reward for row in record.rows] == pytest.approx([1.5, 0, 1, -0.25, 0.5])
    overlong = step(group, "dapo", max_response_tokens=500)  # buffer: a fifth
    assert [row.reward for row in overlong.rows] == pytest.approx([1, 0, 1, 0, 0])
    assert overlong.metrics["reward/accuracy"] == 0.6, "accuracy stays raw"
    cosine = settings("grpo", {"length_reward": {"kind": "cosine", "weight": 1.0}})
    got = step(group, "grpo", algorithm=cosine, max_response_tokens=600).rows
    assert got[2].reward == pytest.approx(1.5) and got[0].reward > got[4].reward > 1


SCORES = Scores(
    old={f"g000000000.{i}": [-1.0 + shift] * n for i, (shift, n) in enumerate([(0.5, 2), (3, 6)])},
    ref={"g000000000.0": [-1.5] * 2, "g000000000.1": [-1.0] * 6},
    entropy=0.4,
)
"""For E4's first group, whose rollout log-probs are -1: q = e^0.5 and e^3; k1 sums 2 x 1.0 and 6 x 3."""


@pytest.mark.parametrize(("denominators", "weight"), [("exclude", 1 / 2), ("keep", 1 / 8)])
def test_rollout_correction_and_its_denominators(denominators: str, weight: float) -> None:
    section = {"loss": {"correction": {"kind": "mis", "denominators": denominators}}}
    record = step(E4[:1], "grpo", algorithm=settings("grpo", section), scores=SCORES)
    assert [row.trained for row in record.rows] == [2, 0]
    assert record.rows[0].correction == pytest.approx([2.718281828**0.5] * 2)
    assert record.rows[1].correction == [0.0] * 6
    assert record.rows[0].loss_weight == pytest.approx(weight)
    assert not record.rows[1].has_weight
    assert record.rows[0].old_logprobs == [-0.5, -0.5]
    assert record.metrics["correction/dropped_frac"] == 0.75


def test_what_the_mask_drops_is_not_scored() -> None:
    """And its missing scores change nothing; a sample that trains must have them."""
    mis = {"loss": {"correction": {"kind": "mis"}, "kl": {"coef": 0.1}}}
    masked = settings("agpo_v3", mis)
    assert to_score(E4, masked, RewardConfig()) == [E4[0], E4[2]]
    for other in (
        settings("grpo", mis),
        settings("agpo_v3_authors", mis),
        settings("agpo_v3", {"loss": {"mask": {"denominators": "keep"}}}),
        settings("agpo_v3", {"loss": {"kl": {"coef": 0.1, "place": "reward"}}}),
    ):
        assert to_score(E4, other, RewardConfig()) == E4
    alone = step(E4[:1], "agpo_v3", algorithm=masked, scores=SCORES)
    beside = step(E4[:2], "agpo_v3", algorithm=masked, scores=SCORES)
    assert [r.loss_weight for r in beside.rows] == [*(r.loss_weight for r in alone.rows), 0, 0]
    assert beside.rows[2].correction == [] and not beside.rows[2].has_weight
    with pytest.raises(KeyError):
        step(E4, "agpo_v3", algorithm=masked, scores=SCORES)


def test_kl_in_the_reward_moves_rewards_but_not_the_zero_variance_rule() -> None:
    section = {"loss": {"kl": {"coef": 0.01, "place": "reward", "estimator": "k1"}}}
    algorithm = settings("grpo", section)
    record = step(E4[:1], "grpo", algorithm=algorithm, scores=SCORES)
    assert [row.reward for row in record.rows] == pytest.approx([1 - 0.02, 0 - 0.18])
    same = journaled(0, [1, 1], [2, 6])
    silent = step([same], "grpo", algorithm=algorithm, scores=SCORES)
    assert [row.advantage for row in silent.rows] == [0, 0]
    assert silent.rows[0].reward != silent.rows[1].reward


def test_a_term_beside_the_policy_loss_keeps_silent_groups_in_training() -> None:
    plain = step(E4, "grpo")
    assert not plain.rows[2].has_weight
    kl = settings("grpo", {"loss": {"kl": {"coef": 0.1}}})
    assert step(E4, "grpo", algorithm=kl).rows[2].has_weight
    masked = settings("agpo_v3", {"loss": {"kl": {"coef": 0.1}}})
    assert not step(E4, "agpo_v3", algorithm=masked).rows[2].has_weight, "the mask still drops them"


def test_the_entropy_coefficient_is_journaled_and_carried() -> None:
    section = {"loss": {"entropy": {"coef": 0.01, "target": 0.5, "delta": 0.005}}}
    algorithm = settings("grpo", section)
    low = step(E4[:1], "grpo", algorithm=algorithm, scores=SCORES, entropy_state=0.02)
    assert (low.entropy_coef, low.entropy_state) == pytest.approx((0.025, 0.025))
    assert low.metrics["loss/entropy_coef"] == pytest.approx(0.025)
    high = replace(SCORES, entropy=0.9)
    rest = step(E4[:1], "grpo", algorithm=algorithm, scores=high, entropy_state=0.02)
    assert (rest.entropy_coef, rest.entropy_state) == pytest.approx((0.0, 0.015))
    unknown = replace(SCORES, entropy=None)  # every group was masked
    rest = step(E4[:1], "grpo", algorithm=algorithm, scores=unknown, entropy_state=0.02)
    assert (rest.entropy_coef, rest.entropy_state) == (0.0, 0.02)
    fixed = settings("grpo", {"loss": {"entropy": {"coef": 0.01}}})
    assert step(E4, "grpo", algorithm=fixed).entropy_coef == 0.01
    assert step(E4, "grpo").entropy_coef == 0.0


def test_what_dynamic_sampling_replaced_is_reported_and_belongs_to_the_step() -> None:
    replaced = [replace(E4[1], refs=[SampleRef("other", 0), SampleRef("other", 1)])]
    record = step([E4[0], E4[2]], "dapo", discarded=replaced, rounds=2, cursor=3)
    assert record.metrics["sampling/rounds"] == 2
    assert record.metrics["sampling/discarded_groups"] == 1
    assert "other" in record.segments, "pruning the step must remove it"
    assert "sampling/rounds" not in step(E4, "agpo").metrics


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
