"""What holds for the record of any step: AGPO is GRPO plus its parts, and order does not matter."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_algorithm_step import algorithm as algorithm_of
from test_algorithm_step import group, on_policy, step

from agpo_megatron.algorithm.presets import PRESETS
from agpo_megatron.algorithm.step import Decision
from agpo_megatron.samples import Group

fast = settings(max_examples=60, deadline=None)
G = 4
groups_of_a_step = st.lists(
    st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.integers(1, 12)), min_size=G, max_size=G),
    min_size=1,
    max_size=5,
).map(
    lambda groups: [
        group(p, [a for a, _ in pairs], [n for _, n in pairs]) for p, pairs in enumerate(groups)
    ]
)
OFF: dict[str, Any] = {
    "length_reward": {"kind": "none"},
    "loss": {"mask": {"zero_variance": False}, "clip": {"kind": "none"}, "clip_high": 0.2},
}
"""AGPO without its parts; and with GRPO's ratio bound, which is DAPO's idea."""


Decided = dict[str, tuple[float, float, float, int]]


def decided(groups: list[Group], decision: Decision) -> Decided:
    """(reward, advantage, weight, trained tokens) by sample."""
    names = [s.sample_id for g in groups for s in g.samples]
    columns = [decision.columns[n] for n in ("reward", "advantage", "loss_weight", "trained")]
    return dict(zip(names, zip(*columns, strict=True), strict=True))


@pytest.mark.parametrize("preset", ["agpo", "agpo_v1", "agpo_v3", "agpo_v3_authors", "agpo_exp"])
@fast
@given(groups=groups_of_a_step)
def test_agpo_equals_grpo_when_its_parts_are_off(preset: str, groups: list[Group]) -> None:
    off = {**OFF, "advantage": {"zero_variance": "zero"}}
    off["loss"] = {**OFF["loss"], "dual_clip": None}
    without, grpo = algorithm_of(preset, off), algorithm_of("grpo", {})
    mine, theirs = step(groups, preset, algorithm=without), step(groups, "grpo")
    assert decided(groups, mine) == decided(groups, theirs)
    # criterion, scope and tie of a part that is off say nothing
    said_nothing = {"clip": grpo.loss.clip, "mask": grpo.loss.mask}
    assert without.loss.model_copy(update=said_nothing) == grpo.loss


@fast
@given(groups=groups_of_a_step)
def test_agpo_equals_grpo_where_its_parts_have_nothing_to_do(groups: list[Group]) -> None:
    """No uniform group to mask, all responses of one length: the same weights and advantages; and L is a tie."""
    mixed = [
        group(p, [1.0, 0.0, *(s.raw_reward for s in g.samples[2:])], [5] * G)
        for p, g in enumerate(groups)
    ]
    agpo, grpo = step(mixed, "agpo"), step(mixed, "grpo")
    assert decided(mixed, agpo) == decided(mixed, grpo)
    assert on_policy(agpo) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("preset", PRESETS)
@settings(max_examples=15, deadline=None)
@given(groups=groups_of_a_step, data=st.data())
def test_the_order_of_groups_and_samples_does_not_matter(
    preset: str, groups: list[Group], data: st.DataObject
) -> None:
    moved = []
    for g in data.draw(st.permutations(groups)):
        inside = data.draw(st.permutations(range(G)))
        moved.append(Group(g.prompt, [g.samples[i] for i in inside]))
    first, second = step(groups, preset), step(moved, preset)
    assert decided(groups, first) == decided(moved, second)
    assert first.metrics == pytest.approx(second.metrics, nan_ok=True)


@pytest.mark.parametrize("preset", PRESETS)
@settings(max_examples=15, deadline=None)
@given(groups=groups_of_a_step)
def test_every_preset_gives_finite_weights_that_add_up(preset: str, groups: list[Group]) -> None:
    decision = step(groups, preset)
    rows = decided(groups, decision)
    algorithm = algorithm_of(preset, {})
    if algorithm.loss.aggregation in ("token_mean", "seq_mean_token_mean"):
        assert math.fsum(weight * n for _, _, weight, n in rows.values()) <= 1 + 1e-12
    for _, advantage, weight, _ in rows.values():
        assert math.isfinite(advantage) and 0 <= weight < math.inf
    uniform = [g for g in groups if len({s.raw_reward for s in g.samples}) == 1]
    metrics = decision.metrics
    assert metrics["group/zero_variance_frac"] == pytest.approx(len(uniform) / len(groups))
    assert metrics["group/all_correct_frac"] + metrics["group/all_wrong_frac"] == pytest.approx(
        metrics["group/zero_variance_frac"]
    )
    if algorithm.loss.mask.zero_variance and algorithm.loss.mask.criterion == "group":
        assert metrics["mask/kept_groups"] == len(groups) - len(uniform)
        trained = {name.rpartition(".")[0] for name, row in rows.items() if row[3]}
        assert not trained & {g.group_id for g in uniform}


def test_the_authors_mask_also_drops_a_member_at_the_mean() -> None:
    """Kimi's length reward puts the second sample exactly at the mean: 1.5, 0.75, 0, 0.5, 1."""
    five = [group(0, [1, 1, 0, 1, 1], [100, 400, 200, 500, 300])]
    kimi = {"length_reward": {"kind": "kimi", "weight": 1.0}}
    for preset, kept in (("agpo_v3", [100, 400, 200, 500, 300]), ("agpo_v3_authors", None)):
        columns = step(five, preset, algorithm=algorithm_of(preset, kimi)).columns
        assert list(columns["reward"]) == [1.5, 0.75, 0.0, 0.5, 1.0]
        assert columns["advantage"][1] == 0.0
        assert list(columns["trained"]) == (kept or [100, 0, 200, 500, 300])
        assert columns["loss_weight"][0] == pytest.approx(1 / sum(columns["trained"]))
