"""What holds for the record of any step: AGPO is GRPO plus its parts, and order does not matter."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batching import journaled, on_policy, step
from test_batching import settings as algorithm_of

from agpo_megatron.config.presets import PRESETS
from agpo_megatron.controller.loop import loss_settings
from agpo_megatron.journal.records import StepRecord
from agpo_megatron.journal.writer import JournaledGroup
from agpo_megatron.policy.objective import LossSettings
from agpo_megatron.types import Group

fast = settings(max_examples=60, deadline=None)
G = 4
groups_of_a_step = st.lists(
    st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.integers(1, 12)), min_size=G, max_size=G),
    min_size=1,
    max_size=5,
).map(
    lambda groups: [
        journaled(p, [a for a, _ in group], [n for _, n in group]) for p, group in enumerate(groups)
    ]
)
OFF: dict[str, Any] = {
    "length_reward": {"kind": "none"},
    "loss": {"mask": {"zero_variance": False}, "clip": {"kind": "none"}, "clip_high": 0.2},
}
"""AGPO without its parts; and with GRPO's ratio bound, which is DAPO's idea."""


def decided(record: StepRecord) -> dict[str, tuple[float, float, float, int]]:
    return {r.sample_id: (r.reward, r.advantage, r.loss_weight, r.trained) for r in record.rows}


@pytest.mark.parametrize("preset", ["agpo", "agpo_v1", "agpo_v3", "agpo_v3_authors", "agpo_exp"])
@fast
@given(groups=groups_of_a_step)
def test_agpo_equals_grpo_when_its_parts_are_off(preset: str, groups: list[JournaledGroup]) -> None:
    off = {**OFF, "advantage": {"zero_variance": "zero"}}
    off["loss"] = {**OFF["loss"], "dual_clip": None}
    without = algorithm_of(preset, off)
    grpo = algorithm_of("grpo", {})
    assert decided(step(groups, preset, algorithm=without)) == decided(step(groups, "grpo"))
    switches = [LossSettings(**loss_settings(a.loss)) for a in (without, grpo)]
    # criterion, scope and tie of a part that is off say nothing
    assert {replace(s, scope="batch", tie="zero") for s in switches} == {switches[1]}


@fast
@given(groups=groups_of_a_step)
def test_agpo_equals_grpo_where_its_parts_have_nothing_to_do(groups: list[JournaledGroup]) -> None:
    """No silent group to mask, all responses of one length: the same weights and advantages; and L is a tie."""
    mixed = [
        journaled(p, [1.0, 0.0, *(s.accuracy for s in j.group.samples[2:])], [5] * G)
        for p, j in enumerate(groups)
    ]
    agpo, grpo = step(mixed, "agpo"), step(mixed, "grpo")
    assert decided(agpo) == decided(grpo)
    assert on_policy(agpo) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("preset", PRESETS)
@settings(max_examples=15, deadline=None)
@given(groups=groups_of_a_step, data=st.data())
def test_the_order_of_groups_and_samples_does_not_matter(
    preset: str, groups: list[JournaledGroup], data: st.DataObject
) -> None:
    moved = []
    for j in data.draw(st.permutations(groups)):
        inside = data.draw(st.permutations(range(G)))
        samples = [j.group.samples[i] for i in inside]
        moved.append(
            replace(j, group=Group(j.group.prompt, samples), refs=[j.refs[i] for i in inside])
        )
    first, second = step(groups, preset), step(moved, preset)
    assert decided(first) == decided(second)
    assert first.metrics == pytest.approx(second.metrics, nan_ok=True)


@pytest.mark.parametrize("preset", PRESETS)
@settings(max_examples=15, deadline=None)
@given(groups=groups_of_a_step)
def test_every_preset_gives_finite_weights_that_add_up(
    preset: str, groups: list[JournaledGroup]
) -> None:
    record = step(groups, preset)
    total = math.fsum(r.loss_weight * r.trained for r in record.rows)
    algorithm = algorithm_of(preset, {})
    if algorithm.loss.aggregation in ("token_mean", "seq_mean_token_mean"):
        assert total <= 1 + 1e-12
    for row in record.rows:
        assert math.isfinite(row.advantage) and 0 <= row.loss_weight < math.inf
    silent = [j for j in groups if len({s.accuracy for s in j.group.samples}) == 1]
    metrics = record.metrics
    assert metrics["group/zero_variance_frac"] == pytest.approx(len(silent) / len(groups))
    assert metrics["group/all_correct_frac"] + metrics["group/all_wrong_frac"] == pytest.approx(
        metrics["group/zero_variance_frac"]
    )
    if algorithm.loss.mask.zero_variance and algorithm.loss.mask.criterion == "group":
        assert metrics["mask/kept_groups"] == len(groups) - len(silent)
        trained = {r.sample_id.rpartition(".")[0] for r in record.rows if r.trained}
        assert not trained & {j.group.group_id for j in silent}


def test_the_authors_mask_also_drops_a_member_at_the_mean() -> None:
    """Kimi's length reward puts the second sample exactly at the mean: 1.5, 0.75, 0, 0.5, 1."""
    group = [journaled(0, [1, 1, 0, 1, 1], [100, 400, 200, 500, 300])]
    kimi = {"length_reward": {"kind": "kimi", "weight": 1.0}}
    for preset, kept in (("agpo_v3", [100, 400, 200, 500, 300]), ("agpo_v3_authors", None)):
        record = step(group, preset, algorithm=algorithm_of(preset, kimi))
        assert [r.reward for r in record.rows] == [1.5, 0.75, 0.0, 0.5, 1.0]
        assert record.rows[1].advantage == 0.0
        assert [r.trained for r in record.rows] == (kept or [100, 0, 200, 500, 300])
        share = sum(r.trained for r in record.rows)
        assert record.rows[0].loss_weight == pytest.approx(1 / share)
