"""The fused log-prob against the fp64 reference, one process."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agpo_megatron.logprob.fused import selected_logprobs
from agpo_megatron.logprob.reference import reference_logprobs


def problem(n, width, vocab, padded, dtype=torch.float32, seed=0):
    """Hidden states, padded head (logits spread by 1.5), targets, two upstream gradients."""
    make = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width, generator=make, dtype=torch.float64).to(dtype)
    weight = torch.randn(padded, width, generator=make, dtype=torch.float64) * 1.5 / width**0.5
    weight = weight.to(dtype)
    targets = torch.randint(0, vocab, (n,), generator=make)
    g, h = torch.randn(2, n, generator=make)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, g, h


def assert_close(got, want, tol):
    """Relative to the largest entry, so that a sum's cancellation is judged against its scale."""
    assert got.shape == want.shape and torch.isfinite(got).all()
    if want.numel():
        got, want = got.detach().double(), want.detach().double()
        worst = float((got - want).abs().max() / want.abs().max())
        assert worst < tol, worst


CASES = [  # N, H, vocab, padded, temperature, chunk
    (13, 16, 101, 101, 1.0, 4),  # the last chunk is a single row
    (13, 16, 101, 104, 0.7, 5),  # padding, temperature
    (7, 8, 50, 64, 1.0, 100),  # chunk larger than N
    (1, 8, 50, 50, 2.5, 1),
    (5, 4, 9001, 9008, 0.7, 3),  # more columns than a block
]


@pytest.mark.parametrize("n, width, vocab, padded, temperature, chunk", CASES)
def test_values_and_gradients_match_the_reference(n, width, vocab, padded, temperature, chunk):
    hidden, weight, targets, g, h = problem(n, width, vocab, padded)
    got = selected_logprobs(
        hidden,
        weight,
        targets,
        group=None,
        vocab_size=vocab,
        temperature=temperature,
        chunk=chunk,
    )
    assert got.logprob.dtype == got.entropy.dtype == torch.float32
    ref_hidden, ref_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    want = reference_logprobs(
        ref_hidden, ref_weight, targets, vocab_size=vocab, temperature=temperature
    )
    assert_close(got.logprob, want.logprob, 1e-6)
    assert_close(got.entropy, want.entropy, 1e-6)
    (got.logprob * g + got.entropy * h).sum().backward()
    (want.logprob * g + want.entropy * h).sum().backward()
    # A matmul over 9001 columns in fp32 is off by 2.5e-6 in torch's own log_softmax, too.
    assert_close(hidden.grad, ref_hidden.grad, 1e-6 if vocab < 1000 else 4e-6)
    assert_close(weight.grad, ref_weight.grad, 1e-6)
    assert not weight.grad[vocab:].any()


def test_each_output_alone():
    """One upstream gradient missing: the other one's share, and no error."""
    hidden, weight, targets, g, h = problem(6, 8, 30, 32)
    arguments = {"vocab_size": 30, "temperature": 0.7}
    for pick, upstream in (("logprob", g), ("entropy", h)):
        got = selected_logprobs(hidden, weight, targets, group=None, chunk=4, **arguments)
        mine = torch.autograd.grad(getattr(got, pick), (hidden, weight), upstream)
        want = reference_logprobs(hidden, weight, targets, **arguments)
        theirs = torch.autograd.grad(getattr(want, pick), (hidden, weight), upstream.double())
        for a, b in zip(mine, theirs, strict=True):
            assert_close(a, b, 1e-6)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_what_needs_a_gradient_gets_one(frozen):
    hidden, weight, targets, g, _ = problem(6, 8, 30, 32)
    both = selected_logprobs(
        hidden, weight, targets, group=None, vocab_size=30, temperature=1.0, chunk=4
    )
    full = torch.autograd.grad(both.logprob, (hidden, weight), g)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    one = selected_logprobs(
        hidden, weight, targets, group=None, vocab_size=30, temperature=1.0, chunk=4
    )
    one.logprob.backward(g)
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (weight.grad is None) == (frozen == "weight")
    trained, want = (weight, full[1]) if frozen == "hidden" else (hidden, full[0])
    assert torch.equal(trained.grad, want)


def test_gradcheck():
    hidden, weight, targets, _, _ = problem(5, 3, 7, 8, torch.float64)

    def both(hidden, weight):
        got = selected_logprobs(
            hidden, weight, targets, group=None, vocab_size=7, temperature=0.7, chunk=2
        )
        return got.logprob, got.entropy

    assert torch.autograd.gradcheck(both, (hidden, weight), eps=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_keep_fp32_logits(dtype):
    """Values as exact as in fp32 (a bf16 logit is off by 1e-2), gradients to 16-bit rounding."""
    hidden, weight, targets, g, h = problem(9, 32, 9001, 9008, dtype)
    got = selected_logprobs(
        hidden, weight, targets, group=None, vocab_size=9001, temperature=0.7, chunk=4
    )
    want = reference_logprobs(hidden, weight, targets, vocab_size=9001, temperature=0.7)
    assert got.logprob.dtype == got.entropy.dtype == torch.float32
    assert_close(got.logprob, want.logprob, 2e-6)
    assert_close(got.entropy, want.entropy, 2e-6)
    mine = torch.autograd.grad((got.logprob * g + got.entropy * h).sum(), (hidden, weight))
    theirs = torch.autograd.grad((want.logprob * g + want.entropy * h).sum(), (hidden, weight))
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == dtype
        assert_close(a, b, 2 ** (-8 if dtype == torch.bfloat16 else -11))


def test_large_logits_and_small_entropy():
    """Rows that are all but certain, with logits of 60: the entropy must not drown in rounding."""
    hidden = torch.eye(3)
    weight = torch.tensor([[60.0, -60.0, 1e4], [45.0, -75.0, 0.0], [44.0, -74.0, -1e4]])
    targets = torch.tensor([0, 1, 2])
    got = selected_logprobs(
        hidden, weight, targets, group=None, vocab_size=3, temperature=1.0, chunk=2
    )
    want = reference_logprobs(hidden, weight, targets, vocab_size=3, temperature=1.0)
    assert got.logprob.tolist() == pytest.approx(want.logprob.tolist(), rel=1e-6, abs=1.2e-7)
    assert float(want.entropy[0]) < 1e-5
    assert got.entropy.tolist() == pytest.approx(want.entropy.tolist(), rel=2e-2, abs=1e-30)


def test_no_rows():
    hidden, weight, targets, _, _ = problem(0, 8, 30, 32)
    got = selected_logprobs(
        hidden, weight, targets, group=None, vocab_size=30, temperature=1.0, chunk=4
    )
    assert got.logprob.shape == got.entropy.shape == (0,)
    (got.logprob.sum() + got.entropy.sum()).backward()
    assert hidden.grad.shape == (0, 8) and not weight.grad.any()


def test_scoring_keeps_nothing():
    hidden, weight, targets, _, _ = problem(6, 8, 30, 32)
    arguments = {"group": None, "vocab_size": 30, "temperature": 1.0, "chunk": 4}
    trained = selected_logprobs(hidden, weight, targets, **arguments)
    with torch.no_grad():
        scored = selected_logprobs(hidden, weight, targets, **arguments)
    assert scored.logprob.grad_fn is None and scored.entropy.grad_fn is None
    assert torch.equal(scored.logprob, trained.logprob)
    assert torch.equal(scored.entropy, trained.entropy)


class LargestOutput(TorchDispatchMode):
    """Number of elements of the largest tensor that any operator returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_of_all_rows_never_exist(dtype):
    n, vocab, chunk = 96, 2000, 8
    hidden, weight, targets, g, h = problem(n, 8, vocab, vocab, dtype)
    with LargestOutput() as seen:
        got = selected_logprobs(
            hidden, weight, targets, group=None, vocab_size=vocab, temperature=0.7, chunk=chunk
        )
        (got.logprob * g + got.entropy * h).sum().backward()
    assert weight.grad is not None
    assert seen.numel == chunk * vocab == weight.numel()
    with LargestOutput() as seen:
        reference_logprobs(hidden, weight, targets, vocab_size=vocab, temperature=0.7)
    assert seen.numel == n * vocab  # the measurement sees what it should


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": 0.0}, "temperature 0.0 and chunk 4 must be positive"),
        ({"temperature": math.nan}, "must be positive"),
        ({"chunk": 0}, "temperature 1.0 and chunk 0 must be positive"),
        ({"vocab_size": 33}, "1 shards x 32 rows = 32, fewer than the vocabulary of 33"),
        ({"vocab_size": 0}, "vocabulary of 0"),
        ({"targets": torch.tensor([0, 30])}, "target id 30 lies outside the vocabulary of 30"),
        ({"targets": torch.tensor([-1, 3])}, "target id -1 lies outside"),
        ({"targets": torch.tensor([0])}, "targets must be int64 of shape"),
        ({"targets": torch.tensor([0, 1], dtype=torch.int32)}, "not torch.int32"),
        ({"weight": torch.zeros(32, 9)}, "needs hidden"),
        ({"weight": torch.zeros(32, 8, dtype=torch.bfloat16)}, "weight is torch.bfloat16"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {
        "hidden": torch.zeros(2, 8),
        "weight": torch.zeros(32, 8),
        "targets": torch.tensor([0, 29]),
        "group": None,
        "vocab_size": 30,
        "temperature": 1.0,
        "chunk": 4,
    }
    selected_logprobs(**arguments)
    with pytest.raises(ValueError, match=message):
        selected_logprobs(**(arguments | change))
