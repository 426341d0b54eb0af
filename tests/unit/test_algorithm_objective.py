"""The loss of a micro-batch by itself, without a model: worked numbers of the scopes, finite differences, precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import changed, loss, sequence
from torch import Tensor

from agpo_megatron.algorithm.aggregation import sequence_weights
from agpo_megatron.algorithm.gate import Adaptive, PartSum, gate_of, on_policy_parts
from agpo_megatron.algorithm.loss import POLICY_LOSSES, micro_batch_loss, row_loss
from agpo_megatron.algorithm.loss_rows import LossRows
from agpo_megatron.algorithm.settings import AlgorithmSettings, LossSettings
from agpo_megatron.policy.packing import pack
from agpo_megatron.samples import TrainSequence

fast = settings(max_examples=40, deadline=None)


def sequences(lengths: Sequence[int], advantages: Sequence[float]) -> list[TrainSequence]:
    """Groups of two; ``lengths``: trained tokens, weighted by token_mean. One prompt token before them."""
    weights = sequence_weights(lengths, lengths, "token_mean")
    return [
        sequence(f"g{i // 2}.{i % 2}", [1] * (n + 1), w, [0] + [1] * n, a)
        for i, (n, w, a) in enumerate(zip(lengths, weights, advantages, strict=True))
    ]


def on_policy(how: LossSettings, work: Sequence[TrainSequence]) -> tuple[float, float]:
    """(L, phi(L)) of one micro-batch at ratio 1."""
    batch = pack(work, 16)
    logprob = torch.full((len(batch.rows),), -1.0, dtype=torch.float64, requires_grad=True)
    _, stats = micro_batch_loss(how, logprob, logprob.detach(), batch.loss)
    return float(stats["loss"]), float(stats["adapted"])


def test_scopes_of_the_loss_clip_worked_example() -> None:
    """Groups A = +1, -1 each, lengths 300, 100 and 100, 200; micro-batches are the groups."""
    work = sequences([300, 100, 100, 200], [1.0, -1.0, 1.0, -1.0])
    parts = on_policy_parts(work)
    gate = gate_of(loss(adaptive="max0"), [parts])
    assert gate.loss == pytest.approx(-0.142857, abs=6e-7)
    assert (gate.value, set(gate.gains.values())) == (0.0, {0.0})
    by_group = gate_of(loss(adaptive="max0", scope="group"), [parts])
    assert by_group.value == pytest.approx(0.142857, abs=6e-7)
    assert by_group.gains == {"g0": 0.0, "g1": 1.0}

    clip = loss(adaptive="max0", scope="micro_batch")
    first, second = on_policy(clip, work[:2]), on_policy(clip, work[2:])
    shares = [400 / 700, 300 / 700]
    assert [first[0] / shares[0], second[0] / shares[1]] == pytest.approx([-0.5, 1 / 3], abs=6e-7)
    assert first[1] + second[1] == pytest.approx(0.142857, abs=6e-7)
    whole = on_policy(loss(adaptive="max0", scope="sequence"), work)
    assert whole == pytest.approx((-0.142857, 0.428571), abs=6e-7)


def test_parts_of_all_ranks_count_once() -> None:
    """A group whose samples lie on two ranks has one loss."""
    work = sequences([300, 100, 100, 200], [1.0, -1.0, 1.0, -1.0])
    how = loss(adaptive="exp", scope="group")
    together = gate_of(how, [on_policy_parts(work)])
    apart = gate_of(how, [on_policy_parts(work[::2]), {}, on_policy_parts(work[1::2])])
    assert apart.gains == pytest.approx(together.gains)
    assert apart.value == pytest.approx(together.value)
    nothing = gate_of(how, [{}, {}])
    assert (nothing.loss, nothing.value, nothing.gains) == (0.0, 0.0, {})


MODES = ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"]
Packs = list[list[list[TrainSequence]]]
"""Micro-batches by rank."""


def summed(
    how: LossSettings, ranks: Packs, known: dict[str, float] | None
) -> tuple[float, dict[str, float]]:
    """What all ranks add up to: the gradient with respect to one parameter of every log-prob, and the sums.
    ``known``: gains by group, folded in before backward."""
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    sums = {"loss": 0.0, "scale": 0.0, "tokens": 0.0}
    for micro_batches in ranks:
        for some in micro_batches:
            batch = pack(some, 16)
            rows = batch.loss
            if known is not None:
                names = [span.sample_id.partition(".")[0] for span in batch.spans]
                rows = replace(rows, gains=torch.tensor([known.get(n, 1.0) for n in names]))
            logprob = -1.0 + theta * batch.targets.double()
            total, stats = micro_batch_loss(how, logprob, logprob.detach(), rows)
            total.backward()
            sums = {name: value + float(stats[name]) for name, value in sums.items()}
    assert theta.grad is not None
    return float(theta.grad), sums


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("adaptive", ["none", "max0", "exp"])
@settings(max_examples=10, deadline=None)
@given(
    places=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=8, max_size=8),
    advantages=st.lists(st.sampled_from([-1.5, -0.5, 0.0, 0.7, 1.2]), min_size=8, max_size=8),
)
def test_ranks_and_micro_batches_change_neither_loss_nor_gradient(
    mode: str,
    masked: bool,
    adaptive: str,
    places: list[tuple[int, int]],
    advantages: list[float],
) -> None:
    """Eight samples on up to three ranks with up to two micro-batches each, some of them empty; the gain folded in
    before backward, and the same one multiplied in afterwards."""
    lengths = [3, 7, 2, 5, 9, 1, 4, 6]
    trained = [0 if masked and a == 0 else n for n, a in zip(lengths, advantages, strict=True)]
    weights = sequence_weights(trained, trained, mode, 8)
    work = [
        sequence(
            s.sample_id,
            [(5 * i + t) % 11 for t in range(s.length)],
            w,
            [0, *s.loss_mask],
            s.scalar("advantage"),
        )
        for i, (s, w) in enumerate(zip(sequences(lengths, advantages), weights, strict=True))
    ]
    ranks: Packs = [[[], []], [[], []], [[], []]]
    for one, (rank, micro) in zip(work, places, strict=True):
        ranks[rank][micro].append(one)
    how = loss(adaptive=adaptive)
    plain, sums = summed(loss(), [[work]], None)
    gate = gate_of(how, [on_policy_parts(work)])
    shares = [on_policy_parts([s for some in rank for s in some]) for rank in ranks]
    split_gate = gate_of(how, shares)
    assert split_gate.loss == pytest.approx(gate.loss, abs=1e-12)
    assert split_gate.gains == pytest.approx(gate.gains)
    assert gate.loss == pytest.approx(sums["loss"], abs=1e-6)
    known, its = summed(how, ranks, split_gate.gains)
    gain = Adaptive.of(how.clip).gain(its["loss"], its["scale"])
    assert its == pytest.approx(sums, abs=1e-12)
    afterwards = gain * summed(loss(), ranks, None)[0]
    whole = gain * plain
    assert [known, afterwards] == pytest.approx([whole, whole], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("scope", ["batch", "group"])
def test_a_loss_that_is_not_finite_is_not_hidden_by_the_gate(scope: str) -> None:
    with pytest.raises(ValueError, match="policy loss is nan"):
        gate_of(
            loss(adaptive="max0", scope=scope),
            [{"g0": PartSum(1.0, math.nan, 1.0)}],
        )


# --- finite differences and precision --------------------------------------------------------

LENGTHS, ADVANTAGES = [3, 4, 1, 2], [1.0, -0.8, 0.6, -2.0]
N = sum(LENGTHS)


def off_policy(dtype: torch.dtype = torch.float64) -> tuple[LossRows, Tensor, Tensor]:
    """(rows of a pack, log-probs, entropies): ratios and references away from 1, away from every kink."""
    steps = [0.11, -0.25, 0.07, -0.03, 0.17, -0.09, 0.15, -0.05, 0.02, -0.12]
    work, rows = [], iter(range(N))
    for s in sequences(LENGTHS, ADVANTAGES):
        mine = [next(rows) for _ in s.trained()]
        old = [-2.0 + 0.05 * i for i in mine]
        work.append(
            changed(
                s,
                old_logprobs=[0.0, *old],
                ref_logprobs=[0.0, *(x + 0.3 - 0.06 * i for i, x in zip(mine, old, strict=True))],
                correction=[0.0, *(0.5 + 0.1 * i for i in mine)],
            )
        )
    batch = pack(work, 16).loss
    logprob = batch.column("old_logprobs", dtype) + torch.tensor(steps, dtype=dtype)
    entropy = torch.linspace(0.4, 1.6, N, dtype=dtype)
    return batch, logprob.requires_grad_(), entropy.requires_grad_()


def slopes(value: Callable[[Tensor], float], at: Tensor, step: float = 1e-6) -> list[float]:
    """Central differences of ``value`` at ``at``, entry by entry."""
    found = []
    for i in range(len(at)):
        move = torch.zeros_like(at)
        move[i] = step
        found.append((value(at + move) - value(at - move)) / (2 * step))
    return found


def reported(how: LossSettings, stats: dict[str, Tensor]) -> float:
    """The objective by its parts: phi of the policy loss, KL, entropy."""
    policy = stats["loss"] if how.clip.kind == "none" else stats["adapted"]
    other = how.kl_coef * stats["kl"] - how.entropy.coef * stats["weighted_entropy"]
    return float(policy + other)


VALUED = sorted(set(POLICY_LOSSES) - {"cispo", "gspo_token", "sapo", "nll"})
"""Losses whose reported surrogate is the function that they differentiate."""


@pytest.mark.parametrize("policy", VALUED)
@pytest.mark.parametrize(
    "phi",
    [
        {},
        *(
            {"adaptive": kind, "scope": scope, "tau": 0.7}
            for kind in ("max0", "exp", "elu", "softplus")
            for scope in ("micro_batch", "sequence", "token")
        ),
    ],
    ids=lambda phi: "-".join(str(v) for v in phi.values()) or "none",
)
def test_gradients_of_the_whole_objective(policy: str, phi: dict[str, object]) -> None:
    """Policy loss with phi at every scope within a pack, correction, KL and entropy bonus, together."""
    how = loss(policy=policy, kl_coef=0.3, entropy_coef=0.2, **phi)
    batch, logprob, entropy = off_policy()
    total, _ = micro_batch_loss(how, logprob, entropy, batch)
    total.backward()

    def of_logprob(x: Tensor) -> float:
        return reported(how, micro_batch_loss(how, x, entropy, batch)[1])

    def of_entropy(x: Tensor) -> float:
        return reported(how, micro_batch_loss(how, logprob, x, batch)[1])

    assert logprob.grad is not None and entropy.grad is not None
    with torch.no_grad():
        assert logprob.grad.tolist() == pytest.approx(slopes(of_logprob, logprob), abs=1e-8)
        assert entropy.grad.tolist() == pytest.approx(slopes(of_entropy, entropy), abs=1e-8)
    assert logprob.grad.abs().min() > 0 or phi


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("importance", [False, True])
def test_gradients_of_kl(estimator: str, importance: bool) -> None:
    how = loss(kl_coef=1.0, kl_estimator=estimator, kl_importance=importance)
    batch, logprob, entropy = off_policy()
    flat = replace(batch, per_token={**batch.per_token, "advantage": torch.zeros(N)})
    total, _ = micro_batch_loss(how, logprob, entropy, flat)
    total.backward()

    def value(x: Tensor) -> float:
        return float(micro_batch_loss(how, x, entropy, flat)[1]["kl"])

    assert logprob.grad is not None
    with torch.no_grad():
        assert logprob.grad.tolist() == pytest.approx(slopes(value, logprob), abs=1e-8)


@pytest.mark.parametrize("policy", POLICY_LOSSES)
@fast
@given(
    noise=st.lists(st.floats(-0.6, 0.6), min_size=N, max_size=N),
    kind=st.sampled_from(["none", "exp", "elu", "softplus"]),
    scope=st.sampled_from(["micro_batch", "sequence", "token"]),
)
def test_fp32_agrees_with_fp64(policy: str, noise: list[float], kind: str, scope: str) -> None:
    """Value and gradient of every loss with every smooth phi; at a kink of the clip either side may be taken."""
    how = loss(policy=policy, adaptive=kind, scope=scope, kl_coef=0.1, entropy_coef=0.1)
    found = []
    for dtype in (torch.float32, torch.float64):
        batch, start, entropy = off_policy(dtype)
        logprob = (start.detach() + torch.tensor(noise, dtype=dtype)).requires_grad_()
        total, stats = micro_batch_loss(how, logprob, entropy, batch)
        total.backward()
        assert logprob.grad is not None
        found.append((float(total.detach()), float(stats["loss"]), logprob.grad.tolist()))
        if any(abs(abs(x) - b) < 1e-4 for x in _log_ratios(batch, logprob) for b in KINKS):
            return
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4, abs=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4, abs=1e-5)
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-3, abs=1e-5)


KINKS = (math.log(1.28), -math.log(0.8), 0.28, 0.2)
"""Where PPO's and GSPO's ratios, and GMPO's log-ratios, meet their bounds."""


def _log_ratios(rows: LossRows, logprob: Tensor) -> list[float]:
    ratio = logprob.detach() - rows.column("old_logprobs")
    means = [float(ratio[rows.sequence == i].mean()) for i in range(rows.sequences)]
    return [*ratio.tolist(), *means]


@fast
@given(
    order=st.permutations(range(4)),
    adaptive=st.sampled_from(["none", "max0", "exp"]),
    scope=st.sampled_from(["micro_batch", "sequence", "token"]),
    policy=st.sampled_from(list(POLICY_LOSSES)),
)
def test_the_order_of_samples_does_not_matter(
    order: list[int], adaptive: str, scope: str, policy: str
) -> None:
    how = loss(policy=policy, adaptive=adaptive, scope=scope)
    work = sequences([3, 3, 3, 3], ADVANTAGES)
    totals = []
    for some in (work, [work[i] for i in order]):
        rows = pack(some, 16).loss
        shift = torch.tensor([float(s.sample_id[1]) + float(s.sample_id[3]) for s in some])
        old = torch.full((12,), -1.0, dtype=torch.float64)
        logprob = old + 0.1 * shift.repeat_interleave(3).double()
        rows = replace(rows, per_token={"old_logprobs": old})
        totals.append(float(micro_batch_loss(how, logprob, logprob, rows)[0]))
    assert totals[0] == pytest.approx(totals[1], rel=1e-12)


def test_an_all_masked_pack_is_no_loss_and_no_nan() -> None:
    for phi in ({}, *({"adaptive": k, "scope": "sequence"} for k in ("max0", "exp"))):
        how = loss(kl_coef=0.1, entropy_coef=0.1, **phi)
        for work in ([], [changed(s, loss_weight=0.0) for s in sequences([2, 3], [1.0, -1.0])]):
            batch = pack(work, 16).loss
            empty = torch.zeros(0, requires_grad=True)
            total, stats = micro_batch_loss(how, empty, empty, batch)
            total.backward()
            assert total == 0 and all(value == 0 for value in stats.values())
            assert empty.grad is not None and not empty.grad.any()


ROW_BY_ROW = ("ppo", "cispo", "sapo", "nll")


@pytest.mark.parametrize("policy", POLICY_LOSSES)
@pytest.mark.parametrize("scope", ["batch", "micro_batch", "group", "sequence", "token"])
@pytest.mark.parametrize("adaptive", ["none", "max0", "exp"])
def test_row_by_row_the_loss_and_its_gradient_are_the_same(
    policy: str, scope: str, adaptive: str
) -> None:
    """What one pass is given is the loss of the pack, cut anywhere; where it cannot be, there is nothing to give."""
    how = loss(
        policy=policy,
        adaptive=adaptive,
        scope=scope,
        kl_coef=0.3,
        entropy_coef=0.2,
    )
    batch, logprob, entropy = off_policy()
    if adaptive != "none" and scope == "group":  # decided before, and folded in
        batch = replace(batch, gains=torch.linspace(0.2, 1.4, batch.sequences))
    rows = row_loss(how, batch)
    local = adaptive != "none" and scope in ("micro_batch", "sequence")
    assert (rows is None) == (policy not in ROW_BY_ROW or local)
    if rows is None:
        return
    total, _ = micro_batch_loss(how, logprob, entropy, batch)
    want = torch.autograd.grad(total, (logprob, entropy))
    parts = [rows(logprob[cut], entropy[cut], cut) for cut in (slice(0, 5), slice(5, N))]
    assert [len(part) for part in parts] == [5, N - 5]
    mine = torch.cat(parts).sum()
    assert float(mine.detach()) == pytest.approx(float(total.detach()), rel=1e-12)
    for a, b in zip(torch.autograd.grad(mine, (logprob, entropy)), want, strict=True):
        assert a.tolist() == pytest.approx(b.tolist(), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("one, other", [("grpo", "cispo"), ("gspo", "gmpo"), ("gspo", "sapo")])
def test_presets_that_agree_at_ratio_one_differ_from_the_second_update_on(
    one: str, other: str
) -> None:
    gradients: dict[str, list[list[float]]] = {}
    for preset in (one, other):
        how = AlgorithmSettings.model_validate({"preset": preset}).loss
        weights = sequence_weights(LENGTHS, LENGTHS, how.aggregation)
        rows, moved, entropy = off_policy()
        rows = replace(
            rows,
            per_token={"old_logprobs": rows.column("old_logprobs")},
            per_sequence={**rows.per_sequence, "loss_weight": torch.tensor(weights)},
        )
        for logprob in (rows.column("old_logprobs", torch.float64).requires_grad_(), moved):
            total, _ = micro_batch_loss(how, logprob, entropy, rows)
            (gradient,) = torch.autograd.grad(total, logprob)
            gradients.setdefault(preset, []).append(gradient.tolist())
    (first, later), (its_first, its_later) = gradients[one], gradients[other]
    assert first == pytest.approx(its_first, rel=1e-9)
    assert later != pytest.approx(its_later, rel=1e-2)
