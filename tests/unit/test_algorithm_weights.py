"""Aggregation weights (A3), the on-policy loss (1c), phi and its scopes (A4, 1d, 1e): worked numbers and properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import sequence

from agpo_megatron.algorithm.advantage import (
    is_zero_variance,
    length_advantage_covariance,
    step_advantages,
)
from agpo_megatron.algorithm.aggregation import sequence_weights
from agpo_megatron.algorithm.gate import Adaptive, on_policy_parts

MODES = ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"]
fast = settings(max_examples=60, deadline=None)
CLIP = Adaptive("max0")


def advantages(groups, zero_variance="zero"):
    got = step_advantages(
        groups,
        [[1] * len(g) for g in groups],
        [not is_zero_variance(g) for g in groups],
        estimator="group_norm",
        zero_variance=zero_variance,
        correct=[[r >= 1.0 for r in g] for g in groups],
    )
    return [a for group in got for a in group]


def plain(lengths, mode="token_mean"):
    return sequence_weights(lengths, lengths, mode, 8)


def on_policy_loss(weights, trained, advantages):
    """L of eq. 1c, the argument of the gate: of sequences of one group."""
    work = [
        sequence(f"g0.{i}", [1] * (n + 1), w, [0] + [1] * n, a)
        for i, (w, n, a) in enumerate(zip(weights, trained, advantages, strict=True))
    ]
    return on_policy_parts(work)["g0"].loss


def test_loss_mask_worked_example():
    groups, lengths = [[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], [2, 6, 5, 3, 1, 3]
    a = advantages(groups)
    assert a == pytest.approx([0.707106, -0.707106, 0, 0, -0.707106, 0.707106], abs=6e-7)
    kept = [not is_zero_variance(raw) for raw in groups for _ in raw]
    trained = [n if k else 0 for n, k in zip(lengths, kept, strict=True)]
    assert sum(trained) == 12
    expected = {
        "token_mean": (0.070711, 0.117851),
        "seq_mean_token_mean": (0, 0),
        "seq_mean_token_sum": (0.235702, 0.353553),
        "seq_mean_token_sum_norm": (0.029463, 0.044194),
    }
    for mode, values in expected.items():
        for counted, value in zip((lengths, trained), values, strict=True):  # keep, exclude
            w = sequence_weights(trained, counted, mode, 8)
            assert on_policy_loss(w, trained, a) == pytest.approx(value, abs=6e-7), mode
    # v1 on the same batch: the all-right group pushes the loss below zero.
    v1 = on_policy_loss(plain(lengths), lengths, advantages(groups, "constant"))
    assert v1 == pytest.approx(-0.329289, abs=6e-7)


def test_weights_of_a_whole_step_are_split_invariant():
    """Two ranks with two micro-batches each; a mean of their means would be another number."""
    lengths, losses = [2, 4, 3, 8, 1, 6], [1.0, -0.5, 0.2, 0.3, -1.0, 0.1]

    def total(w, part):
        return sum(w[i] * lengths[i] * losses[i] for i in part)

    for mode, value in zip(MODES, [0.108333, 0.016667, 0.433333, 0.054167], strict=True):
        w = plain(lengths, mode)
        assert total(w, range(6)) == pytest.approx(value, abs=6e-7), mode
        shards = [total(w, part) for part in ((0, 1), (2,), (3,), (4, 5))]
        assert sum(shards) == pytest.approx(value, abs=6e-7)
    ranks = [total(plain(lengths), part) * 2 for part in ((0, 1), (2,), (3,), (4, 5))]
    assert ranks == pytest.approx([0, 0.05, 0.2, -0.033333], abs=6e-7)  # as a mean over 2 ranks
    # verl's variant of the norm does not divide by the sequences
    assert total(plain(lengths, MODES[3]), range(6)) * 6 == pytest.approx(0.325, abs=6e-7)


def test_weights_follow_the_counts():
    assert sequence_weights([2, 0, 3], [2, 0, 3], "token_mean") == [0.2, 0, 0.2]
    assert sequence_weights([2, 0, 3], [2, 0, 3], "seq_mean_token_mean") == [0.25, 0, 1 / 6]
    assert sequence_weights([2, 0, 0], [2, 0, 3], "token_mean") == [0.2, 0, 0]
    assert sequence_weights([1, 0, 3], [2, 0, 3], "seq_mean_token_mean") == [0.25, 0, 1 / 6]


@pytest.mark.parametrize("mode", MODES)
def test_nothing_left_gives_zero_weights(mode):
    for trained, counted in (([0, 0], [0, 0]), ([0, 0], [2, 1]), ([], [])):
        assert sequence_weights(trained, counted, mode, 8) == [0.0] * len(trained)


def test_refusals():
    with pytest.raises(ValueError, match="1 trained counts but 2 counted"):
        sequence_weights([1], [1, 1], "token_mean")
    with pytest.raises(ValueError, match="sequence 1 trains 3 tokens, of which 2 are counted"):
        sequence_weights([1, 3], [1, 2], "token_mean")
    for bad in (None, 0):
        with pytest.raises(ValueError, match="norm_length must be a positive number"):
            sequence_weights([1], [1], "seq_mean_token_sum_norm", bad)
    with pytest.raises(ValueError, match="unknown aggregation mode 'mean'"):
        sequence_weights([1], [1], "mean")


@fast
@given(
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=8),
    st.sampled_from(MODES),
    st.booleans(),
    st.data(),
)
def test_properties_of_the_weights(batch, mode, exclude, data):
    lengths = [n for n, _ in batch]
    trained = [n if kept else 0 for n, kept in batch]
    counted = trained if exclude else lengths
    w = sequence_weights(trained, counted, mode, 5)
    assert [x > 0 for x in w] == [n > 0 for n in trained]
    order = data.draw(st.permutations(range(len(batch))))
    moved = sequence_weights([trained[i] for i in order], [counted[i] for i in order], mode, 5)
    assert moved == [w[i] for i in order]
    if not sum(trained):
        return
    sums = {
        "token_mean": sum(trained) / sum(counted),
        "seq_mean_token_mean": sum(n > 0 for n in trained) / sum(d > 0 for d in counted),
        "seq_mean_token_sum": sum(trained) / sum(d > 0 for d in counted),
        "seq_mean_token_sum_norm": sum(trained) / sum(d > 0 for d in counted) / 5,
    }
    assert math.fsum(x * n for x, n in zip(w, trained, strict=True)) == pytest.approx(sums[mode])
    if exclude:  # as if the dropped sequences had never been there
        rest = [n for n in trained if n]
        assert [x for x in w if x] == sequence_weights(rest, rest, mode, 5)


# --- phi -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lengths, value, gate", [([100, 300], 0.5, 1), ([300, 100], -0.5, 0), ([200, 200], 0, 0)]
)
def test_loss_clip_worked_example(lengths, value, gate):
    loss = on_policy_loss(plain(lengths), lengths, [1.0, -1.0])
    assert loss == pytest.approx(value, abs=1e-12)
    assert CLIP.gain(loss) == gate
    assert CLIP.value(loss) == max(loss, 0.0)
    assert Adaptive("max0", minimum=-1.0).gain(loss) == 1


def test_a_tie():
    for tie, gain in (("zero", 0.0), ("half", 0.5), ("full", 1.0)):
        clip = Adaptive("max0", minimum=-0.25, tie=tie)
        assert [clip.gain(x) for x in (-0.3, -0.25, -0.2)] == [0.0, gain, 1.0]
        assert clip.value(-0.25) == -0.25


@pytest.mark.parametrize(
    "kind, tau, loss, value, gain",
    [
        ("exp", 1, -1, 0.367879, 0.367879),
        ("elu", 1, -1, 0.367879, 0.367879),
        ("softplus", 1, -1, 0.313262, 0.268941),
        ("exp", 1, -0.5, 0.606531, 0.606531),
        ("elu", 1, -0.5, 0.606531, 0.606531),
        ("softplus", 1, -0.5, 0.474077, 0.377541),
        ("exp", 1, 0, 1, 1),
        ("elu", 1, 0, 1, 1),
        ("softplus", 1, 0, 0.693147, 0.5),
        ("exp", 1, 0.5, 1.648721, 1.648721),
        ("elu", 1, 0.5, 1.5, 1),
        ("softplus", 1, 0.5, 0.974077, 0.622459),
        ("exp", 1, 1, 2.718282, 2.718282),
        ("elu", 1, 1, 2, 1),
        ("softplus", 1, 1, 1.313262, 0.731059),
        ("exp", 0.5, -0.5, 0.183940, 0.367879),
        ("exp", 0.5, 0.5, 1.359141, 2.718282),
        ("none", 1, -0.7, -0.7, 1),
    ],
)
def test_phi_worked_examples(kind, tau, loss, value, gain):
    phi = Adaptive(kind, tau=tau)
    assert phi.value(loss) == pytest.approx(value, abs=6e-7)
    assert phi.gain(loss) == pytest.approx(gain, abs=6e-7)


@fast
@given(
    st.sampled_from(["none", "max0", "exp", "elu", "softplus"]),
    st.floats(-8, 8),
    st.sampled_from([0.5, 1.0, 2.0]),
)
def test_the_gain_is_the_derivative_of_a_non_negative_value(kind, loss, tau):
    phi = Adaptive(kind, tau=tau)
    if kind in ("max0", "elu") and abs(loss) < 1e-4:
        return
    step = 1e-5
    slope = (phi.value(loss + step) - phi.value(loss - step)) / (2 * step)
    assert phi.gain(loss) == pytest.approx(slope, rel=1e-5, abs=1e-5)
    assert 0 <= phi.gain(loss) <= math.exp(5)
    assert kind == "none" or phi.value(loss) >= 0


def test_beyond_its_exponent_exp_is_a_straight_line():
    phi = Adaptive("exp", tau=0.5, max_exponent=2.0)
    slope = math.exp(2.0)
    assert [phi.gain(x) for x in (1.0, 1.5, 4.0)] == pytest.approx([slope] * 3)
    assert [phi.value(x) for x in (1.0, 1.5, 4.0)] == pytest.approx(
        [0.5 * slope, 0.5 * slope + 0.5 * slope, 0.5 * slope + 3.0 * slope]
    )


def test_a_huge_loss_stays_finite():
    for kind in ("exp", "elu", "softplus"):
        phi = Adaptive(kind)
        for loss in (-1e6, 1e6):
            assert math.isfinite(phi.value(loss)) and math.isfinite(phi.gain(loss))
    assert Adaptive("exp").gain(1e6) == pytest.approx(math.exp(5))


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_does_not_pass(loss):
    for method in (CLIP.gain, CLIP.value):
        with pytest.raises(ValueError, match="policy loss is"):
            method(loss)


def scoped(weights, losses):
    """Eq. 1e."""
    return sum(w * CLIP.value(loss) for w, loss in zip(weights, losses, strict=True))


@pytest.mark.parametrize("tie, tied", [("zero", 0.0), ("half", 0.5), ("full", 1.0)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 400.0])
@pytest.mark.parametrize("minimum", [0.0, -0.25])
@pytest.mark.parametrize(
    "above, gate",
    [(1e-9, "tie"), (-9e-7, "tie"), (9e-7, "tie"), (1.1e-6, 1), (1e-5, 1), (-1e-5, 0)],
)
def test_a_tie_is_not_decided_by_rounding(above, gate, minimum, scale, tie, tied):
    """Equal lengths give L = c up to float32 rounding of its terms, of either sign: a tie in both
    cases. The value reported follows the gate."""
    phi = Adaptive("max0", minimum=minimum * scale, tie=tie)
    loss = (minimum + above) * scale
    assert phi.gain(loss, scale) == (tied if gate == "tie" else gate)
    assert phi.value(loss, scale) == (loss if gate == 1 else minimum * scale)


def test_the_scale_of_a_token_mean_is_1():
    assert CLIP.gain(9e-7) == CLIP.value(9e-7) == 0
    assert CLIP.gain(2e-6) == 1 and CLIP.value(2e-6) == 2e-6


def test_scopes_worked_example():
    """Two groups, A = +1, -1 each; lengths 300, 100 and 100, 200: micro-batches are the groups."""
    a, lengths = [1.0, -1.0, 1.0, -1.0], [300, 100, 100, 200]
    w = plain(lengths)
    micro = [on_policy_loss(plain(lengths[i : i + 2]), lengths[i : i + 2], a[:2]) for i in (0, 2)]
    assert micro == pytest.approx([-0.5, 0.333333], abs=6e-7)
    whole = on_policy_loss(w, lengths, a)
    assert whole == pytest.approx(-0.142857, abs=6e-7)
    assert (CLIP.value(whole), CLIP.gain(whole)) == (0, 0)
    # the authors' 1 / accumulation steps, and the weights of their tokens
    assert scoped([0.5, 0.5], micro) == pytest.approx(0.166667, abs=6e-7)
    assert sum(0.5 * x for x in micro) == pytest.approx(-0.083333, abs=6e-7)
    assert scoped([4 / 7, 3 / 7], micro) == pytest.approx(0.142857, abs=6e-7)
    shares = [x * n for x, n in zip(w, lengths, strict=True)]
    assert scoped(shares, [-x for x in a]) == pytest.approx(0.428571, abs=6e-7)
    flat = on_policy_loss(plain(lengths, "seq_mean_token_mean"), lengths, a)
    assert flat == pytest.approx(0, abs=1e-12)


def test_a_zero_gradient_step_of_adamw_is_not_no_step():
    """Why when_clipped exists."""
    p = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.AdamW([p], lr=0.1, weight_decay=0.01, betas=(0.9, 0.999))
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert p.item() == pytest.approx(0.899, abs=1e-6)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert p.item() == pytest.approx(0.831095, abs=1e-6)
    before, p.grad = p.item(), None
    optimizer.step()
    assert p.item() == before


def test_covariance_worked_example():
    a = advantages([[1.0, 1.0] + [0.0] * 6])
    lengths = [700, 900, 300, 200, 400, 250, 350, 100]
    loss = on_policy_loss(plain(lengths), lengths, a)
    assert loss == pytest.approx(-0.540061, abs=6e-7)
    covariance = length_advantage_covariance(lengths, a)
    assert -covariance / (sum(lengths) / 8) == pytest.approx(-0.540061, abs=6e-7)


@fast
@given(
    st.lists(
        st.lists(
            st.tuples(st.sampled_from([0.0, 1.0]), st.integers(1, 30)), min_size=2, max_size=6
        ),
        min_size=1,
        max_size=5,
    )
)
def test_on_policy_loss_is_minus_covariance_over_mean_length(groups):
    """Eq. 1c, for several complete groups: the gate opens exactly when long answers are worse."""
    a = advantages([[r for r, _ in group] for group in groups])
    lengths = [n for group in groups for _, n in group]
    loss = on_policy_loss(plain(lengths), lengths, a)
    covariance = length_advantage_covariance(lengths, a)
    assert loss == pytest.approx(-covariance * len(lengths) / sum(lengths), abs=1e-12)
    flat = on_policy_loss(plain(lengths, "seq_mean_token_mean"), lengths, a)
    assert flat == pytest.approx(0, abs=1e-12)
