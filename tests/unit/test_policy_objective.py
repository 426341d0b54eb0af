"""The loss of a whole step on the real policy: the same however it is split, with every adaptive part and term."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import policy_models
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made import changed, loss, trained

from agpo_megatron.algorithm.aggregation import sequence_weights
from agpo_megatron.config.schema import PolicyConfig
from agpo_megatron.samples import TrainSequence

pytestmark = pytest.mark.processes

MODES = ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"]
ADVANTAGES = [1.2, -0.6, -0.6, 0.0, 0.0, 0.9, -1.1, 0.2]
LENGTHS = [12, 20, 7, 9, 15, 18, 6, 11]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = policy_models.save(policy_models.hf_model("llama"), tmp_path_factory.mktemp("m") / "h")
    with policy_models.one_rank(
        folder, PolicyConfig(dtype="fp32", distributed_optimizer=False)
    ) as built:
        yield built


def batch(mode: str = "token_mean", masked: bool = False, sign: float = 1.0) -> list[TrainSequence]:
    """Four groups of two; samples without advantage are masked or dilute the others."""
    plain = policy_models.sequences(LENGTHS)
    counts = [len(s.trained()) for s in plain]
    kept = [0 if masked and a == 0 else n for n, a in zip(counts, ADVANTAGES, strict=True)]
    weights = sequence_weights(kept, kept, mode, 16)  # type: ignore[arg-type]
    return [
        replace(changed(s, loss_weight=w, advantage=sign * a), sample_id=f"g{i // 2}.{i % 2}")
        for i, (s, w, a) in enumerate(zip(plain, weights, ADVANTAGES, strict=True))
    ]


def run(
    trainer: Any, micro_batches: Sequence[Sequence[TrainSequence]], **changes: Any
) -> tuple[dict[str, float], torch.Tensor]:
    """Statistics and the gradient of one update that does not move the weights."""
    from agpo_megatron.policy import weights

    stats = trainer.update(micro_batches, loss=loss(**changes), lr=0.0)
    parameters = weights.global_parameters(trainer.chunks)
    return stats, torch.cat([parameters[n].main_grad.flatten() for n in sorted(parameters)])


def on_policy(sequences: Sequence[TrainSequence]) -> float:
    return -math.fsum(
        s.scalar("loss_weight") * len(s.trained()) * s.scalar("advantage") for s in sequences
    )


def scored(policy: Any, sequences: Sequence[TrainSequence], shift: float) -> list[TrainSequence]:
    """With old log-probs a little off: ratios around exp(+-shift)."""
    scores = policy.score([sequences])
    return [
        changed(
            s,
            old_logprobs=[
                x + shift * math.sin(3 * t + i) for t, x in enumerate(scores[s.sample_id].logprobs)
            ],
        )
        for i, s in enumerate(sequences)
    ]


def shorter_of_two(work: list[TrainSequence]) -> list[tuple[TrainSequence, int]]:
    """Each sequence with the length of the shorter one of its group."""
    pairs = zip(work[::2], work[1::2], strict=True)
    return [(s, min(a.length, b.length)) for a, b in pairs for s in (a, b)]


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-9))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("adaptive", ["none", "max0", "exp"])
def test_splitting_changes_neither_loss_nor_gradient(
    policy: Any, mode: str, masked: bool, adaptive: str
) -> None:
    @settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.permutations(range(8)), st.integers(1, 4), st.booleans())
    def check(order: list[int], micro: int, positive: bool) -> None:
        work = batch(mode, masked, 1.0 if positive else -1.0)
        moved = [work[i] for i in order]
        parts = [moved[i : i + micro] for i in range(0, 8, micro)]
        whole, gradient = run(policy, [work], adaptive=adaptive)
        split, its = run(policy, parts, adaptive=adaptive)
        assert whole["loss/unclipped"] == pytest.approx(on_policy(work), abs=1e-6)
        assert split["loss/policy"] == pytest.approx(whole["loss/policy"], abs=1e-6)
        gates = [stats["loss/clip_gate"] for stats in (split, whole) if adaptive != "none"]
        assert gates[:1] == pytest.approx(gates[1:], abs=1e-6)
        assert same(its, gradient)

    check()


@pytest.mark.parametrize("kind", ["max0", "exp", "elu", "softplus"])
@pytest.mark.parametrize("shift", [0.0, 0.1])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_gradient_is_that_of_the_policy_loss_times_the_gain(
    policy: Any, kind: str, shift: float, sign: float
) -> None:
    """The gain is that of the loss at ratio 1, whatever the ratios."""
    work = batch(sign=sign)
    if shift:
        work = scored(policy, work, shift)
    plain, gradient = run(policy, [work[:3], work[3:]])
    stats, adapted = run(policy, [work[:3], work[3:]], adaptive=kind, tau=0.5)
    loss = on_policy(work)
    assert (abs(plain["loss/unclipped"] - loss) > 1e-4) == bool(shift), "ratios that matter"
    gains = {
        "max0": float(loss > 0),
        "exp": math.exp(loss / 0.5),
        "elu": min(1.0, math.exp(loss / 0.5)),
        "softplus": 1 / (1 + math.exp(-loss / 0.5)),
    }
    assert loss != 0
    assert stats["loss/unclipped"] == pytest.approx(loss, abs=1e-6)
    assert stats["loss/clip_gate"] == pytest.approx(gains[kind], rel=1e-5)
    assert same(adapted, gains[kind] * gradient)


@pytest.mark.parametrize("scope", ["batch", "group"])
@pytest.mark.parametrize("how", ["ratio 1", "old log-probs", "correction", "rollout log-probs"])
def test_a_closed_gate_runs_nothing(
    policy: Any, monkeypatch: pytest.MonkeyPatch, scope: str, how: str
) -> None:
    """Whatever the ratios and corrections: those here would turn the sign of the loss."""
    from agpo_megatron.policy import step

    work = batch(sign=math.copysign(1.0, -on_policy(batch())))
    if scope == "group":
        work = [changed(s, advantage=-1.0 + 2 * (s.length > n)) for s, n in shorter_of_two(work)]
    far = [[-9.0 if s.scalar("advantage") < 0 else 9.0] * s.length for s in work]
    name = {"old log-probs": "old_logprobs", "rollout log-probs": "rollout_logprobs"}.get(how)
    if name:
        work = [changed(s, **{name: x}) for s, x in zip(work, far, strict=True)]
    elif how == "correction":
        up = [[9.0 if x[0] < 0 else 0.1] * len(x) for x in far]
        work = [changed(s, correction=c) for s, c in zip(work, up, strict=True)]
    old = {"old_logprobs": "rollout"} if how == "rollout log-probs" else {}
    monkeypatch.setattr(step, "_run", lambda *_, **__: pytest.fail("a pass was run"))
    stats, gradient = run(policy, [work], adaptive="max0", scope=scope, **old)
    assert stats["loss/unclipped"] == pytest.approx(on_policy(work)) and on_policy(work) < 0
    assert (stats["loss/policy"], stats["loss/clip_gate"], stats["grad_norm"]) == (0, 0, 0)
    assert not gradient.any() and "policy/entropy" not in stats


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_the_clip_does_not_gate_kl_and_entropy(policy: Any, shift: float) -> None:
    work = batch(sign=math.copysign(1.0, -on_policy(batch())))
    if shift:
        work = scored(policy, work, shift)
    scores = policy.score([work])
    ref = {
        k: [x - 0.3 + 0.1 * (t % 4) for t, x in enumerate(s.logprobs)] for k, s in scores.items()
    }
    work = [changed(s, ref_logprobs=ref[s.sample_id]) for s in work]
    terms = {"kl_coef": 0.2, "entropy_coef": 0.1}
    closed, gradient = run(policy, [work[:5], work[5:]], adaptive="max0", **terms)
    flat = [changed(s, advantage=0.0) for s in work]
    expected, alone = run(policy, [flat[:2], flat[2:]], **terms)
    assert closed["loss/clip_gate"] == 0 and closed["loss/policy"] == 0
    assert closed["loss/unclipped"] < 0 and alone.any()
    assert same(gradient, alone)
    d = [scores[s.sample_id].logprobs[t] - ref[s.sample_id][t] for s in work for t in trained(s)]
    w = [s.scalar("loss_weight") for s in work for _ in trained(s)]
    kl = sum(x * (math.exp(-y) + y - 1) for x, y in zip(w, d, strict=True))
    assert closed["loss/kl"] == pytest.approx(kl, rel=1e-4)
    assert expected["loss/kl"] == pytest.approx(kl, rel=1e-4)
    # an open gate leaves both parts as they are
    _, both = run(policy, [work], adaptive="max0", minimum=-9.0, **terms)
    _, policy_part = run(policy, [work])
    assert same(both, policy_part + alone)


def test_on_total_gates_everything(policy: Any) -> None:
    work = batch(sign=math.copysign(1.0, -on_policy(batch())))
    terms = {"entropy_coef": 0.1}
    plain, gradient = run(policy, [work], **terms)
    stats, adapted = run(policy, [work[:4], work[4:]], adaptive="exp", on="total", **terms)
    weights = [s.scalar("loss_weight") for s in work for _ in trained(s)]
    total = stats["loss/unclipped"]
    assert total < plain["loss/unclipped"] < 0 and sum(weights) == pytest.approx(1)
    assert stats["loss/clip_gate"] == pytest.approx(math.exp(total), rel=1e-5)
    assert same(adapted, math.exp(total) * gradient)
    closed, nothing = run(policy, [work], adaptive="max0", on="total", when_clipped="step", **terms)
    assert closed["loss/clip_gate"] == 0 and not nothing.any()


@pytest.mark.parametrize("shift", [0.0, 0.1])
@pytest.mark.parametrize("scope", ["group", "sequence", "token"])
def test_scopes_gate_their_parts(policy: Any, scope: str, shift: float) -> None:
    """phi of each part: as if each part were a step of its own, weighted by W (eq. 1e)."""
    work = [s for s in batch(masked=True) if s.scalar("loss_weight")]
    if shift:
        work = scored(policy, work, shift)
    stats, gradient = run(policy, [work[:1], work[1:]], adaptive="exp", tau=0.7, scope=scope)
    if scope == "token":
        parts = [
            [replace(s, loss_mask=np.eye(s.length, dtype=np.uint8)[t, 1:])]
            for s in work
            for t in trained(s)
        ]
    elif scope == "sequence":
        parts = [[s] for s in work]
    else:
        parts = [[s for s in work if s.group_id == g] for g in sorted({s.group_id for s in work})]
    expected, value = torch.zeros_like(gradient), 0.0
    for part in parts:
        share = sum(s.scalar("loss_weight") * len(s.trained()) for s in part)
        plain, its = run(policy, [part])
        # Parts within a pack are decided on the loss itself, groups at ratio 1.
        argument = on_policy(part) if scope == "group" else plain["loss/unclipped"]
        gain = math.exp(argument / share / 0.7)
        expected += gain * its
        value += share * 0.7 * gain
    assert stats["loss/policy"] == pytest.approx(value, rel=1e-5)
    assert same(gradient, expected)


def test_micro_batch_scope_depends_on_the_split(policy: Any) -> None:
    work = [changed(s, advantage=a) for s, a in zip(batch()[:2], (1.0, -1.0), strict=True)]
    together, gradient = run(policy, [work], adaptive="max0", scope="micro_batch")
    apart, other = run(policy, [[s] for s in work], adaptive="max0", scope="micro_batch")
    alone, negative_only = run(policy, [[work[1]]])
    whole = run(policy, [work])[0]["loss/unclipped"]
    assert together["loss/policy"] == pytest.approx(max(whole, 0), abs=1e-6)
    assert apart["loss/policy"] == pytest.approx(alone["loss/unclipped"], rel=1e-5)
    assert same(other, negative_only) and not same(gradient, other)


def test_corrections_weigh_the_policy_loss_alone(policy: Any) -> None:
    work = batch()
    factors = [[0.5 + 0.1 * (t % 5) for t in range(s.length)] for s in work]
    corrected = [changed(s, correction=c) for s, c in zip(work, factors, strict=True)]
    stats, _ = run(policy, [corrected[:3], corrected[3:]])
    expected = -math.fsum(
        s.scalar("loss_weight") * s.scalar("advantage") * c[t]
        for s, c in zip(work, factors, strict=True)
        for t in trained(s)
    )
    assert stats["loss/unclipped"] == pytest.approx(expected, abs=1e-6)
    gated, _ = run(policy, [corrected], adaptive="exp")
    assert gated["loss/unclipped"] == pytest.approx(on_policy(work), abs=1e-9)
    assert abs(on_policy(work) - expected) > 1e-3
    flat = [changed(s, advantage=0.0) for s in corrected]
    _, one = run(policy, [flat], entropy_coef=0.1)
    _, other = run(policy, [[changed(s, advantage=0.0) for s in work]], entropy_coef=0.1)
    assert same(one, other)


@pytest.mark.parametrize("adaptive", ["none", "exp"])
def test_a_correction_in_the_update_is_that_of_scored_logprobs(policy: Any, adaptive: str) -> None:
    work, scores = batch(), policy.score([batch()])
    stale = []
    for i, s in enumerate(work):
        own = scores[s.sample_id].logprobs
        server = [x - math.sin(3 * t + i) for t, x in enumerate(own)]
        stale.append(changed(s, rollout_logprobs=server))
    how = {"correction": {"kind": "tis"}, "adaptive": adaptive}
    factors = {
        s.sample_id: np.minimum(
            np.exp(scores[s.sample_id].logprobs[1:] - s.columns["rollout_logprobs"]), 2.0
        )
        for s in stale
    }
    assert any((c == 2).any() and (c < 1).any() for c in factors.values())
    decided = [changed(s, correction=[0.0, *factors[s.sample_id]]) for s in stale]
    stats, gradient = run(policy, [stale[:3], stale[3:]], **how)
    expected, its = run(policy, [decided], **how)
    assert same(gradient, its)
    assert stats["loss/unclipped"] == pytest.approx(expected["loss/unclipped"], abs=1e-6)
    mean = np.mean([factors[s.sample_id][t - 1] for s in work for t in trained(s)])
    assert stats["correction/mean"] == pytest.approx(mean, rel=1e-5)
    assert "correction/mean" not in expected
    assert not same(gradient, run(policy, [stale], adaptive=adaptive)[1], 1e-2)


@pytest.mark.parametrize("name", ["gspo", "gspo_token", "cispo", "gmpo", "sapo"])
def test_every_policy_loss_runs_and_ignores_the_split(policy: Any, name: str) -> None:
    work = scored(policy, batch("seq_mean_token_mean"), 0.2)
    bounds = {"clip_low": 0.1, "clip_high": 0.1}
    whole, gradient = run(policy, [work], policy=name, **bounds)
    split, its = run(policy, [[s] for s in work], policy=name, **bounds)
    assert split["loss/unclipped"] == pytest.approx(whole["loss/unclipped"], abs=1e-6)
    assert gradient.any() and same(its, gradient)


def test_all_masked_is_no_loss_no_gradient_and_no_nan(policy: Any) -> None:
    work = [changed(s, loss_weight=0.0) for s in batch()]
    for changes in ({}, {"adaptive": "exp"}, {"adaptive": "exp", "scope": "sequence"}):
        stats, gradient = run(policy, [work], **changes)
        assert stats["loss/unclipped"] == 0 and stats["tokens/trained"] == 0
        assert not gradient.any()
        assert all(math.isfinite(x) for x in stats.values())


def same_scores(a: Any, b: Any) -> bool:
    return all(np.array_equal(a[name].logprobs, b[name].logprobs) for name in {*a, *b})


def test_the_reference_policy_scores_and_leaves_the_weights_alone(policy: Any) -> None:
    work = [batch()[:2]]
    with (
        pytest.raises(RuntimeError, match="no reference weights are kept"),
        policy.reference_weights(),
    ):
        pass
    start = policy.score(work)
    policy.keep_reference()
    for _ in range(3):
        policy.update(work, loss=loss(), lr=1e-2)
    moved = policy.score(work)
    with policy.reference_weights():
        reference = policy.score(work)
    assert same_scores(policy.score(work), moved) and same_scores(reference, start)
    assert not same_scores(moved, start)
    masked = policy.score(work, every_token=False)
    for s in work[0]:
        every = moved[s.sample_id].logprobs
        assert masked[s.sample_id].logprobs == pytest.approx([every[t] for t in trained(s)])


def test_a_kl_term_without_reference_is_refused(policy: Any) -> None:
    with pytest.raises(ValueError, match="needs reference log-probs"):
        run(policy, [batch()], kl_coef=0.1)
