"""The fused log-prob against the fp64 reference, one process."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from logprob_reference import reference_logprobs

from agpo_megatron.logprob import passes
from agpo_megatron.logprob.fused import selected_logprobs
from agpo_megatron.logprob.projection import Head

WAYS = ("one pass", "one pass, entropy", "two pass")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles of uneven size each way, and the last one of a single column now and then."""
    monkeypatch.setattr(passes, "ONE_PASS_COLUMNS", 20)
    monkeypatch.setattr(passes, "TWO_PASS_COLUMNS", 25)
    monkeypatch.setattr(passes, "TWO_PASS_ROWS", 5)


def problem(n, width, vocab, padded, dtype=torch.float32, seed=0):
    """Hidden states, padded head (logits spread by 1.5), targets, two upstream gradients."""
    make = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width, generator=make, dtype=torch.float64).to(dtype)
    weight = torch.randn(padded, width, generator=make, dtype=torch.float64) * 1.5 / width**0.5
    weight = weight.to(dtype)
    targets = torch.randint(0, vocab, (n,), generator=make)
    g, h = torch.randn(2, n, generator=make)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, g, h


def run(way, hidden, weight, targets, g, h, **arguments):
    """(result, a loss that backward can start from): sum of g logprob + h entropy, or g logprob alone."""
    arguments = {"group": None, **arguments}
    if way == "two pass":
        got = selected_logprobs(hidden, weight, targets, **arguments)
        return got, (got.logprob * g + got.entropy * h).sum()
    if way == "one pass":
        got = selected_logprobs(
            hidden, weight, targets, token_loss=lambda lp, _, rows: lp * g[rows], **arguments
        )
    else:
        got = selected_logprobs(
            hidden,
            weight,
            targets,
            token_loss=lambda lp, entropy, rows: lp * g[rows] + entropy * h[rows],
            entropy_gradient=True,
            **arguments,
        )
    return got, got.loss


def reference(way, hidden, weight, targets, g, h, **arguments):
    """The same in fp64: result, gradients of hidden and weight."""
    inputs = tuple(x.detach().double().requires_grad_() for x in (hidden, weight))
    want = reference_logprobs(*inputs, targets, **arguments)
    loss = (want.logprob * g).sum()
    if way != "one pass":
        loss = loss + (want.entropy * h).sum()
    return want, torch.autograd.grad(loss, inputs), float(loss.detach())


def assert_close(got, want, tol):
    """Relative to the largest entry, so that a sum's cancellation is judged against its scale."""
    assert got.shape == want.shape and torch.isfinite(got).all()
    if want.numel():
        got, want = got.detach().double(), want.detach().double()
        worst = float((got - want).abs().max() / want.abs().max())
        assert worst < tol, worst


CASES = [  # N, H, vocab, padded, temperature, chunk, softcap
    (13, 16, 101, 101, 1.0, 4, None),  # the last chunk is shorter
    (13, 16, 101, 104, 0.7, 5, None),  # padding, temperature
    (7, 8, 50, 64, 1.0, 100, None),  # chunk larger than N
    (1, 8, 50, 50, 2.5, 1, None),
    (9, 16, 101, 104, 0.7, 4, 1.5),  # a soft-cap that bends most logits
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n, width, vocab, padded, temperature, chunk, softcap", CASES)
def test_values_and_gradients_match_the_reference(
    way, n, width, vocab, padded, temperature, chunk, softcap
):
    inputs = problem(n, width, vocab, padded)
    hidden, weight = inputs[:2]
    plain = {"vocab_size": vocab, "temperature": temperature, "softcap": softcap}
    got, loss = run(way, *inputs, chunk=chunk, **plain)
    want, gradients, value = reference(way, *inputs, **plain)
    assert got.logprob.dtype == got.entropy.dtype == torch.float32
    assert_close(got.logprob, want.logprob, 1e-6)
    assert_close(got.entropy, want.entropy, 1e-6)
    assert float(loss.detach()) == pytest.approx(value, rel=2e-6)
    loss.backward()
    assert_close(hidden.grad, gradients[0], 1e-6)
    assert_close(weight.grad, gradients[1], 1e-6)
    assert not weight.grad[vocab:].any()


def test_the_two_ways_agree_on_a_ppo_loss():
    """One pass differentiates what it is given, clipped rows included."""
    hidden, weight, targets, advantage, noise = problem(11, 8, 60, 64)
    arguments = {"group": None, "vocab_size": 60, "temperature": 0.7, "chunk": 3}
    with torch.no_grad():
        old = selected_logprobs(hidden, weight, targets, **arguments).logprob + noise

    def ppo(logprob, _, rows):
        ratio = (logprob - old[rows]).exp()
        a = advantage[rows]
        return torch.maximum(-ratio * a, -ratio.clamp(0.8, 1.28) * a)

    one = selected_logprobs(hidden, weight, targets, token_loss=ppo, **arguments)
    mine = torch.autograd.grad(one.loss, (hidden, weight))
    two = selected_logprobs(hidden, weight, targets, **arguments)
    loss = ppo(two.logprob, two.entropy, slice(0, 11)).sum()
    theirs = torch.autograd.grad(loss, (hidden, weight))
    assert_close(one.loss, loss, 1e-6)
    for a, b in zip(mine, theirs, strict=True):
        assert_close(a, b, 1e-6)


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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_what_needs_a_gradient_gets_one(way, frozen):
    inputs = problem(6, 8, 30, 32)
    hidden, weight = inputs[:2]
    arguments = {"vocab_size": 30, "temperature": 1.0, "chunk": 4}
    full = torch.autograd.grad(run(way, *inputs, **arguments)[1], (hidden, weight))
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    run(way, *inputs, **arguments)[1].backward()
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (weight.grad is None) == (frozen == "weight")
    trained, want = (weight, full[1]) if frozen == "hidden" else (hidden, full[0])
    assert torch.equal(trained.grad, want)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck(softcap):
    hidden, weight, targets, _, _ = problem(5, 3, 7, 8, torch.float64)

    def both(hidden, weight):
        got = selected_logprobs(
            hidden,
            weight,
            targets,
            group=None,
            vocab_size=7,
            temperature=0.7,
            chunk=2,
            softcap=softcap,
        )
        return got.logprob, got.entropy

    assert torch.autograd.gradcheck(both, (hidden, weight), eps=1e-6, atol=1e-9)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_keep_fp32_logits(way, dtype):
    """Values as exact as in fp32 (a bf16 logit is off by 1e-2), gradients to 16-bit rounding."""
    inputs = problem(9, 32, 201, 208, dtype)
    got, loss = run(way, *inputs, vocab_size=201, temperature=0.7, chunk=4)
    want, gradients, _ = reference(way, *inputs, vocab_size=201, temperature=0.7)
    assert got.logprob.dtype == got.entropy.dtype == torch.float32
    assert_close(got.logprob, want.logprob, 2e-6)
    assert_close(got.entropy, want.entropy, 2e-6)
    for a, b in zip(torch.autograd.grad(loss, inputs[:2]), gradients, strict=True):
        assert a.dtype == dtype
        assert_close(a, b, 2 ** (-8 if dtype == torch.bfloat16 else -11))


@pytest.mark.parametrize("way", WAYS)
def test_huge_logits_stay_finite(way):
    """Logits of +-1e4: no overflow, and the log-prob of a certain token is 0, not a rest of rounding."""
    hidden, weight, targets, g, h = problem(6, 4, 40, 40)
    with torch.no_grad():
        weight.mul_(4e3)
        logits = hidden @ weight.T
        targets[:3] = logits.argmax(1)[:3]
    assert float(logits.abs().max()) > 1e4
    got, loss = run(way, hidden, weight, targets, g, h, vocab_size=40, temperature=1.0, chunk=4)
    loss.backward()
    for x in (got.logprob, got.entropy, hidden.grad, weight.grad):
        assert torch.isfinite(x).all()
    want = reference_logprobs(hidden, weight, targets, vocab_size=40, temperature=1.0)
    assert_close(got.logprob, want.logprob, 1e-6)
    assert got.logprob[:3].tolist() == [0.0] * 3


@pytest.mark.parametrize("way", WAYS)
def test_weight_gradients_add_up_in_main_grad_in_fp32(way):
    """Micro-batches of a bf16 head: nothing is rounded to bf16 in between, and autograd gets a stand-in."""
    total = torch.zeros(32, 8)
    weight = None
    want = torch.zeros(32, 8, dtype=torch.float64)
    for seed in range(3):
        inputs = list(problem(6, 8, 30, 32, torch.bfloat16, seed))
        weight = weight if weight is not None else inputs[1]
        weight.main_grad, inputs[1] = total, weight
        weight.grad_added_to_main_grad = False
        run(way, *inputs, vocab_size=30, temperature=0.7, chunk=4)[1].backward()
        assert weight.grad_added_to_main_grad
        weight.grad = None  # as Megatron's hook does
        want += reference(way, *inputs, vocab_size=30, temperature=0.7)[1][1]
    assert weight.main_grad is total
    assert_close(total, want, 2e-6)


def test_a_tied_weight_gets_both_gradients():
    """Megatron marks a weight that is the embedding, too: what autograd gets from the head must then be zeros."""
    _, weight, targets, g, h = problem(6, 8, 30, 32)
    tokens = torch.tensor([3, 1, 4, 1, 5, 9])
    weight.main_grad = torch.zeros(32, 8)
    weight.zero_out_wgrad = True
    inputs = (torch.nn.functional.embedding(tokens, weight), weight, targets, g, h)
    run("one pass, entropy", *inputs, vocab_size=30, temperature=1.0, chunk=4)[1].backward()
    both = weight.main_grad + weight.grad
    exact = weight.detach().double().requires_grad_()
    want = reference_logprobs(exact[tokens], exact, targets, vocab_size=30, temperature=1.0)
    (want.logprob * g + want.entropy * h).sum().backward()
    assert_close(both, exact.grad, 1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_scoring_keeps_nothing_and_touches_no_gradient(way):
    inputs = problem(5, 8, 30, 32)
    weight = inputs[1]
    weight.main_grad = torch.zeros(32, 8)
    arguments = {"vocab_size": 30, "temperature": 1.0, "chunk": 4}
    with torch.no_grad():
        scored, loss = run(way, *inputs, **arguments)
    assert scored.logprob.grad_fn is None and scored.entropy.grad_fn is None
    assert not weight.main_grad.any() and not hasattr(weight, "grad_added_to_main_grad")
    trained, trained_loss = run(way, *inputs, **arguments)
    for a, b in ((scored.logprob, trained.logprob), (scored.entropy, trained.entropy)):
        assert_close(a, b, 1e-6)
    assert_close(loss, trained_loss, 1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_no_rows(way):
    inputs = problem(0, 8, 30, 32)
    got, loss = run(way, *inputs, vocab_size=30, temperature=1.0, chunk=4)
    assert got.logprob.shape == got.entropy.shape == (0,)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert inputs[0].grad.shape == (0, 8) and not inputs[1].grad.any()


def test_another_upstream_gradient_is_refused_in_one_pass():
    inputs = problem(5, 8, 30, 32)
    _, loss = run("one pass", *inputs, vocab_size=30, temperature=1.0, chunk=4)
    with pytest.raises(RuntimeError, match="upstream gradient 0.5: .* formed in forward"):
        (loss / 2).backward()


def test_calls_inside_a_token_loss_and_after_one_that_raised_have_buffers_of_their_own():
    hidden, weight, targets, g, h = problem(9, 8, 50, 50)
    arguments = {"group": None, "vocab_size": 50, "temperature": 1.0, "chunk": 4}
    want = torch.autograd.grad(
        run("one pass", hidden, weight, targets, g, h, **arguments)[1], (hidden, weight)
    )

    def inner(logprob, _, rows):
        other = problem(9, 8, 50, 50, seed=1)
        run("one pass", *other, **arguments)[1].backward()
        return logprob * g[rows]

    def raising(logprob, _, rows):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        selected_logprobs(hidden, weight, targets, token_loss=raising, **arguments)
    nested = selected_logprobs(hidden, weight, targets, token_loss=inner, **arguments)
    got = torch.autograd.grad(nested.loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_one_pass_allocates_its_buffer_once(monkeypatch):
    """On a CPU, where the pages of fresh memory cost more than the softmax."""
    allocated, buffer = [], Head.buffer
    monkeypatch.setattr(Head, "buffer", lambda head, n: (allocated.append(n), buffer(head, n))[1])
    inputs = problem(9, 8, 3000, 3000)  # more than any other test's
    arguments = {"group": None, "vocab_size": 3000, "temperature": 1.0, "chunk": 9}
    for _ in range(2):
        run("one pass", *inputs, **arguments)
    assert allocated == [9 * 3000]


def test_an_unannounced_entropy_is_refused():
    hidden, weight, targets, _, _ = problem(5, 8, 30, 32)
    with pytest.raises(ValueError, match="depends on the entropy; say entropy_gradient=True"):
        selected_logprobs(
            hidden,
            weight,
            targets,
            group=None,
            vocab_size=30,
            temperature=1.0,
            chunk=4,
            token_loss=lambda logprob, entropy, rows: logprob - entropy,
        )


PEAK = """
import sys, torch
from pathlib import Path
from agpo_megatron.logprob.fused import selected_logprobs
from agpo_megatron.logprob.projection import Head

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def run(n):
    if sys.argv[1] == "score":
        with torch.no_grad():
            return selected_logprobs(hidden[:n], weight, targets[:n], **arguments)
    if sys.argv[1] == "plain":
        log_p = (hidden[:n] @ weight.T).log_softmax(-1)
        return log_p.gather(1, targets[:n, None]).sum().backward()
    if sys.argv[1] == "two pass":
        got = selected_logprobs(hidden[:n], weight, targets[:n], **arguments)
        return (got.logprob + got.entropy).sum().backward()
    both = sys.argv[1] != "one pass"
    loss = (lambda l, h, rows: l + h) if both else (lambda l, h, rows: l)
    got = selected_logprobs(
        hidden[:n], weight, targets[:n], token_loss=loss, entropy_gradient=both, **arguments
    )
    got.loss.backward()

torch.set_num_threads(1)
T, V, H = 4096, 24000, 8
hidden, targets = torch.randn(T, H, requires_grad=True), torch.randint(V, (T,))
weight = torch.randn(V, H, requires_grad=True)
weight.main_grad = torch.randn(V, H)
arguments = dict(group=None, vocab_size=V, temperature=1.0, chunk=256)
run(1)
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
run(T)
print((resident("VmHWM") - before) / (4 * T * V))
"""


@pytest.mark.processes
@pytest.mark.parametrize("way", [*WAYS, "score", "plain"])
def test_peak_memory(way):
    """Growth of the resident set beyond inputs and dW, in units of the logits of all rows (393 MB), measured."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, way],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    peak = float(done.stdout)
    if way == "plain":
        assert peak > 1.0, "the measurement would not see the logits"
    else:
        assert peak < 1 / 8


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": 0.0}, "temperature 0.0 must be positive"),
        ({"temperature": math.nan}, "must be positive"),
        ({"chunk": 0}, "chunk 0 must be positive"),
        ({"softcap": -1.0}, "softcap -1.0 must be positive"),
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
