"""Length reward (A2), zero variance and advantages (A1): worked numbers and properties."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agpo_megatron.algorithm.advantage import (
    is_zero_variance,
    length_advantage_covariance,
    step_advantages,
)
from agpo_megatron.algorithm.length_reward import (
    agpo_length_bonus,
    cosine_length_reward,
    dapo_overlong_penalty,
    kimi_length_reward,
)

fast = settings(max_examples=60, deadline=None)


def advantages(rewards, **settings):
    """Of one group."""
    return of_step([rewards], [[1] * len(rewards)], **settings)[0]


def of_step(rewards, counts=None, **settings):
    settings = {
        "estimator": "group_norm",
        "zero_variance": "zero",
        "correct": [[r >= 1.0 for r in g] for g in rewards],
        "varied": [not is_zero_variance(g) for g in rewards],
        **settings,
    }
    counts = [[1] * len(g) for g in rewards] if counts is None else counts
    return step_advantages(rewards, counts, **settings)


def near(values, abs=6e-7):
    """The worked numbers have six digits."""
    return pytest.approx(values, abs=abs)


# --- advantages ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw, expected",
    [
        (
            [1, 0, 0, 1, 0, 0, 0, 0],
            [1.620182, -0.540061, -0.540061, 1.620182] + [-0.540061] * 4,
        ),
        (
            [1, -1, -1, 1, -1, -1, -1, -1],
            [1.620183, -0.540061, -0.540061, 1.620183] + [-0.540061] * 4,
        ),
        ([1, 0, 0, 0], [1.499997, -0.499999, -0.499999, -0.499999]),
        ([1, 0.5, 0], [0.999998, 0, -0.999998]),
    ],
)
def test_mixed_group_is_normalised_with_the_unbiased_deviation(raw, expected):
    for zero_variance in ("zero", "constant"):
        assert advantages(raw, zero_variance=zero_variance) == near(expected)


@pytest.mark.parametrize(
    "raw, correct, constant",
    [
        ([1.0] * 4, [True] * 4, 1.0),
        ([0.0] * 4, [False] * 4, -1.0),
        ([-1.0] * 4, [False] * 4, -1.0),
        ([0.5] * 4, [False, True, False, True], 0.0),
        ([0.5] * 4, [True] * 4, 1.0),
        ([0.9] * 30, [True] * 30, 1.0),
        ([0.1 + 0.2, 0.3], [True] * 2, 1.0),
        ([1.0], [True], 1.0),
    ],
)
def test_zero_variance_group(raw, correct, constant):
    assert advantages(raw, correct=[correct]) == [0.0] * len(raw)
    v1 = advantages(raw, zero_variance="constant", correct=[correct])
    assert v1 == [constant] * len(raw)


def test_what_has_variance_is_said_by_the_caller():
    assert advantages([1.1, 1.0], varied=[False]) == [0.0, 0.0]
    assert advantages([1.1, 1.0], varied=[False], zero_variance="constant") == [1.0, 1.0]
    assert advantages([1.1, 1.0], varied=[True]) == near([0.707097, -0.707097])
    # Shaping that cancels all differences does not divide noise by epsilon.
    assert advantages([0.05] * 3, varied=[True]) == [0.0] * 3


@pytest.mark.parametrize("estimator", ["group_norm", "group_center", "rloo", "reinforce_pp"])
def test_an_advantage_that_is_rounding_is_0(estimator):
    """The mean of 0.1, 0.2 and 0.3 is not 0.2: the middle one would have |A| = 1e-16."""
    got = advantages([0.1, 0.2, 0.3], estimator=estimator)
    assert got[1] == 0.0 and got[0] < 0 < got[2]
    small = of_step([[0.1, 0.2, 0.3], [0.0, 1e-5, 1e-5]], estimator="group_center")
    assert all(small[1]), "small is not rounding"


@pytest.mark.parametrize(
    "rewards, expected",
    [
        ([0.9] * 30, True),
        ([0.1 + 0.2, 0.3], True),
        ([0.0, 1e-6], True),
        ([0.0, 2e-6], False),
        ([1.0, 0.5, 0.0], False),
        ([3.0], True),
    ],
)
def test_is_zero_variance(rewards, expected):
    assert is_zero_variance(rewards) is expected


def test_bad_rewards_are_refused():
    with pytest.raises(ValueError, match="without rewards"):
        is_zero_variance([])
    with pytest.raises(ValueError, match="not finite"):
        is_zero_variance([1.0, math.nan])
    with pytest.raises(ValueError, match="2 rewards and 1 token counts"):
        of_step([[1.0, 0.0]], [[1]])
    with pytest.raises(ValueError, match="not finite"):
        advantages([1.0, math.inf], varied=[True])


# --- the other estimators --------------------------------------------------------------------

MIXED = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "raw, settings, expected",
    [
        (MIXED, {"ddof": 0}, [1.732047, -0.577349, -0.577349, 1.732047] + [-0.577349] * 4),
        (MIXED, {"estimator": "group_center"}, [0.75, -0.25, -0.25, 0.75] + [-0.25] * 4),
        ([1, 0, 0, 1], {"estimator": "rloo"}, [0.666667, -0.666667, -0.666667, 0.666667]),
    ],
)
def test_worked_examples_of_other_estimators(raw, settings, expected):
    assert advantages(raw, **settings) == near(expected)


def test_constants_stand_beside_centred_groups():
    raw = [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    got = of_step(raw, estimator="group_center", zero_variance="constant")
    assert got == [[0.5, -0.5], [1.0, 1.0], [-1.0, -1.0]]


def test_batch_norm_counts_samples():
    raw = [[1.0, 0.0], [1.0, 1.0]]
    mean, deviation = 0.75, math.sqrt(0.75 / 3)  # squares add up to 3/16 x 4 = 0.75
    expected = [(r - mean) / (deviation + 1e-6) for r in (1.0, 0.0, 1.0, 1.0)]
    got = of_step(raw, estimator="batch_norm", counts=[[1, 9], [5, 2]])
    assert [a for group in got for a in group] == near(expected)


@pytest.mark.parametrize("baseline", [False, True])
def test_reinforce_pp_whitens_over_tokens(baseline):
    """As if every token carried the return of its response."""
    raw, counts = [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]], [[3, 1, 2], [4, 1, 1]]
    means = [sum(g) / 3 if baseline else 0.0 for g in raw]
    tokens = [
        r - m
        for g, c, m in zip(raw, counts, means, strict=True)
        for r, n in zip(g, c, strict=True)
        for _ in range(n)
    ]
    mean, deviation = statistics.mean(tokens), statistics.stdev(tokens)
    estimator = "reinforce_pp_baseline" if baseline else "reinforce_pp"
    got = of_step(raw, counts=counts, estimator=estimator)
    for group, m, values in zip(raw, means, got, strict=True):
        assert values == near([(r - m - mean) / (deviation + 1e-6) for r in group])


def test_zero_variance_groups_under_batch_estimators():
    """With a group baseline they say nothing; without one they say what their rewards say."""
    raw = [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    assert of_step(raw, estimator="reinforce_pp_baseline", counts=[[5, 1, 1]] * 2)[1] == [0.0] * 3
    assert all(a > 0 for a in of_step(raw, estimator="reinforce_pp")[1])
    assert all(a > 0 for a in of_step(raw, estimator="batch_norm")[1])


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="unknown advantage estimator 'gae'"):
        advantages([1.0, 0.0], estimator="gae")


ESTIMATORS = [
    "group_norm",
    "group_center",
    "rloo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "batch_norm",
]


@fast
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.integers(1, 9)), min_size=2, max_size=5),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(ESTIMATORS),
    st.data(),
)
def test_the_order_of_groups_and_samples_does_not_matter(groups, estimator, data):
    def values(some):
        raw = [[r for r, _ in g] for g in some]
        return of_step(raw, counts=[[n for _, n in g] for g in some], estimator=estimator)

    got = values(groups)
    order = data.draw(st.permutations(range(len(groups))))
    assert values([groups[i] for i in order]) == [got[i] for i in order]
    inside = data.draw(st.permutations(range(len(groups[0]))))
    moved = [[groups[0][i] for i in inside], *groups[1:]]
    assert values(moved) == [[got[0][i] for i in inside], *got[1:]]


def test_covariance():
    assert length_advantage_covariance([1, 3], [2.0, 6.0]) == 2.0  # population, not sample
    assert length_advantage_covariance([], []) == 0.0
    with pytest.raises(ValueError, match="1 lengths but 0 advantages"):
        length_advantage_covariance([1], [])


rewards = st.lists(st.sampled_from([-1.0, 0.0, 0.3, 0.5, 1.0]), min_size=2, max_size=16)


@fast
@given(rewards, st.data())
def test_advantages_are_centred_scaled_and_order_free(raw, data):
    bonus = data.draw(st.lists(st.floats(0, 0.1), min_size=len(raw), max_size=len(raw)))
    shaped = [r + b for r, b in zip(raw, bonus, strict=True)]
    mixed = [not is_zero_variance(raw)]
    got = advantages(shaped, varied=mixed)
    if not mixed[0]:
        assert got == [0.0] * len(raw)
        return
    assert math.fsum(got) == pytest.approx(0, abs=1e-9)
    assert statistics.stdev(got) == pytest.approx(1, abs=1e-4)  # epsilon takes a little
    order = data.draw(st.permutations(range(len(raw))))
    moved = advantages([shaped[i] for i in order], varied=mixed)
    assert moved == [got[i] for i in order]  # exactly


# --- length reward ---------------------------------------------------------------------------


def test_length_bonus_worked_example():
    correct, lengths = [1, 1, 1, 0, 0, 1], [100, 200, 400, 50, 900, 300]
    bonus = agpo_length_bonus(correct, lengths, 0.1)
    assert bonus == near([0.1, 0.066667, 0, 0, 0, 0.033333])
    signed = [2.0 * c - 1 for c in correct]
    totals = [r + b for r, b in zip(signed, bonus, strict=True)]
    assert totals == near([1.1, 1.066667, 1, -1, -1, 1.033333])
    assert advantages(totals) == near(
        [0.692385, 0.660913, 0.597969, -1.290354, -1.290354, 0.629441]
    )
    assert advantages(signed) == near([0.645497] * 3 + [-1.290993] * 2 + [0.645497])
    raw = [float(c) for c in correct]
    assert advantages([r + b for r, b in zip(raw, bonus, strict=True)]) == near(
        [0.73632, 0.67496, 0.55224, -1.288559, -1.288559, 0.6136]
    )


@pytest.mark.parametrize(
    "correct, lengths",
    [
        ([1, 1, 1], [10, 20, 30]),  # all right: not mixed
        ([0, 0, 0], [10, 20, 30]),  # none right
        ([1, 0, 0], [10, 20, 30]),  # a single one ties with itself
        ([1, 1, 0], [20, 20, 5]),  # a tie
        ([], []),
    ],
)
def test_no_length_bonus(correct, lengths):
    assert agpo_length_bonus(correct, lengths, 0.1) == [0.0] * len(correct)


def test_other_groups_and_ties():
    assert agpo_length_bonus([1, 1, 1], [10, 20, 30], 0.1, groups="all") == near([0.1, 0.05, 0])
    assert agpo_length_bonus([1, 0, 0], [10, 20, 30], 0.1, tie="full") == [0.1, 0, 0]
    assert agpo_length_bonus([1, 1], [10, 10], 0.1, groups="all", tie="full") == [0.1, 0.1]
    assert agpo_length_bonus([0, 0], [10, 10], 0.1, groups="all", tie="full") == [0, 0]


def test_kimi_worked_example():
    lengths = [100, 200, 300, 400, 500]
    got = kimi_length_reward([1, 0, 1, 0, 1], lengths, 1.0)
    assert got == near([0.5, 0, 0, -0.25, -0.5])
    assert kimi_length_reward([1, 0], [7, 7], 1.0) == [0, 0]


def test_dapo_overlong_worked_example():
    lengths = [16384, 16385, 18432, 20480, 20481]
    got = dapo_overlong_penalty(lengths, 1.0, 20480, 4096)
    assert got == near([0, -0.000244, -0.5, -1, -1])
    with pytest.raises(ValueError, match="buffer 5 must lie between 1 and max_length 4"):
        dapo_overlong_penalty([1], 1.0, 4, 5)


def test_cosine_rewards_short_answers_that_are_right():
    got = cosine_length_reward([1, 1, 1, 0, 0, 1], [0, 50, 100, 0, 50, 75], 0.2, 100)
    quarter = 0.1 * (1 - math.sqrt(0.5))
    assert got == near([0.2, 0.1, -0.2, -0.2, -0.1, quarter])


def test_length_bonus_refuses_unequal_lists():
    with pytest.raises(ValueError, match="2 verdicts but 1 lengths"):
        agpo_length_bonus([True, False], [3], 0.1)


responses = st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=12)


@fast
@given(responses, st.floats(0, 2), st.data())
def test_length_bonus_properties(group, weight, data):
    correct, lengths = [c for c, _ in group], [n for _, n in group]
    bonus = agpo_length_bonus(correct, lengths, weight)
    assert all(0 <= b <= weight for b in bonus)
    assert all(b == 0 for c, b in zip(correct, bonus, strict=True) if not c)
    ranked = sorted((n, -b) for c, n, b in zip(correct, lengths, bonus, strict=True) if c)
    assert [b for _, b in ranked] == sorted(b for _, b in ranked)  # longer never earns more
    if 0 < sum(correct) < len(correct) and ranked[0][0] < ranked[-1][0]:
        assert -ranked[0][1] == weight and ranked[-1][1] == 0  # both ends are reached
    else:
        assert not any(bonus)
    order = data.draw(st.permutations(range(len(group))))
    moved = agpo_length_bonus([correct[i] for i in order], [lengths[i] for i in order], weight)
    assert moved == [bonus[i] for i in order]
