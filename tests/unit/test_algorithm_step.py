"""From groups to the decisions about a batch: values, not shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import made
import numpy as np
import pytest

from agpo_megatron.algorithm.gate import gate_of, on_policy_parts
from agpo_megatron.algorithm.settings import AlgorithmSettings, LossSettings
from agpo_megatron.algorithm.step import (
    Decision,
    Scores,
    StepRequest,
    decide,
    drops_groups,
    has_variance,
    staleness,
)
from agpo_megatron.samples import Floats, Group, TrainSequence, VersionSpan


def group(position: int, accuracies: list[float], lengths: list[int]) -> Group:
    of = made.prompt(position)
    samples = [
        made.sample(of, i, n, raw_reward=a, correct=a > 0.5)
        for i, (a, n) in enumerate(zip(accuracies, lengths, strict=True))
    ]
    return Group(of, samples)


def step(groups: list[Group], preset: str, **changes: Any) -> Decision:
    request = {
        "algorithm": algorithm(preset, {}),
        "first_step": 1,
        "updates": 1,
        "seed": 0,
        "max_response_tokens": 1000,
        **changes,
    }
    return decide(groups, StepRequest(**request))


def algorithm(preset: str, section: dict[str, Any]) -> AlgorithmSettings:
    return AlgorithmSettings.model_validate({"preset": preset, **section})


def on_policy(decided: Decision) -> float:
    columns = [decided.columns[n] for n in ("loss_weight", "trained", "advantage")]
    return -sum(w * n * a for w, n, a in zip(*columns, strict=True))


# rewards [[1,0],[1,1],[0,1]], lengths [[2,6],[5,3],[1,3]]
E4 = [group(0, [1, 0], [2, 6]), group(1, [1, 1], [5, 3]), group(2, [0, 1], [1, 3])]


def test_the_loss_mask_leaves_numerator_and_denominator() -> None:
    record = step(E4, "agpo_v3")
    assert on_policy(record) == pytest.approx(0.117851, abs=1e-6)
    assert list(record.columns["trained"]) == [2, 6, 0, 0, 1, 3]
    assert record.columns["loss_weight"][2] == 0
    assert record.metrics["mask/kept_tokens"] == 12
    assert record.metrics["mask/kept_groups"] == 2
    assert record.metrics["tokens/skipped"] == (5 + 2) + (3 + 2)


def test_grpo_keeps_the_whole_denominator() -> None:
    record = step(E4, "grpo")
    assert on_policy(record) == pytest.approx(0.070711, abs=1e-6)
    assert record.metrics["mask/kept_tokens"] == 20


def test_v1_gives_homogeneous_groups_a_signal() -> None:
    record = step(E4, "agpo_v1")
    assert list(record.columns["advantage"][2:4]) == [1.0, 1.0]
    assert record.columns["loss_weight"][2] > 0


def test_length_reward_acts_in_mixed_groups_and_is_reported() -> None:
    record = step([group(0, [1, 1, 1, 0, 0, 1], [100, 200, 400, 50, 900, 300])], "agpo")
    assert [round(r, 6) for r in record.columns["reward"]] == [
        1.1,
        1.066667,
        1.0,
        0.0,
        0.0,
        1.033333,
    ]
    assert record.columns["advantage"][0] == pytest.approx(0.73632, abs=1e-5)
    assert record.metrics["reward/accuracy"] == pytest.approx(4 / 6)
    assert record.metrics["reward/length"] == pytest.approx(0.2 / 6)
    assert record.metrics["response/tokens_correct_mean"] == 250
    assert step(E4[1:2] + E4[:1], "agpo").metrics["group/all_correct_frac"] == 0.5


ALL_RIGHT = [group(0, [1, 1], [100, 300])]
OVERLONG = {"kind": "dapo_overlong", "weight": 1.0, "buffer": 900}


@pytest.mark.parametrize(
    ("length", "acts"),
    [
        ({"kind": "none"}, False),
        ({"kind": "agpo"}, False),
        ({"kind": "agpo", "groups": "all"}, True),
        ({"kind": "kimi"}, True),
        ({"kind": "cosine"}, True),
        (OVERLONG, True),
        ({"kind": "kimi", "weight": 0.0}, False),
    ],
)
@pytest.mark.parametrize("preset", ["grpo", "agpo_v3", "agpo_v1", "dapo"])
def test_length_terms_act_in_uniform_groups_if_they_are_meant_to(
    length: dict[str, Any], acts: bool, preset: str
) -> None:
    """Advantages, the loss mask and the constants see the same groups."""
    how = algorithm(preset, {"length_reward": {"weight": 0.1, **length}})
    record = step(ALL_RIGHT, preset, algorithm=how)
    shorter, longer = record.columns["advantage"]
    if acts:
        assert (shorter, longer) == pytest.approx((0.5**0.5, -(0.5**0.5)), abs=1e-4)
    else:
        assert shorter == longer == (1.0 if preset == "agpo_v1" else 0.0)
    masked = preset == "agpo_v3" and not acts
    assert list(record.columns["trained"]) == ([0, 0] if masked else [100, 300])
    assert record.metrics["group/zero_variance_frac"] == float(not acts)
    assert drops_groups(how) == (preset == "agpo_v3" and not acts)
    assert not has_variance(ALL_RIGHT[0]), "dynamic sampling looks at raw rewards"


def test_the_length_reward_of_mixed_groups_brings_no_uniform_group_back() -> None:
    """One verdict differs though the rewards agree: the bonus is paid, and there is still no variance."""
    equal = group(0, [0.6, 0.6, 0.6], [10, 20, 30])
    equal.samples[2] = replace(equal.samples[2], correct=False)
    record = step([equal], "agpo")
    assert list(record.columns["reward"]) == pytest.approx([0.7, 0.6, 0.6])
    assert list(record.columns["advantage"]) == [0, 0, 0]
    assert list(record.columns["trained"]) == [0, 0, 0]


def test_a_member_at_the_mean_weighs_in_the_parts_of_a_bound_that_is_not_0() -> None:
    """Rewards 2, 1, 0 and lengths 2, 6, 3: L = 1/11, and a single group is the whole step: both scopes agree."""
    groups = [group(0, [2, 1, 0], [2, 6, 3])]
    gains = {}
    for scope in ("batch", "group"):
        clip = {"kind": "max0", "min": 0.1, "scope": scope}
        how = algorithm("grpo", {"loss": {"clip": clip}})
        columns = step(groups, "grpo", algorithm=how).columns
        sequences = [
            TrainSequence(
                s.sample_id,
                s.prompt_tokens,
                s.response_tokens,
                s.loss_mask,
                {"loss_weight": columns["loss_weight"][i], "advantage": columns["advantage"][i]},
            )
            for i, s in enumerate(groups[0].samples)
        ]
        gate = gate_of(how.loss, [on_policy_parts(sequences)])
        assert gate.loss == pytest.approx(1 / 11, abs=1e-6)
        gains[scope] = set(gate.gains.values())
    assert gains == {"batch": {0.0}, "group": {0.0}}


def test_the_covariance_is_of_trained_tokens() -> None:
    """The right answer is the longer response, but most of it the environment wrote."""
    of, (right, wrong) = E4[0].prompt, group(0, [1, 0], [9, 5]).samples
    mask = np.array([1, 1, *[0] * 7], np.uint8)
    record = step([Group(of, [replace(right, loss_mask=mask), wrong])], "grpo")
    assert record.metrics["group/cov_length_advantage"] == pytest.approx(-1.5 * 0.5**0.5, abs=1e-5)
    tokens = sum(record.columns["trained"])
    assert on_policy(record) == pytest.approx(3 * 0.5**0.5 / tokens, abs=1e-5), "eq. 1c"


def test_the_authors_mask_drops_a_member_at_the_mean_whatever_the_rounding() -> None:
    thirds = [group(0, [0.1, 0.2, 0.3], [2, 2, 2])]
    assert list(step(thirds, "agpo_v3_authors").columns["trained"]) == [2, 0, 2]
    assert list(step(thirds, "agpo_v3").columns["trained"]) == [2, 2, 2]


def test_an_all_masked_step_has_no_weight_and_no_nan() -> None:
    record = step([group(0, [1, 1], [3, 4]), group(1, [0, 0], [3, 4])], "agpo")
    assert not any(record.columns["loss_weight"])
    assert record.metrics["group/zero_variance_frac"] == 1.0
    assert record.metrics["group/all_wrong_frac"] == 0.5
    assert all(v == v for v in record.metrics.values())


def test_the_authors_mask_drops_samples_at_the_mean() -> None:
    """Rewards 1, 0.. cannot sit at the mean; a length bonus can put one there."""
    groups = [group(0, [1, 0], [2, 2]), group(1, [1, 1], [3, 3])]
    for preset in ("agpo_v3", "agpo_v3_authors"):
        record = step(groups, preset)
        assert list(record.columns["trained"]) == [2, 2, 0, 0]


def test_truncated_responses_can_be_masked() -> None:
    whole = group(0, [1, 0], [4, 6])
    cut = replace(whole.samples[1], finish_reason="length")
    groups = [Group(whole.prompt, [whole.samples[0], cut])]
    for denominators, weight in (("exclude", 1 / 4), ("keep", 1 / 10)):
        section = {"loss": {"mask": {"truncated": True, "denominators": denominators}}}
        record = step(groups, "grpo", algorithm=algorithm("grpo", section))
        assert list(record.columns["trained"]) == [4, 0]
        assert record.columns["loss_weight"][0] == pytest.approx(weight)
        assert record.columns["advantage"][1] < 0 == record.columns["loss_weight"][1]


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
    assert record.columns["loss_weight"][0] == pytest.approx(expected)


def test_length_rewards_of_other_papers() -> None:
    five = [group(0, [1, 0, 1, 0, 1], [100, 200, 300, 400, 500])]
    kimi = algorithm("grpo", {"length_reward": {"kind": "kimi", "weight": 1.0}})
    record = step(five, "grpo", algorithm=kimi)
    assert list(record.columns["reward"]) == pytest.approx([1.5, 0, 1, -0.25, 0.5])
    overlong = step(five, "dapo", max_response_tokens=500)  # buffer: a fifth
    assert list(overlong.columns["reward"]) == pytest.approx([1, 0, 1, 0, 0])
    assert overlong.metrics["reward/accuracy"] == 0.6, "accuracy stays raw"
    cosine = algorithm("grpo", {"length_reward": {"kind": "cosine", "weight": 1.0}})
    got = step(five, "grpo", algorithm=cosine, max_response_tokens=600).columns["reward"]
    assert got[2] == pytest.approx(1.5) and got[0] > got[4] > 1


def logprobs(value: float, count: int) -> Floats:
    return np.full(count, value, np.float32)


SCORES = Scores(
    old={"g000000000.0": logprobs(-0.5, 2), "g000000000.1": logprobs(2.0, 6)},
    ref={"g000000000.0": logprobs(-1.5, 2), "g000000000.1": logprobs(-1.0, 6)},
    entropy=0.4,
)
"""For E4's first group, whose rollout log-probs are -1: q = e^0.5 and e^3; k1 sums 2 x 1.0 and 6 x 3."""


@pytest.mark.parametrize(("denominators", "weight"), [("exclude", 1 / 2), ("keep", 1 / 8)])
def test_rollout_correction_and_its_denominators(denominators: str, weight: float) -> None:
    section = {"loss": {"correction": {"kind": "mis", "denominators": denominators}}}
    record = step(E4[:1], "grpo", algorithm=algorithm("grpo", section), scores=SCORES)
    assert list(record.columns["trained"]) == [2, 0]
    assert record.columns["correction"][0] == pytest.approx([2.718281828**0.5] * 2)
    assert record.columns["correction"][1].tolist() == [0.0] * 6
    assert record.columns["loss_weight"][0] == pytest.approx(weight)
    assert not record.columns["trained"][1]
    assert record.columns["old_logprobs"][0].tolist() == [-0.5, -0.5]
    assert record.metrics["correction/dropped_frac"] == 0.75
    assert record.metrics["correction/mean"] == pytest.approx(2 * 2.718281828**0.5 / 8)


def test_the_correction_that_the_loss_computes_is_not_decided_here() -> None:
    tis: dict[str, Any] = {"loss": {"correction": {"kind": "tis"}}}
    record = step(E4[:1], "grpo", algorithm=algorithm("grpo", tis))
    assert list(record.columns["trained"]) == [2, 6] and "correction" not in record.columns
    assert "correction/mean" not in record.metrics
    tis["loss"]["kl"] = {"coef": 0.01, "place": "reward", "estimator": "k1"}  # which is scored
    scored = step(E4[:1], "grpo", algorithm=algorithm("grpo", tis), scores=SCORES)
    assert scored.columns["correction"][0] == pytest.approx([2.718281828**0.5] * 2)
    assert scored.columns["correction"][1].tolist() == [2.0] * 6
    assert scored.metrics["correction/mean"] == pytest.approx((2 * 2.718281828**0.5 + 12) / 8)


def test_correction_metrics_leave_out_what_the_environment_wrote() -> None:
    first, second = E4[0].samples
    half = replace(second, loss_mask=np.array([1, 1, 0, 0, 0, 0], np.uint8))
    mis = algorithm("grpo", {"loss": {"correction": {"kind": "mis"}}})
    record = step([Group(E4[0].prompt, [first, half])], "grpo", algorithm=mis, scores=SCORES)
    assert record.metrics["correction/dropped_frac"] == 0.5  # 2 of 4 tokens, not 6 of 8
    assert record.metrics["correction/mean"] == pytest.approx(2.718281828**0.5 / 2)


def test_what_the_mask_drops_is_not_scored() -> None:
    """And its missing scores change nothing; a sample that trains must have them."""
    mis = {"loss": {"correction": {"kind": "mis"}, "kl": {"coef": 0.1}}}
    masked = algorithm("agpo_v3", mis)
    assert drops_groups(masked)
    for other in (
        algorithm("grpo", mis),
        algorithm("agpo_v3_authors", mis),
        algorithm("agpo_v3", {"loss": {"mask": {"denominators": "keep"}}}),
        algorithm("agpo_v3", {"loss": {"kl": {"coef": 0.1, "place": "reward"}}}),
    ):
        assert not drops_groups(other)
    alone = step(E4[:1], "agpo_v3", algorithm=masked, scores=SCORES)
    beside = step(E4[:2], "agpo_v3", algorithm=masked, scores=SCORES)
    assert list(beside.columns["loss_weight"]) == [*alone.columns["loss_weight"], 0, 0]
    assert beside.columns["correction"][2] is None
    with pytest.raises(KeyError):
        step(E4, "agpo_v3", algorithm=masked, scores=SCORES)


def test_kl_in_the_reward_moves_rewards_and_with_them_uniform_groups() -> None:
    section = {"loss": {"kl": {"coef": 0.01, "place": "reward", "estimator": "k1"}}}
    how = algorithm("grpo", section)
    record = step(E4[:1], "grpo", algorithm=how, scores=SCORES)
    assert list(record.columns["reward"]) == pytest.approx([1 - 0.02, 0 - 0.18])
    same = group(0, [1, 1], [2, 6])
    uniform = step([same], "grpo", algorithm=how, scores=SCORES)
    assert list(uniform.columns["reward"]) == pytest.approx([1 - 0.02, 1 - 0.18])
    assert list(uniform.columns["advantage"]) == pytest.approx([0.5**0.5, -(0.5**0.5)], abs=1e-5)
    assert uniform.metrics["group/zero_variance_frac"] == 0.0


def test_a_term_beside_the_policy_loss_keeps_uniform_groups_in_training() -> None:
    plain = step(E4, "grpo")
    assert not plain.columns["loss_weight"][2]
    kl = algorithm("grpo", {"loss": {"kl": {"coef": 0.1}}})
    assert step(E4, "grpo", algorithm=kl).columns["loss_weight"][2]
    masked = algorithm("agpo_v3", {"loss": {"kl": {"coef": 0.1}}})
    assert not step(E4, "agpo_v3", algorithm=masked).columns["loss_weight"][2], (
        "the mask still drops them"
    )


def test_the_entropy_coefficient_is_journaled_and_carried() -> None:
    section = {"loss": {"entropy": {"coef": 0.01, "target": 0.5}}}
    how = algorithm("grpo", section)
    low = step(E4[:1], "grpo", algorithm=how, scores=SCORES, entropy_state=0.02)
    assert (low.entropy_coef, low.entropy_state) == pytest.approx((0.025, 0.025))
    assert low.metrics["loss/entropy_coef"] == pytest.approx(0.025)
    high = replace(SCORES, entropy=0.9)
    rest = step(E4[:1], "grpo", algorithm=how, scores=high, entropy_state=0.02)
    assert (rest.entropy_coef, rest.entropy_state) == pytest.approx((0.0, 0.015))
    unknown = replace(SCORES, entropy=None)  # every group was masked
    rest = step(E4[:1], "grpo", algorithm=how, scores=unknown, entropy_state=0.02)
    assert (rest.entropy_coef, rest.entropy_state) == (0.0, 0.02)
    fixed = algorithm("grpo", {"loss": {"entropy": {"coef": 0.01}}})
    assert step(E4, "grpo", algorithm=fixed).entropy_coef == 0.01
    assert step(E4, "grpo").entropy_coef == 0.0


def test_what_dynamic_sampling_replaced_is_reported() -> None:
    record = step([E4[0], E4[2]], "dapo", discarded=1)
    assert record.metrics["sampling/discarded_groups"] == 1
    assert "sampling/discarded_groups" not in step(E4, "agpo").metrics


def test_staleness_counts_optimizer_steps_per_token() -> None:
    sample = group(0, [1, 0], [4, 4]).samples[0]
    mixed = replace(sample, versions=(VersionSpan("3.1.a", 0, 1), VersionSpan("5.2.b", 1, 4)))
    assert staleness(mixed, 5) == pytest.approx(2 / 4)
    fresh = group(1, [1, 0], [4, 4])
    fresh.samples[:] = [replace(s, versions=(VersionSpan("5.2.b", 0, 4),)) for s in fresh.samples]
    old = replace(sample, index=1, versions=(VersionSpan("1.1.a", 0, 4),))
    both = [Group(made.prompt(0), [mixed, old]), fresh]
    record = step(both, "grpo", first_step=6)
    assert list(record.columns["staleness"]) == [0.5, 4, 0, 0]
    assert record.metrics["rollout/staleness_mean"] == pytest.approx(4.5 / 4)
    assert record.metrics["rollout/staleness_max"] == 4
    worked = replace(sample, versions=())
    assert staleness(worked, 5) == 0


def test_a_batch_of_several_updates_is_divided_into_parts_with_weights_of_their_own() -> None:
    groups = [group(p, [1, 0], [p + 1, 2 * p + 3]) for p in range(8)]
    whole, four = step(groups, "grpo"), step(groups, "grpo", updates=4)
    parts = list(four.columns["update"])
    assert parts[::2] == parts[1::2], "groups stay whole"
    assert [parts.count(part) for part in range(4)] == [4] * 4
    assert parts != sorted(parts), "groups are shuffled"
    for part in range(4):
        mine = [i for i, p in enumerate(parts) if p == part]
        tokens = sum(four.columns["trained"][i] for i in mine)
        assert [four.columns["loss_weight"][i] for i in mine] == pytest.approx([1 / tokens] * 4)
    assert four.columns["advantage"] == whole.columns["advantage"], "they compare the whole batch"
    assert step(groups, "grpo", updates=4).columns["update"] == parts
    for other in ({"seed": 1}, {"first_step": 5}):
        assert list(step(groups, "grpo", updates=4, **other).columns["update"]) != parts


def test_every_update_has_its_share_of_the_groups_that_train() -> None:
    """Half of the groups have no variance: a plain cut would leave some updates with nothing."""
    groups = [group(p, [1, p % 2], [3, 4]) for p in range(8)]
    for seed in range(5):
        columns = step(groups, "agpo", updates=4, seed=seed).columns
        trains = [u for u, w in zip(columns["update"], columns["loss_weight"], strict=True) if w]
        assert sorted(trains) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_what_a_batch_must_know_of_the_trainer() -> None:
    """(log-probs under its first weights, under the reference)."""
    several = LossSettings()
    assert several.scored_weights(1) == (False, False)
    assert several.scored_weights(4) == (True, False)
    assert LossSettings(old_logprobs="rollout").scored_weights(4) == (False, False)
    token = LossSettings.model_validate({"correction": {"kind": "tis"}})
    assert token.scored_weights(1) == (False, False), "the loss computes it"
    assert token.scored_weights(2) == (True, False)
    for other in (
        {"correction": {"kind": "tis", "level": "sequence"}},
        {"correction": {"kind": "mis"}},
        {"correction": {"kind": "icepop"}},
        {"correction": {"kind": "tis"}, "entropy": {"target": 0.5}},
    ):
        assert LossSettings.model_validate(other).scored_weights(1) == (True, False)
    kl = {"loss": {"kl": {"coef": 0.1, "place": "reward"}}}
    assert algorithm("grpo", kl).loss.scored_weights(1) == (True, True)
    assert algorithm("grpo", {"loss": {"kl": {"coef": 0.1}}}).loss.scored_weights(1) == (
        False,
        True,
    )


def test_partial_credit_is_trained_on_as_it_is() -> None:
    """Nobody is right, yet the rewards differ: the group varies, and the advantages are those of the real numbers."""
    record = step([group(0, [0.1, 0.4], [2, 2]), group(1, [0.2, 0.2], [2, 2])], "grpo")
    assert list(record.columns["reward"]) == [0.1, 0.4, 0.2, 0.2]
    assert list(record.columns["advantage"]) == pytest.approx(
        [-(0.5**0.5), 0.5**0.5, 0, 0], abs=1e-5
    )
    metrics = record.metrics
    assert (metrics["reward/accuracy"], metrics["group/all_wrong_frac"]) == (0.0, 1.0)
    assert (metrics["reward/mean"], metrics["group/zero_variance_frac"]) == (
        pytest.approx(0.225),
        0.5,
    )


def test_parts_errors_and_sources_are_metrics() -> None:
    one, two = group(0, [1, 0], [2, 2]), group(1, [1, 1], [2, 2])
    first = [
        replace(one.samples[0], reward_parts={"near": 0.5}),
        replace(one.samples[1], reward_error="timeout: no verdict in 1 s"),
    ]
    groups = [
        Group(replace(one.prompt, source="a"), first),
        Group(replace(two.prompt, source="b"), two.samples),
    ]
    metrics = step(groups, "grpo").metrics
    assert metrics["reward_part/near"] == 0.5
    assert metrics["reward_error/timeout"] == metrics["reward/error_frac"] == 0.25
    assert (metrics["source_accuracy/a"], metrics["source_accuracy/b"]) == (0.5, 1.0)
