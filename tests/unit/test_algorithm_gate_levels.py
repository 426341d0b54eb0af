"""Gates whose level the controller decides, and the length projection: worked numbers, and who decides when."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import made
import numpy as np
import pytest

from agpo_megatron.algorithm.gate import Adaptive, Gate, gate_of, on_policy_parts
from agpo_megatron.algorithm.settings import AlgorithmSettings
from agpo_megatron.algorithm.step import Decision, StepRequest, decide
from agpo_megatron.samples import Group, TrainSequence

HALF = math.sqrt(0.5)  # |A| of a right and a wrong answer


def pair(position: int, right: int, wrong: int) -> Group:
    """A group of a right and a wrong answer with these lengths."""
    of = made.prompt(position)
    samples = [
        made.sample(of, i, n, raw_reward=float(i == 0), correct=i == 0)
        for i, n in enumerate((right, wrong))
    ]
    return Group(of, samples)


def settings(**clip: Any) -> AlgorithmSettings:
    return AlgorithmSettings.model_validate({"preset": "agpo_v3", "loss": {"clip": clip}})


def step(groups: list[Group], how: AlgorithmSettings, **changes: Any) -> Decision:
    request = {"first_step": 1, "updates": 1, "seed": 0, "max_response_tokens": 1000, **changes}
    return decide(groups, StepRequest(algorithm=how, **request))


def gate(decided: Decision, groups: list[Group], how: AlgorithmSettings, update: int = 0) -> Gate:
    """The gate as a trainer takes it from the record."""
    rows = zip(*(decided.columns[n] for n in ("loss_weight", "advantage", "update")), strict=True)
    samples = [s for group in groups for s in group.samples]
    mine: list[TrainSequence] = [
        made.sequence(
            s.sample_id,
            [1] * (1 + len(s.response_tokens)),
            w,
            [1] * (1 + len(s.response_tokens)),
            a,
        )
        for s, (w, a, u) in zip(samples, rows, strict=True)
        if u == update
    ]
    loss = how.loss.with_gate_level(decided.gate_levels, update)
    return gate_of(loss, [on_policy_parts(mine)])


# L of token_mean is A (wrong - right) / (right + wrong): -.5, .25, 0, -.1 times A
STEPS = [(300, 100), (150, 250), (100, 100), (110, 90)]
LOSSES = [-0.5, 0.25, 0.0, -0.1]


@pytest.mark.parametrize("kind", ["exp", "elu", "softplus"])
def test_a_running_tau_is_the_deviation_of_the_steps_before(kind: str) -> None:
    how, state = settings(kind=kind, tau=None), ()
    losses = [HALF * x for x in LOSSES]
    for i, lengths in enumerate(STEPS):
        groups = [pair(i, *lengths)]
        decided = step(groups, how, first_step=i + 1, gate_state=state)
        weights = 0.95 ** np.arange(i)[::-1]  # of the losses before, the last one counts 1
        if i < 2:
            expected = 1.0
        else:
            mean = np.average(losses[:i], weights=weights)
            expected = math.sqrt(np.average((losses[:i] - mean) ** 2, weights=weights))
        assert decided.gate_levels == pytest.approx([expected], abs=1e-5)
        got, phi = gate(decided, groups, how), Adaptive(how.loss.clip.kind, tau=expected)
        assert got.loss == pytest.approx(losses[i], abs=2e-6)
        assert got.mean == pytest.approx(phi.gain(losses[i]), abs=1e-4)
        state = decided.gate_state
    assert 0.2 < expected < 0.4, "the scale of these losses, not 1"


def test_the_updates_of_a_batch_are_steps_in_turn() -> None:
    how = settings(kind="exp", tau=None)
    groups = [pair(i, *lengths) for i, lengths in enumerate(STEPS)]
    whole = step(groups, how, updates=4)
    levels: list[float] = []
    state = ()
    for update in range(4):
        (mine,) = [
            g for g, u in zip(groups, whole.columns["update"][::2], strict=True) if u == update
        ]
        alone = step([mine], how, first_step=update + 1, gate_state=state)
        levels, state = [*levels, *alone.gate_levels], alone.gate_state
    assert whole.gate_levels == pytest.approx(levels)
    assert whole.gate_state == pytest.approx(state)
    assert len(set(levels)) > 2


def test_a_step_that_trains_nothing_says_nothing_of_the_scale() -> None:
    how = settings(kind="exp", tau=None)
    nothing = Group(made.prompt(9), [made.sample(made.prompt(9), i, 5) for i in (0, 1)])
    decided = step([nothing], how, gate_state=(2.0, 0.1, 0.5))
    assert decided.gate_levels == [0.5]
    assert list(decided.gate_state) == [2.0, 0.1, 0.5]
    assert list(step([nothing], settings(kind="random"), gate_state=(10, 5)).gate_state) == [10, 5]


def test_losses_that_never_differ_have_no_scale_and_leave_the_gate_open() -> None:
    decided = step([pair(0, 7, 7)], settings(kind="exp", tau=None), gate_state=(2.0, 0.0, 0.0))
    assert gate(decided, [pair(0, 7, 7)], settings(kind="exp", tau=None)).mean == pytest.approx(1.0)


def test_the_random_gate_closes_as_often_as_the_clip_would_and_does_not_look() -> None:
    how, state, gains = settings(kind="random"), (), []
    rng = np.random.default_rng(0)
    would = rng.random(600) < 0.3
    for i, closes in enumerate(would):
        groups = [pair(i, 300, 100) if closes else pair(i, 100, 300)]
        decided = step(groups, how, first_step=i + 1, gate_state=state)
        again = step(groups, how, first_step=i + 1, gate_state=state)
        assert again.gate_levels == decided.gate_levels, "a resumed run draws the same"
        gains.append(gate(decided, groups, how).mean)
        state = decided.gate_state
    closed = np.array(gains) == 0
    assert set(gains) == {0.0, 1.0}
    assert gains[0] == 1.0
    assert list(state) == [600, would.sum()]
    assert closed.mean() == pytest.approx(would.mean(), abs=0.06)
    assert abs(np.corrcoef(closed[20:], would[20:])[0, 1]) < 0.12
    of_one_length = [pair(i, 23, 23) for i in range(7)]
    tied = step(of_one_length, how, gate_state=(0, 0))
    assert list(tied.gate_state) == [1, 1], "a loss that is 0 but for rounding closes max0"
    twelve = [pair(i, 9, 8) for i in range(12)]
    assert len(set(step(twelve, how, updates=12, gate_state=(10, 5)).gate_levels)) == 2, (
        "each draws"
    )
    other = [step([pair(0, 9, 8)], how, seed=s, gate_state=(10, 5)).gate_levels for s in range(20)]
    assert {x for levels in other for x in levels} == {0.0, 1.0}, "the seed of the run decides"


def test_a_gate_without_its_level_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the level that the batch record has"):
        gate_of(settings(kind="exp", tau=None).loss, [])
    plain = step([pair(0, 300, 100)], settings(kind="exp"))
    assert (plain.gate_levels, plain.gate_state) == ([], [])


def advantages(groups: list[Group], share: float, estimator: str = "group_center") -> list[float]:
    how = AlgorithmSettings.model_validate(
        {"preset": "grpo", "advantage": {"length_projection": share, "estimator": estimator}}
    )
    return list(step(groups, how).columns["advantage"])


def grouped(lengths: list[int], rewards: list[float]) -> Group:
    of = made.prompt(0)
    return Group(
        of,
        [
            made.sample(of, i, n, raw_reward=r)
            for i, (n, r) in enumerate(zip(lengths, rewards, strict=True))
        ],
    )


def test_the_projection_takes_out_the_slope_on_length() -> None:
    """n = 10, 20, 30, 40, A = -.5, -.5, .5, .5: slope 20 / 500 = .04."""
    group = grouped([10, 20, 30, 40], [0, 0, 1, 1])
    assert advantages([group], 1.0) == pytest.approx([0.1, -0.3, 0.3, -0.1])
    assert advantages([group], 0.5) == pytest.approx([-0.2, -0.4, 0.4, 0.2])
    assert advantages([group], 0.0) == [-0.5, -0.5, 0.5, 0.5]


def test_the_projection_counts_trained_tokens() -> None:
    """The right answers are the long responses, but what makes them long the environment wrote."""
    group = grouped([10, 20, 30, 40], [0, 0, 1, 1])
    masks = [np.arange(len(s.response_tokens)) < 10 for s in group.samples]
    samples = [
        replace(s, loss_mask=m.astype(np.uint8)) for s, m in zip(group.samples, masks, strict=True)
    ]
    assert advantages([Group(group.prompt, samples)], 1.0) == [-0.5, -0.5, 0.5, 0.5]


def test_the_projection_leaves_short_right_answers_and_equal_lengths_alone() -> None:
    for lengths in ([40, 30, 20, 10], [20, 20, 20, 20]):
        group = grouped(lengths, [0, 0, 1, 1])
        assert advantages([group], 1.0) == advantages([group], 0.0)


@pytest.mark.parametrize("lengths", [[33, 10], [47, 14], [61, 22], [95, 3]])
def test_a_pair_whose_right_answer_is_longer_has_nothing_left(lengths: list[int]) -> None:
    for estimator in ("group_center", "group_norm", "rloo"):
        left = advantages([grouped(lengths, [0.9, 0.2])], 1.0, estimator)
        assert left == [0.0, 0.0], "not a rounding of it"
