"""Token losses, KL, entropy control and rollout correction: worked numbers, gradients in fp64, absurd inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agpo_megatron.algorithm.aggregation import sequence_weights
from agpo_megatron.algorithm.correction import rollout_correction
from agpo_megatron.algorithm.kl import kl_estimate, next_entropy_coefficient
from agpo_megatron.algorithm.loss import (
    POLICY_LOSSES,
    LossRows,
    Ratios,
    cispo,
    gmpo,
    gspo,
    gspo_token,
    nll,
    ppo,
    sapo,
)
from agpo_megatron.algorithm.settings import LossSettings

fast = settings(max_examples=60, deadline=None)
RHO = [0.5, 0.9, 1, 1.25, 1.5, 4]


def bounds_of(low, high, dual=None):
    """Of the ratio; also such as a configuration would refuse."""
    changes = {"clip_low": low, "clip_high": high, "dual_clip": dual}
    return LossSettings().model_copy(update=changes)


def ratios_of(logprob, old, advantage, sequence, sequences):
    return Ratios(logprob, old, LossRows({"advantage": advantage}, {}, sequence, sequences))


def rows(log_ratios, advantage, lengths=None, dtype=torch.float64):
    """Rows of sequences of ``lengths`` (one by default), old log-prob -2; ``advantage`` per row or one for all."""
    ratio = torch.as_tensor(log_ratios, dtype=dtype)
    lengths = [len(ratio)] if lengths is None else lengths
    a = torch.as_tensor(advantage, dtype=dtype).expand(len(ratio))
    old = torch.full_like(ratio, -2.0)
    index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return ratios_of((old + ratio).requires_grad_(), old, a, index, len(lengths))


def logs(ratios):
    return [math.log(x) for x in ratios]


# --- PPO ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "advantage, bounds, expected, clipped",
    [
        (1, bounds_of(0.2, 0.28), [-0.5, -0.9, -1, -1.25, -1.28, -1.28], [0, 0, 0, 0, 1, 1]),
        (1, bounds_of(0.2, 0.2), [-0.5, -0.9, -1, -1.2, -1.2, -1.2], [0, 0, 0, 1, 1, 1]),
        (-1, bounds_of(0.2, 0.28), [0.8, 0.9, 1, 1.25, 1.5, 4], [1, 0, 0, 0, 0, 0]),
        (-1, bounds_of(0.2, 0.28, dual=3.0), [0.8, 0.9, 1, 1.25, 1.5, 3], [1, 0, 0, 0, 0, 1]),
        (
            1,
            bounds_of(0.2, 0.28, dual=3.0),
            [-0.5, -0.9, -1, -1.25, -1.28, -1.28],
            [0] * 4 + [1] * 2,
        ),
        (0, bounds_of(0.2, 0.28, dual=3.0), [0] * 6, [0] * 6),
    ],
)
def test_ppo_worked_example(advantage, bounds, expected, clipped):
    batch = rows(logs(RHO), float(advantage))
    got = ppo(batch, bounds)
    assert got.loss.tolist() == pytest.approx(expected, abs=1e-12)
    assert got.surrogate.tolist() == got.loss.tolist() and not got.surrogate.requires_grad
    assert got.is_clipped.tolist() == [bool(c) for c in clipped]
    assert got.ratio.tolist() == pytest.approx(RHO) and not got.ratio.requires_grad
    got.loss.sum().backward()
    gradient = [0.0 if c else -advantage * r for c, r in zip(clipped, RHO, strict=True)]
    assert batch.logprob.grad.tolist() == pytest.approx(gradient, abs=1e-12)


def test_off_policy_example():
    got = ppo(
        rows(logs([1.1, 1.3, 0.9, 1.5, 0.7, 1.2]), [1.0] * 4 + [-1.0] * 2), bounds_of(0.2, 0.28)
    )
    assert got.loss.tolist() == pytest.approx([-1.1, -1.28, -0.9, -1.28, 0.8, 1.2], abs=1e-9)
    w = sequence_weights([4, 2], [4, 2], "token_mean")
    weights = torch.tensor([w[0]] * 4 + [w[1]] * 2, dtype=torch.float64)
    assert (weights * got.loss).sum().item() == pytest.approx(-0.426667, abs=1e-6)


# --- the others -----------------------------------------------------------------------------

MIX = [0.1, -0.2, 0.3, 0.0]


def test_gspo_worked_example():
    got = gspo(rows(MIX, 1.0), bounds_of(0.2, 0.2))
    assert got.ratio.tolist() == pytest.approx([1.051271] * 4, abs=6e-7)
    assert got.loss.tolist() == pytest.approx([-1.051271] * 4, abs=6e-7)
    clipped = gspo(rows(MIX, 1.0), bounds_of(3e-4, 4e-4))
    assert clipped.loss.tolist() == pytest.approx([-1.0004] * 4) and clipped.is_clipped.all()


def test_gspo_takes_each_sequence_by_itself():
    batch = rows([0.3, 0.1, -0.4], 1.0, [2, 1])
    got = gspo(batch, bounds_of(0.9, 0.9))
    assert got.ratio.log().tolist() == pytest.approx([0.2, 0.2, -0.4])
    (got.loss[:2].sum() / 2).backward()
    assert batch.logprob.grad.tolist() == pytest.approx([-0.5 * math.exp(0.2)] * 2 + [0])


def test_gspo_token_has_gspos_value_and_each_tokens_gradient():
    batch = rows(MIX, [1.0, 1.0, -2.0, 0.5])
    got = gspo_token(batch, bounds_of(0.9, 0.9))
    s = math.exp(0.05)
    assert got.loss.tolist() == pytest.approx([-s, -s, 2 * s, -0.5 * s])
    got.loss.sum().backward()
    assert batch.logprob.grad.tolist() == pytest.approx([-s, -s, 2 * s, -0.5 * s])


def test_gmpo_worked_example():
    def ratio(advantage, epsilon):
        return -gmpo(rows(MIX, advantage), bounds_of(epsilon, epsilon)).loss[0].item() / advantage

    assert ratio(1.0, 0.4) == pytest.approx(1.051271, abs=6e-7)
    assert ratio(1.0, 0.15) == pytest.approx(1.012578, abs=6e-7)
    assert ratio(-1.0, 0.15) == pytest.approx(1.064494, abs=6e-7)
    # each sign has its own bound: 0.3 is cut to 0.15 for A > 0, -0.2 to -0.15 for A < 0
    for bounds, kept in ((bounds_of(9.0, 0.15), 1.012578), (bounds_of(0.15, 9.0), 1.051271)):
        assert -gmpo(rows(MIX, 1.0), bounds).loss[0].item() == pytest.approx(kept, abs=6e-7)
    for bounds, kept in ((bounds_of(0.15, 9.0), 1.064494), (bounds_of(9.0, 0.15), 1.051271)):
        assert gmpo(rows(MIX, -1.0), bounds).loss[0].item() == pytest.approx(kept, abs=6e-7)
    assert gmpo(rows(MIX, 1.0), bounds_of(0.15, 0.15)).is_clipped.tolist() == [0, 0, 1, 0]
    assert gmpo(rows(MIX, -1.0), bounds_of(0.15, 0.15)).is_clipped.tolist() == [0, 1, 0, 0]


def test_sapo_worked_example():
    rho = [0.5, 0.9, 1, 1.3, 2]
    for advantage, weight in (
        (1.0, [0.940015, 0.997504, 1, 0.977833, 0.786448]),
        (-1.0, [0.934140, 0.997249, 1, 0.975598, 0.768110]),
    ):
        batch = rows(logs(rho), advantage)
        got = sapo(batch, bounds_of(0.2, 0.2))
        got.loss.sum().backward()
        expected = [-advantage * w * r for w, r in zip(weight, rho, strict=True)]
        assert batch.logprob.grad.tolist() == pytest.approx(expected, abs=2e-6)
        assert got.surrogate.tolist() == pytest.approx([-advantage * r for r in rho])
    gate = sapo(rows(logs(rho), 1.0), bounds_of(0.2, 0.2)).loss
    expected = [-1.510163, -1.900083, -2, -2.297770, -2.924234]
    assert gate.tolist() == pytest.approx(expected, abs=6e-7)


def test_cispo_worked_example():
    rho = [0.5, 0.9, 1, 1.28, 3]
    batch = rows(logs(rho), [1.0, 1.0, -2.0, 1.0, 1.0])
    got = cispo(batch, bounds_of(1.0, 0.28))
    capped = [0.5, 0.9, 1, 1.28, 1.28]
    assert got.surrogate.tolist() == pytest.approx([-0.5, -0.9, 2, -1.28, -1.28])
    got.loss.sum().backward()
    expected = [-c * a for c, a in zip(capped, [1, 1, -2, 1, 1], strict=True)]
    assert batch.logprob.grad.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", sorted(set(POLICY_LOSSES) - {"nll"}))
def test_on_policy_all_losses_have_the_same_gradient(name):
    a = torch.tensor([0.7, 0.7, -1.3, 2.0, 2.0, 0.0], dtype=torch.float64)
    batch = rows([0.0] * 6, a, [2, 1, 2, 1])
    got = POLICY_LOSSES[name](batch, bounds_of(0.2, 0.28))
    got.loss.sum().backward()
    assert batch.logprob.grad.tolist() == pytest.approx((-a).tolist(), abs=1e-12)
    assert got.surrogate.tolist() == pytest.approx((-a).tolist(), abs=1e-12)
    assert not got.is_clipped.any()


def test_ppo_on_policy_is_exact_in_fp32():
    logprob = torch.tensor([-0.3, -7.0, -0.0, -1.5], requires_grad=True)
    a = torch.tensor([0.7, -1.3, 0.0, 2.0])
    batch = ratios_of(logprob, logprob.detach(), a, torch.zeros(4, dtype=torch.int64), 1)
    got = ppo(batch, bounds_of(0.2, 0.28))
    got.loss.sum().backward()
    assert torch.equal(logprob.grad, -a) and torch.equal(got.loss, -a)
    assert not got.is_clipped.any() and torch.equal(got.ratio, torch.ones(4))


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_gradients_are_those_of_finite_differences(name):
    """Of the function that the loss differentiates: detached factors held at their values."""
    ratios = [0.3, -0.5, 0.02, -0.03, 0.7, -0.9, 0.11, -0.25, 1.3]
    batch = rows(ratios, [1.0, 1.0, 1.0, -0.8, -0.8, -0.8, -0.8, 0.0, -2.0], [3, 4, 1, 1])
    weights = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    bounds = bounds_of(0.2, 0.28, dual=3.0 if name == "ppo" else None)

    def value(logprob):
        if name == "cispo":  # its ratio is a constant of the step
            factor = (batch.logprob.detach() - batch.old_logprob).exp().clamp(0.8, 1.28)
            return (weights * -factor * batch.advantage * logprob).sum()
        if name == "gspo_token":
            s = batch.sequence_mean(batch.log_ratio().detach()).exp()
            own = s * (logprob - batch.logprob.detach()).exp()
            low, high = -own * batch.advantage, -own.clamp(0.8, 1.28) * batch.advantage
            return (weights * torch.maximum(low, high)).sum()
        moved = ratios_of(logprob, batch.old_logprob, batch.advantage, batch.rows.sequence, 4)
        return (weights * POLICY_LOSSES[name](moved, bounds).loss).sum()

    (weights * POLICY_LOSSES[name](batch, bounds).loss).sum().backward()
    step, start = 1e-6, batch.logprob.detach()
    for i in range(9):
        move = torch.zeros_like(start)
        move[i] = step
        slope = (value(start + move) - value(start - move)) / (2 * step)
        assert batch.logprob.grad[i].item() == pytest.approx(slope.item(), abs=1e-8), i


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_an_absurd_ratio_and_an_empty_pack_stay_finite(name):
    logprob = torch.tensor([0.0, 0.0, -300.0], requires_grad=True)
    old = torch.tensor([-300.0, -300.0, 0.0])
    index = torch.tensor([0, 1, 2])
    batch = ratios_of(logprob, old, torch.tensor([0.0, -1.0, 1.0]), index, 3)
    got = POLICY_LOSSES[name](batch, bounds_of(0.2, 0.28))
    got.loss.sum().backward()
    for tensor in (got.loss, got.surrogate, got.ratio, logprob.grad):
        assert torch.isfinite(tensor).all()
    assert got.loss[0] == 0
    empty = torch.zeros(0, requires_grad=True)
    nothing = ratios_of(empty, empty.detach(), empty.detach(), torch.zeros(0, dtype=torch.int64), 0)
    total = POLICY_LOSSES[name](nothing, bounds_of(0.2, 0.28)).loss.sum()
    total.backward()
    assert total == 0


@fast
@given(
    st.lists(
        st.tuples(st.floats(-1, 1), st.sampled_from([-1.5, -0.3, 0.4, 2.0])),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from(list(POLICY_LOSSES)),
    st.data(),
)
def test_fp32_agrees_with_fp64_and_order_does_not_matter(tokens, name, data):
    bounds = bounds_of(0.2, 0.28)
    lengths = [1] * len(tokens)
    ratios, a = [r for r, _ in tokens], [x for _, x in tokens]
    wide = POLICY_LOSSES[name](rows(ratios, a, lengths), bounds).loss
    narrow = POLICY_LOSSES[name](rows(ratios, a, lengths, torch.float32), bounds).loss
    assert narrow.tolist() == pytest.approx(wide.tolist(), rel=1e-4, abs=1e-5)
    order = data.draw(st.permutations(range(len(tokens))))
    moved = rows([ratios[i] for i in order], [a[i] for i in order], lengths)
    got = POLICY_LOSSES[name](moved, bounds).loss
    assert got.tolist() == pytest.approx([wide[i].item() for i in order], rel=1e-12)


def test_negative_log_likelihood():
    batch = rows([0.5, 1.75], [1.0, -9.0])
    got = nll(batch, LossSettings())
    assert got.loss.tolist() == [1.5, 0.25] and got.ratio.tolist() == [1.0, 1.0]


# --- KL and entropy -------------------------------------------------------------------------


def test_kl_worked_example():
    logprob = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.2, -1.0, -0.5], dtype=torch.float64)
    expected = {"k1": [0.2, -1, 0], "k2": [0.02, 0.5, 0], "k3": [0.018731, 0.718282, 0]}
    slopes = {"k1": [1, 1, 1], "k2": [0.2, -1, 0], "k3": [1 - math.exp(-0.2), 1 - math.e, 0]}
    for name, values in expected.items():
        k = kl_estimate(logprob, ref, name)
        assert k.tolist() == pytest.approx(values, abs=6e-7)
        (slope,) = torch.autograd.grad(k.sum(), logprob)
        assert slope.tolist() == pytest.approx(slopes[name])
    old = logprob.detach() - math.log(1.1)
    got = kl_estimate(logprob, ref, "k3", old)
    assert got.tolist() == pytest.approx([0.020604, 0.790110, 0], abs=6e-7)


def test_importance_gives_the_gradient_of_the_reverse_kl():
    """Expectation over a whole small vocabulary: exact."""
    logits = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.5, 0.1, -0.4], dtype=torch.float64).log_softmax(0)
    log_p = logits.log_softmax(0)
    p = log_p.detach().exp()
    (true,) = torch.autograd.grad(
        (log_p.exp() * (log_p - reference)).sum(), logits, retain_graph=True
    )

    def gradient(name, old=None):
        k = (p * kl_estimate(log_p, reference, name, old)).sum()
        return torch.autograd.grad(k, logits, retain_graph=True)[0].tolist()

    assert gradient("k1", log_p.detach()) == pytest.approx(true.tolist(), abs=1e-12)
    assert gradient("k3", log_p.detach()) == pytest.approx(true.tolist(), abs=1e-12)
    assert gradient("k2") == pytest.approx(true.tolist(), abs=1e-12)
    assert gradient("k1") == pytest.approx([0, 0, 0], abs=1e-12)  # what the check warns of


def test_entropy_coefficient():
    assert next_entropy_coefficient(0.01, 0.2, 0.3) == pytest.approx((0.015, 0.015))
    assert next_entropy_coefficient(0.01, 0.4, 0.3) == pytest.approx((0.005, 0.0))
    assert next_entropy_coefficient(0.001, 0.4, 0.3) == (0.0, 0.0)


# --- rollout correction ---------------------------------------------------------------------

Q = [0.3, 0.6, 1, 1.8, 2.5, 6]


def correction(q, kind, level="token", low=0.5, high=2.0, mask=None):
    gap = np.log(np.array(q))
    mask = np.ones(len(q), dtype=bool) if mask is None else np.array(mask, dtype=bool)
    rollout = np.full(len(q), -1.0)
    return rollout_correction(
        rollout + gap, rollout, mask, kind=kind, level=level, low=low, high=high
    ).tolist()


def test_correction_worked_example():
    assert correction(Q, "tis") == pytest.approx([0.3, 0.6, 1, 1.8, 2, 2])
    assert correction(Q, "mis") == pytest.approx([0, 0.6, 1, 1.8, 0, 0])
    assert correction(Q, "icepop", high=5.0) == pytest.approx([0, 0.6, 1, 1.8, 2.5, 0])
    three = [1.2, 0.9, 1.5]
    assert correction(three, "tis", "sequence") == pytest.approx([1.62] * 3)
    assert correction(three, "tis", "sequence_mean") == pytest.approx([1.174460] * 3, abs=6e-7)
    assert correction(three, "mis", "sequence", high=1.6) == [0, 0, 0]


def test_correction_looks_at_the_mask_only():
    got = correction([1.2, 50.0, 1.5], "tis", "sequence", mask=[1, 0, 1])
    assert got == pytest.approx([1.8, 0, 1.8])
    with pytest.raises(ValueError, match="2 old log-probs, 1 rollout"):
        rollout_correction(
            np.zeros(2), np.zeros(1), np.ones(2, bool), kind="tis", level="token", low=0, high=2
        )
    assert math.isfinite(correction([1e300, 1e300], "mis", "sequence", high=1e30)[0])
