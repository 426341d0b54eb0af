"""Token loss, aggregation (A3), loss clip (A4) and the covariance identity (1c)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agpo_megatron.algorithm.adaptive_loss import (
    clip_gate,
    clipped_value,
    length_advantage_covariance,
    on_policy_loss,
)
from agpo_megatron.algorithm.advantage import group_advantages, is_zero_variance
from agpo_megatron.algorithm.aggregation import token_weights
from agpo_megatron.algorithm.policy_loss import negative_log_likelihood, ppo_clip

MODES = ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"]
fast = settings(max_examples=60, deadline=None)


def masks_of(lengths):
    return [[1] * n for n in lengths]


def advantages(raw, zero_variance="zero"):
    return group_advantages(
        raw, raw, zero_variance=zero_variance, tol=1e-6, std_eps=1e-6, r_max=1.0, r_min=0.0
    )


def total(weights, token_losses):
    """sum w l, for one loss per sequence."""
    return sum(w * loss for row, loss in zip(weights, token_losses, strict=True) for w in row)


# --- token loss ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "advantage, high, expected, clipped",
    [
        (1, 0.28, [-0.5, -0.9, -1, -1.25, -1.28, -1.28], [0, 0, 0, 0, 1, 1]),
        (1, 0.2, [-0.5, -0.9, -1, -1.2, -1.2, -1.2], [0, 0, 0, 1, 1, 1]),
        (-1, 0.28, [0.8, 0.9, 1, 1.25, 1.5, 4], [1, 0, 0, 0, 0, 0]),
        (0, 0.28, [0] * 6, [0] * 6),
    ],
)
def test_ppo_clip_worked_example(advantage, high, expected, clipped):
    rho = torch.tensor([0.5, 0.9, 1, 1.25, 1.5, 4], dtype=torch.float64)
    old = torch.full_like(rho, -2.0)
    logprob = (old + rho.log()).requires_grad_()
    a = torch.full_like(rho, float(advantage))
    loss, is_clipped, ratio = ppo_clip(logprob, old, a, 0.2, high)
    assert loss.tolist() == pytest.approx(expected, abs=1e-12)
    assert is_clipped.tolist() == [bool(c) for c in clipped]
    assert ratio.tolist() == pytest.approx(rho.tolist()) and not ratio.requires_grad
    loss.sum().backward()
    gradient = [0.0 if c else -advantage * r for c, r in zip(clipped, rho.tolist(), strict=True)]
    assert logprob.grad.tolist() == pytest.approx(gradient, abs=1e-12)


def test_ppo_clip_on_policy_gradient_is_exact():
    logprob = torch.tensor([-0.3, -7.0, -0.0, -1.5], requires_grad=True)
    a = torch.tensor([0.7, -1.3, 0.0, 2.0])
    loss, is_clipped, ratio = ppo_clip(logprob, logprob.detach(), a, 0.2, 0.28)
    loss.sum().backward()
    assert torch.equal(logprob.grad, -a) and torch.equal(loss, -a)
    assert not is_clipped.any() and torch.equal(ratio, torch.ones(4))


def test_ppo_clip_survives_an_absurd_ratio():
    logprob = torch.tensor([0.0, 0.0, -300.0], requires_grad=True)
    old = torch.tensor([-300.0, -300.0, 0.0])
    loss, _, ratio = ppo_clip(logprob, old, torch.tensor([0.0, -1.0, 1.0]), 0.2, 0.28)
    loss.sum().backward()
    assert loss[0] == 0 and torch.isfinite(loss).all() and torch.isfinite(ratio).all()
    assert torch.isfinite(logprob.grad).all()


def test_negative_log_likelihood():
    assert negative_log_likelihood(torch.tensor([-1.5, -0.25])).tolist() == [1.5, 0.25]


# --- aggregation -----------------------------------------------------------------------------


def test_loss_mask_worked_example():
    groups, lengths = [[1, 0], [1, 1], [0, 1]], [2, 6, 5, 3, 1, 3]
    a = [x for raw in groups for x in advantages([float(r) for r in raw])]
    kept = [not is_zero_variance(raw, 1e-6) for raw in groups for _ in raw]
    assert kept == [True, True, False, False, True, True]
    expected = {
        "token_mean": (0.070711, 0.117851),
        "seq_mean_token_mean": (0, 0),
        "seq_mean_token_sum": (0.235702, 0.353553),
        "seq_mean_token_sum_norm": (0.029463, 0.044194),
    }
    for mode, (keep, exclude) in expected.items():
        for denominators, value in (("keep", keep), ("exclude", exclude)):
            w = token_weights(masks_of(lengths), kept, mode, 8, denominators)
            assert on_policy_loss(w, a) == pytest.approx(value, abs=6e-7), (mode, denominators)
    # v1 on the same batch: the all-right group pushes the loss below zero.
    v1 = [x for raw in groups for x in advantages([float(r) for r in raw], "constant")]
    w = token_weights(masks_of(lengths), [True] * 6, "token_mean")
    assert on_policy_loss(w, v1) == pytest.approx(-0.329289, abs=6e-7)


def test_weights_of_a_whole_step_are_split_invariant():
    """Two ranks with two micro-batches each; a mean of their means would be another number."""
    lengths, losses = [2, 4, 3, 8, 1, 6], [1.0, -0.5, 0.2, 0.3, -1.0, 0.1]
    expected = [0.108333, 0.016667, 0.433333, 0.054167]
    for mode, value in zip(MODES, expected, strict=True):
        w = token_weights(masks_of(lengths), [True] * 6, mode, 8)
        assert total(w, losses) == pytest.approx(value, abs=6e-7), mode
        shards = [total(w[i:j], losses[i:j]) for i, j in ((0, 2), (2, 3), (3, 4), (4, 6))]
        assert sum(shards) == pytest.approx(value, abs=6e-7)


def test_token_weights_follow_the_mask():
    masks = [[0, 1, 1, 0], [0, 0], [1, 0, 1, 1]]
    w = token_weights(masks, [True, True, True], "token_mean")
    assert w == [[0, 0.2, 0.2, 0], [0, 0], [0.2, 0, 0.2, 0.2]]
    w = token_weights(masks, [True, True, True], "seq_mean_token_mean")
    assert w == [
        [0, 0.25, 0.25, 0],
        [0, 0],
        [1 / 6, 0, 1 / 6, 1 / 6],
    ]  # the empty one is not counted
    w = token_weights(masks, [True, True, False], "token_mean")
    assert w == [[0, 0.5, 0.5, 0], [0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("denominators", ["exclude", "keep"])
def test_nothing_left_gives_zero_weights(mode, denominators):
    for masks, kept in (([[1, 1], [1]], [False, False]), ([[0, 0]], [True]), ([], [])):
        w = token_weights(masks, kept, mode, 8, denominators)
        assert w == [[0.0] * len(m) for m in masks]
    logprob = torch.zeros(2, requires_grad=True)
    loss, _, _ = ppo_clip(logprob, torch.zeros(2), torch.zeros(2), 0.2, 0.2)
    (loss * torch.zeros(2)).sum().backward()
    assert logprob.grad.tolist() == [0.0, 0.0]


def test_token_weights_refusals():
    with pytest.raises(ValueError, match="1 loss masks but 2 kept"):
        token_weights([[1]], [True, True], "token_mean")
    with pytest.raises(ValueError, match="sequence 1 has entries other than 0 and 1"):
        token_weights([[1], [2, 1]], [True, True], "token_mean")
    for bad in (None, 0):
        with pytest.raises(ValueError, match="norm_length must be a positive number"):
            token_weights([[1]], [False], "seq_mean_token_sum_norm", bad)
    with pytest.raises(ValueError, match="unknown aggregation mode 'mean'"):
        token_weights([[1]], [True], "mean")


batches = st.lists(
    st.tuples(st.lists(st.integers(0, 1), max_size=7), st.booleans()), min_size=1, max_size=8
)


@fast
@given(batches, st.sampled_from(MODES), st.sampled_from(["exclude", "keep"]), st.data())
def test_token_weights_properties(batch, mode, denominators, data):
    masks, kept = [m for m, _ in batch], [k for _, k in batch]
    w = token_weights(masks, kept, mode, 5, denominators)
    for mask, keep, row in zip(masks, kept, w, strict=True):
        assert all((x > 0) == bool(m and keep) for x, m in zip(row, mask, strict=True))
    order = data.draw(st.permutations(range(len(batch))))
    moved = token_weights(
        [masks[i] for i in order], [kept[i] for i in order], mode, 5, denominators
    )
    assert moved == [w[i] for i in order]
    n = [sum(m) for m in masks]
    counted = [x for x, k in zip(n, kept, strict=True) if x and (k or denominators == "keep")]
    left = [x for x, k in zip(n, kept, strict=True) if x and k]
    if not left:
        return
    sums = {
        "token_mean": sum(left) / sum(counted),
        "seq_mean_token_mean": len(left) / len(counted),
        "seq_mean_token_sum": sum(left) / len(counted),
        "seq_mean_token_sum_norm": sum(left) / len(counted) / 5,
    }
    assert math.fsum(x for row in w for x in row) == pytest.approx(sums[mode])
    if denominators == "exclude":  # as if the dropped sequences had never been there
        rest = token_weights([m for m, k in batch if k], [True] * sum(kept), mode, 5)
        assert [row for row, k in zip(w, kept, strict=True) if k] == rest


# --- loss clip -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lengths, value, gate", [([100, 300], 0.5, 1), ([300, 100], -0.5, 0), ([200, 200], 0, 0)]
)
def test_loss_clip_worked_example(lengths, value, gate):
    w = token_weights(masks_of(lengths), [True, True], "token_mean")
    loss = on_policy_loss(w, [1.0, -1.0])
    assert loss == pytest.approx(value, abs=1e-12)
    assert clip_gate(loss, 0.0) == gate
    assert clipped_value(loss, 0.0) == max(loss, 0.0)
    assert clip_gate(loss, -1.0) == 1 and clip_gate(loss, loss) == 0


@pytest.mark.parametrize("scale", [1e-3, 1.0, 400.0])
@pytest.mark.parametrize("minimum", [0.0, -0.25])
@pytest.mark.parametrize(
    "above, gate", [(1e-9, 0), (-1e-9, 0), (9e-7, 0), (1.1e-6, 1), (1e-5, 1), (-1e-5, 0)]
)
def test_a_tie_is_not_decided_by_rounding(above, gate, minimum, scale):
    """Equal lengths give L = 0 up to float32 rounding of its terms, of either sign: closed in both cases. The value
    reported follows the gate."""
    loss = (minimum + above) * scale
    assert clip_gate(loss, minimum * scale, scale) == gate
    assert clipped_value(loss, minimum * scale, scale) == (loss if gate else minimum * scale)


def test_the_scale_of_a_token_mean_is_1():
    assert clip_gate(9e-7, 0.0) == clipped_value(9e-7, 0.0) == 0
    assert clip_gate(2e-6, 0.0) == 1 and clipped_value(2e-6, 0.0) == 2e-6


def test_loss_clip_acts_on_the_whole_step():
    a, lengths = [1.0, -1.0, 1.0, -1.0], [300, 100, 100, 200]
    micro = [
        on_policy_loss(token_weights(masks_of(lengths[i : i + 2]), [True] * 2, "token_mean"), a[:2])
        for i in (0, 2)
    ]
    assert micro == pytest.approx([-0.5, 0.333333], abs=6e-7)
    whole = on_policy_loss(token_weights(masks_of(lengths), [True] * 4, "token_mean"), a)
    assert whole == pytest.approx(-0.142857, abs=6e-7)
    assert clipped_value(whole, 0.0) == 0 and clip_gate(whole, 0.0) == 0


def test_off_policy_example_is_clipped():
    rho = torch.tensor([1.1, 1.3, 0.9, 1.5, 0.7, 1.2])
    a = torch.tensor([1.0] * 4 + [-1.0] * 2)
    loss, _, _ = ppo_clip(rho.log(), torch.zeros(6), a, 0.2, 0.28)
    assert loss.tolist() == pytest.approx([-1.1, -1.28, -0.9, -1.28, 0.8, 1.2], abs=1e-6)
    w = token_weights(masks_of([4, 2]), [True, True], "token_mean")
    value = float((loss * torch.tensor([x for row in w for x in row])).sum())
    assert value == pytest.approx(-0.426667, abs=1e-6)
    assert clipped_value(value, 0.0) == 0 and clip_gate(value, 0.0) == 0


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_does_not_pass_the_gate(loss):
    with pytest.raises(ValueError, match="policy loss is"):
        clip_gate(loss, 0.0)


def test_covariance_worked_example():
    a = advantages([1.0, 1.0] + [0.0] * 6)
    lengths = [700, 900, 300, 200, 400, 250, 350, 100]
    w = token_weights(masks_of(lengths), [True] * 8, "token_mean")
    assert on_policy_loss(w, a) == pytest.approx(-0.540061, abs=6e-7)
    mean = sum(lengths) / 8
    assert -length_advantage_covariance(lengths, a) / mean == pytest.approx(-0.540061, abs=6e-7)
    assert length_advantage_covariance([1, 3], [2.0, 6.0]) == 2.0  # population, not sample
    assert length_advantage_covariance([], []) == 0.0
    with pytest.raises(ValueError, match="1 lengths but 0 advantages"):
        length_advantage_covariance([1], [])
    with pytest.raises(ValueError, match="1 weight rows but 0 advantages"):
        on_policy_loss([[1.0]], [])


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
    a = [x for group in groups for x in advantages([r for r, _ in group])]
    lengths = [n for group in groups for _, n in group]
    everything = [True] * len(lengths)
    loss = on_policy_loss(token_weights(masks_of(lengths), everything, "token_mean"), a)
    covariance = length_advantage_covariance(lengths, a)
    assert loss == pytest.approx(-covariance * len(lengths) / sum(lengths), abs=1e-12)
    flat = token_weights(masks_of(lengths), everything, "seq_mean_token_mean")
    assert on_policy_loss(flat, a) == pytest.approx(0, abs=1e-12)
