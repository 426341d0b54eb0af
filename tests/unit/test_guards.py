"""The guards' arithmetic: limits from the steps before, the ladder, the worst samples."""

from __future__ import annotations

import math
from typing import Any

import made
import numpy as np
import pytest

from agpo_megatron.algorithm.limits import Limit, broken, not_finite
from agpo_megatron.config.schema import GuardsConfig
from agpo_megatron.controller import guards
from agpo_megatron.journal import BatchRecord, Block, StepVerdict
from agpo_megatron.journal.records import decode_record, encode_record, sequence_columns

LADDER = ["warn", "skip", "roll_back", "stop"]
OFF = {
    "grad_norm": None,
    "logprob_gap": None,
    "logprob_far": None,
    "entropy": None,
    "reward_drop": None,
    "truncated": None,
}


def rows(**columns: list[float]) -> list[dict[str, float]]:
    names = {"norm": "grad_norm", "reward": "reward/mean", "truncated": "response/truncated_frac"}
    count = len(next(iter(columns.values())))
    return [
        {"step": i + 1, **{names[key]: values[i] for key, values in columns.items()}}
        for i in range(count)
    ]


def limits_of(past: list[dict[str, float]], **settings: Any) -> dict[str, Limit]:
    rest = {
        key: settings.pop(key) for key in ("rolled_back", "quiet", "rewarded") if key in settings
    }
    found = guards.limits(
        GuardsConfig(**{**OFF, **settings}), 0.5, past, **{"rewarded": True, **rest}
    )
    return {limit.guard: limit for limit in found}


def test_the_norm_may_be_a_multiple_of_the_median_of_those_before() -> None:
    few = rows(norm=[1.0] * 7)
    assert "grad_norm" not in limits_of(few, grad_norm=5.0), "nothing is known yet"
    closed = rows(norm=[1.0] * 7 + [0.0, math.nan, math.inf])
    assert "grad_norm" not in limits_of(closed, grad_norm=5.0), (
        "closed gates and spikes say nothing"
    )
    past = rows(norm=[100.0] * 50 + [2.0] * 40)
    assert limits_of(past, grad_norm=5.0)["grad_norm"].bound == 10.0, "of the last 64"
    assert "grad_norm" not in limits_of(past)
    assert list(limits_of(past, grad_norm=5.0, rewarded=False, entropy=1.0)) == ["grad_norm"]


def test_truncation_is_a_collapse_only_after_better_days() -> None:
    assert "truncated" not in limits_of([], truncated=0.5)
    assert "truncated" not in limits_of(rows(truncated=[1.0, 0.9]), truncated=0.5)
    assert limits_of(rows(truncated=[1.0, 0.5, 0.9]), truncated=0.5)["truncated"].bound == 0.5


def test_the_reward_is_averaged_and_held_against_its_best() -> None:
    """Best mean of 8: 0.8, lowest allowed 0.8 - 0.5 x 0.8 = 0.4; seven batches of 0.3 and one of 1.1 have that mean."""
    past = rows(reward=[0.8] * 8 + [0.3] * 7)
    floor = limits_of(past, reward_drop=0.5)["reward_drop"]
    assert floor.bound == pytest.approx(8 * 0.4 - 7 * 0.3) and not floor.above
    assert "reward_drop" not in limits_of(rows(reward=[0.8] * 7), reward_drop=0.5)
    healthy = limits_of(rows(reward=[0.8] * 30), reward_drop=0.9)["reward_drop"]
    assert healthy.bound < 0, "a single batch without a right answer is no collapse"
    absurd = limits_of(rows(reward=[0.8] * 12 + [1e30] + [0.8] * 8), reward_drop=0.5)
    assert absurd["reward_drop"].bound == pytest.approx(8 * 0.4 - 7 * 0.8), "one absurd batch"
    negative = limits_of(rows(reward=[-1.0] * 8 + [-0.2] * 8), reward_drop=0.9)["reward_drop"]
    assert negative.bound == pytest.approx(8 * (-0.2 - 0.9) + 7 * 0.2), (
        "by the largest absolute mean"
    )


def test_rare_rewards_that_stay_away_by_chance_are_no_collapse() -> None:
    """16 samples a batch, one of 50 right: for eight batches none, now and then."""
    rng = np.random.default_rng(3)
    rewards = list(rng.binomial(16, 1 / 50, 400) / 16)
    assert any(not sum(rewards[i - 8 : i]) and i > 20 for i in range(8, 401)), "the case occurs"
    for step in range(20, 400):
        floor = limits_of(rows(reward=rewards[:step]), reward_drop=0.9)["reward_drop"]
        assert not floor.broken_by({"reward/mean": rewards[step]}), step
    # The same in batches of 512, and then it really collapses.
    many = list(rng.binomial(512, 1 / 50, 100) / 512)
    fallen = limits_of(rows(reward=[*many, *[0.0] * 7]), reward_drop=0.9)["reward_drop"]
    assert fallen.broken_by({"reward/mean": 0.0})
    absurd = limits_of(rows(reward=[0.5] * 7 + [1e30] + [0.0] * 7), reward_drop=0.9)
    assert absurd["reward_drop"].broken_by({"reward/mean": 0.0}), "one batch does not mute it"


def test_after_a_roll_back_the_reward_is_averaged_anew_and_old_responses_are_not_judged() -> None:
    past = rows(reward=[0.8] * 8 + [0.0] * 6, truncated=[0.0] * 14)
    assert "reward_drop" not in limits_of(past, reward_drop=0.5, rolled_back=14)
    gaps = {"logprob_gap": 1.0, "logprob_far": 0.2}
    quiet = limits_of(past, reward_drop=0.5, truncated=0.5, entropy=0.1, **gaps, quiet=True)
    assert list(quiet) == ["entropy"], "what is measured under the weights of now"


def test_a_limit_is_not_broken_at_its_bound_nor_by_what_was_not_measured() -> None:
    high, low = Limit("a", "x", 1.0), Limit("b", "x", 1.0, above=False)
    assert [limit.guard for limit in broken([high, low], {"x": 1.1})] == ["a"]
    assert [limit.guard for limit in broken([high, low], {"x": 0.9})] == ["b"]
    for metrics in ({"x": 1.0}, {"y": 5.0}, {"x": math.nan}):
        assert broken([high, low], metrics) == []
    assert not_finite({"loss/policy": math.nan, "grad_norm": math.inf}) == [
        "loss/policy",
        "grad_norm",
    ]
    assert not_finite({"loss/policy": 1e300}) == []


@pytest.mark.parametrize(
    ("actions", "non_finite", "expected"),
    [
        (LADDER, False, ["warn", "skip", "roll_back", "stop", "stop"]),
        (LADDER, True, ["skip", "roll_back", "stop", "stop", "stop"]),
        (["warn"], False, ["warn"] * 5),
        (["warn"], True, ["skip"] * 5),
        (["warn", "warn", "stop"], True, ["stop"] * 5),
        (["roll_back"], False, ["roll_back"] * 5),
    ],
)
def test_the_ladder(actions: list[Any], non_finite: bool, expected: list[str]) -> None:
    assert [guards.action_of(actions, earlier, non_finite) for earlier in range(5)] == expected


def verdict(step: int, action: Any = "warn") -> StepVerdict:
    return StepVerdict(step, action, [], step, step - 1)


def test_firings_count_within_the_window_and_behind_a_stop() -> None:
    some = [verdict(s) for s in (10, 40, 60)]
    assert guards.firings(some, 61) == [40, 60]
    assert guards.firings(some, 59) == [10, 40] and guards.firings(some, 60) == [40], (
        "50 steps back"
    )
    assert guards.firings([*some, verdict(50, "stop")], 61) == [60]


def record(metrics: dict[str, float], limits: list[Limit], updates: int = 2) -> BatchRecord:
    columns = {
        "loss_weight": [0.1, 0.1, 0.1, 0.0],
        "advantage": [1.0, -3.0, 2.0, 9.0],
        "trained": [5, 5, 5, 5],
        "reward": [0.5, 0.1, 0.9, 0.2],
    }
    return BatchRecord(
        first_step=5,
        updates=updates,
        attempt=1,
        cursor=4,
        weight_version="4.1.",
        sample_ids=["a", "b", "c", "d"],
        tokens=np.full(4, 7, np.int32),
        samples=[Block("f", 0, 1, "x")] * 4,
        details=[None] * 4,
        columns=sequence_columns(columns, 4),
        metrics=metrics,
        limits=limits,
        fired=[2, 4],
    )


def judge(of: BatchRecord, step: int, result: dict[str, float], **rest: Any) -> StepVerdict | None:
    given = {"earlier": 1, "checkpoint": 3, **rest}
    return guards.judge(LADDER, of, step, result, **given)  # type: ignore[arg-type]


def test_a_verdict_names_all_that_is_beyond_its_limits() -> None:
    of = record({"reward/mean": 0.1}, [Limit("grad_norm", "grad_norm", 2.0)])
    assert judge(of, 5, {"grad_norm": 2.0}) is None
    found = judge(of, 5, {"grad_norm": 3.0, "loss/policy": math.nan})
    assert found is not None
    assert [(f.guard, f.metric, f.bound) for f in found.findings] == [
        ("non_finite", "loss/policy", math.inf),
        ("grad_norm", "grad_norm", 2.0),
    ]
    assert found.action == "roll_back" and found.skipped == range(4, 6)
    assert judge(of, 5, {"grad_norm": 3.0}).skipped == range(5, 6)  # type: ignore[union-attr]
    warned = judge(of, 5, {"grad_norm": 3.0}, earlier=0)
    assert warned is not None and warned.action == "warn" and not warned.skipped


def test_what_was_decided_before_is_not_decided_again() -> None:
    of = record({}, [Limit("grad_norm", "grad_norm", 2.0)])
    assert judge(of, 5, {"grad_norm": 3.0}, settled=True) is None
    assert judge(of, 5, {"grad_norm": math.inf}, settled=True) is not None


def test_limits_of_a_batch_speak_once_for_all_its_steps() -> None:
    of = record({"reward/mean": 0.1}, [Limit("reward_drop", "reward/mean", 0.2, above=False)])
    found = judge(of, 5, {"grad_norm": 1.0})
    assert found is not None and found.skipped == range(5, 7)
    assert judge(of, 6, {"grad_norm": 1.0}) is None


def test_the_record_keeps_limits_and_firings(tmp_path: Any) -> None:
    of = record({}, [Limit("entropy", "policy/entropy", 0.5, above=False)])
    read = decode_record(tmp_path / "r", encode_record(of))
    assert (read.limits, read.fired) == (of.limits, of.fired)


@pytest.mark.parametrize(
    ("guard", "expected"),
    [
        ("grad_norm", ["b", "c", "a"]),  # |w A n|: 1.5, 1.0, 0.5; d has no weight
        ("reward_drop", ["b", "d", "a", "c"]),
        ("truncated", ["c", "a"]),
        ("reward_errors", ["d"]),
        ("logprob_gap", ["c", "b", "a"]),
    ],
)
def test_the_worst_samples_come_first(guard: str, expected: list[str]) -> None:
    prompt = made.prompt(0)
    logprobs = [[-1.0, -1.0], [-5.0, -1.0], [-1.0, -9.0, -1.0], [-20.0]]
    samples = [
        made.sample(
            prompt,
            i,
            len(values),
            rollout_logprobs=np.array(values, np.float32),
            finish_reason="length" if i in (0, 2) else "stop",
            reward_error="timeout: 10 s" if i == 3 else "",
        )
        for i, values in enumerate(logprobs)
    ]
    named = dict(zip((s.sample_id for s in samples), "abcd", strict=True))
    of = record({}, [])
    of = BatchRecord(**{**vars(of), "sample_ids": list(named)})
    assert [named[name] for name in guards.worst(guard, of, 5, samples)] == expected


def test_a_verdict_is_said_in_one_sentence() -> None:
    of = record({}, [Limit("grad_norm", "grad_norm", 2.0)])
    found = judge(of, 5, {"grad_norm": 3.0, "loss/policy": math.nan})
    assert found is not None
    assert guards.described(found, of) == (
        "guard fired in step 5 (batch of steps 5 to 6): non_finite: loss/policy is nan; grad_norm: grad_norm is 3, "
        "limit 2; roll_back: back to the weights of step 3; not taken: steps 4 to 5"
    )
    assert guards.keys_of(found) == "guards.actions or guards.grad_norm"
