"""One optimizer step: statistics, the loss clip's gate, off-policy ratios."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import policy_models
import pytest
import torch
from made import changed, loss, sequence

from agpo_megatron.algorithm.limits import Limit
from agpo_megatron.config.schema import PolicyConfig, TrainConfig

pytestmark = pytest.mark.processes

PPO = loss()
CLIP = loss(adaptive="max0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policy_models.save(policy_models.hf_model("llama"), tmp_path_factory.mktemp("m") / "hf")


def weights(policy: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.named_hf_tensors()}


def test_on_policy_statistics(folder: Path) -> None:
    """At ratio 1 the loss is -sum w A, whatever the model says."""
    batch = policy_models.sequences([20, 9, 14])
    with policy_models.one_rank(folder) as policy:
        stats = policy.update([batch[:2], batch[2:]], loss=PPO, lr=1e-4)
        scores = policy.score([batch])
    expected = -sum(
        s.scalar("loss_weight") * len(s.trained()) * s.scalar("advantage") for s in batch
    )
    assert stats["loss/policy"] == stats["loss/unclipped"] == pytest.approx(expected, abs=1e-6)
    assert stats["policy/ratio_mean"] == 1.0
    assert stats["policy/clip_frac"] == 0.0
    assert stats["tokens/trained"] == sum(len(s.trained()) for s in batch)
    assert "loss/clip_gate" not in stats, "there is no clip"
    assert stats["grad_norm"] > 0
    assert len(scores) == 3


def test_old_logprobs_give_ratios_and_clipping(folder: Path) -> None:
    batch = policy_models.sequences([20, 9])
    with policy_models.one_rank(folder) as policy:
        current = {k: s.logprobs for k, s in policy.score([batch]).items()}
        shifted = [changed(s, old_logprobs=[x - 0.4 for x in current[s.sample_id]]) for s in batch]
        stats = policy.update([shifted], loss=PPO, lr=1e-4)
    ratio = 2.718281828**0.4
    counts = [len(s.trained()) for s in batch]
    assert stats["policy/ratio_mean"] == pytest.approx(ratio, rel=1e-5)
    # advantage -0.5 (s0): ratio not bounded from above; +1 (s1): clipped at 1.28
    assert stats["policy/clip_frac"] == pytest.approx(counts[1] / sum(counts))
    expected = 0.05 * (counts[0] * 0.5 * ratio - counts[1] * 1.28)
    assert stats["loss/policy"] == pytest.approx(expected, rel=1e-5)


def test_the_first_update_of_a_batch_keeps_the_ratio_of_1(folder: Path) -> None:
    """Also where log-probs were scored: they tell how far two computations of one thing are apart, and its gate is
    known before any pass. In later updates they are where the ratio starts, and the server is held against them."""
    batch = policy_models.sequences([20, 9])
    with policy_models.one_rank(folder) as policy:
        current = {k: s.logprobs for k, s in policy.score([batch]).items()}
        scored = [
            changed(
                s,
                old_logprobs=[x - 0.25 for x in current[s.sample_id]],
                rollout_logprobs=[x - 0.75 for x in current[s.sample_id]],
            )
            for s in batch
        ]
        first = policy.update([[changed(s, update=0) for s in scored]], loss=CLIP, lr=0.0)
        later = policy.update([scored], loss=PPO, lr=0.0)
    assert first["policy/ratio_mean"] == 1.0
    assert later["policy/ratio_mean"] == pytest.approx(2.718281828**0.25, rel=1e-5)
    for stats in (first, later):
        assert stats["policy/old_logprob_abs_diff_mean"] == pytest.approx(0.25, abs=1e-4)
        assert stats["policy/old_logprob_abs_diff_max"] == pytest.approx(0.25, abs=1e-4)
        assert stats["rollout/logprob_abs_diff_mean"] == pytest.approx(0.5, abs=1e-4)
    assert first["loss/unclipped"] == pytest.approx(
        -sum(s.scalar("loss_weight") * len(s.trained()) * s.scalar("advantage") for s in batch),
        abs=1e-9,
    )


def test_rollout_difference_counts_known_tokens_only(folder: Path) -> None:
    with policy_models.one_rank(folder) as policy:
        batch = policy_models.sequences([12, 6])
        exact = policy.score([batch])
        shifted = [*(exact["s0"].logprobs[:-1] + 0.25), exact["s0"].logprobs[-1] - 2.0]
        known = changed(batch[0], rollout_logprobs=shifted)
        stats = policy.update([[known, batch[1]]], loss=PPO, lr=1e-4)
    n = len(known.trained())
    assert stats["rollout/logprob_abs_diff_max"] == pytest.approx(2.0, abs=1e-4)
    assert stats["rollout/logprob_abs_diff_mean"] == pytest.approx(
        (0.25 * (n - 1) + 2.0) / n, abs=1e-4
    )


ROLLOUT = {"rollout/logprob_abs_diff_mean", "rollout/logprob_abs_diff_max"}
RATIO = {"policy/ratio_mean", "policy/clip_frac"}


def test_what_was_not_measured_is_not_reported(folder: Path) -> None:
    """Without known rollout log-probs there is no difference to them; supervised tuning has no ratio."""
    batch = policy_models.sequences([12, 6])
    known = changed(batch[0], rollout_logprobs=[-1.0] * 12)
    with policy_models.one_rank(folder) as policy:
        found = {
            (settings.policy, "rollout_logprobs" in first.columns): policy.update(
                [[first], [batch[1]]], loss=settings, lr=1e-4
            ).keys()
            & (ROLLOUT | RATIO)
            for settings in (loss(policy="nll"), PPO)
            for first in (batch[0], known)
        }
    assert found == {
        ("nll", False): set(),
        ("nll", True): ROLLOUT,
        ("ppo", False): RATIO,
        ("ppo", True): RATIO | ROLLOUT,
    }


@pytest.mark.parametrize("when", ["step", "skip_step"])
def test_a_closed_gate(folder: Path, when: str) -> None:
    """Negative loss: the gradient is 0. ``skip_step`` leaves the weights alone; ``step`` still decays and, with
    momentum, still moves (reference: AdamW on a zero gradient)."""
    up, down = policy_models.sequences([10, 14])
    up = changed(up, advantage=-1.0)
    down = changed(down, advantage=1.0)
    train = TrainConfig(adam_eps=1e-5, grad_clip=0.0, weight_decay=0.1)
    with policy_models.one_rank(folder, train=train) as policy:
        opened = policy.update([[up]], loss=loss(adaptive="max0", when_clipped=when), lr=1e-3)
        assert opened["loss/clip_gate"] == 1.0
        before = weights(policy)
        closed = policy.update([[down]], loss=loss(adaptive="max0", when_clipped=when), lr=1e-3)
        after = weights(policy)
    assert closed["loss/unclipped"] < 0
    assert (closed["loss/policy"], closed["loss/clip_gate"], closed["grad_norm"]) == (0, 0, 0)
    moved = [not torch.equal(before[n], after[n]) for n in before]
    assert all(moved) if when == "step" else not any(moved)


def test_the_gate_closes_at_its_bound_and_not_above(folder: Path) -> None:
    batch = policy_models.sequences([10])
    bound = 0.05 * 0.5 * len(batch[0].trained())
    with policy_models.one_rank(folder) as policy:
        for minimum, gate in ((bound - 1e-3, 1.0), (bound + 1e-3, 0.0)):
            stats = policy.update([batch], loss=loss(adaptive="max0", minimum=minimum), lr=1e-9)
            assert stats["loss/clip_gate"] == gate
            assert stats["loss/policy"] == pytest.approx(max(bound, minimum), abs=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_tie_is_scored_at_the_scale_of_the_loss(folder: Path, sign: float) -> None:
    """Terms of hundreds (seq_mean_token_sum) that cancel but for a rounding of float32, well above 1e-6: closed, and
    the bound is reported. A sum of tiny terms, well below, is no tie."""
    up, down = policy_models.sequences([30, 30], weight=80.0)
    rounding = sign * 2e-7
    up, down = changed(up, advantage=-1.0 - rounding), changed(down, advantage=1.0)
    tiny = changed(up, loss_weight=1e-9)
    with policy_models.one_rank(folder) as policy:
        tied = policy.update([[up], [down]], loss=CLIP, lr=1e-9)
        opened = policy.update([[tiny]], loss=CLIP, lr=1e-9)
    assert 1e-4 < sign * tied["loss/unclipped"] < 2e-3
    assert tied["loss/clip_gate"] == tied["loss/policy"] == 0.0
    assert opened["loss/clip_gate"] == 1.0
    assert (
        opened["loss/policy"]
        == opened["loss/unclipped"]
        == pytest.approx(len(tiny.trained()) * 1e-9, rel=1e-5)
    )


def test_decay_spares_norms(folder: Path) -> None:
    """A step without any gradient: matrices shrink by lr x decay, vectors stay."""
    silent = [sequence("s", [1, 2, 3], 1.0, [0, 0, 0], 1.0)]
    train = TrainConfig(weight_decay=0.5, grad_clip=1.0)
    with policy_models.one_rank(folder, train=train) as policy:
        before = weights(policy)
        stats = policy.update([silent], loss=PPO, lr=1e-2)
        after = weights(policy)
    assert stats["grad_norm"] == 0 and stats["tokens/trained"] == 0
    for name, old in before.items():
        expected = old if old.dim() == 1 else old * (1 - 1e-2 * 0.5)
        assert torch.allclose(after[name], expected, rtol=1e-6, atol=0), name


def state(policy: Any) -> dict[str, torch.Tensor]:
    """Weights, fp32 copies, moments and counts of steps, by name."""
    found = weights(policy)
    for o, part in enumerate(policy.optimizer.chained_optimizers):
        for g, settings in enumerate(part.optimizer.param_groups):
            found[f"{o}.{g}.step"] = torch.tensor(settings.get("step", 0))
            for p, parameter in enumerate(settings["params"]):
                found[f"{o}.{g}.{p}"] = parameter.detach().clone()
                for name, value in part.optimizer.state[parameter].items():
                    found[f"{o}.{g}.{p}.{name}"] = value.clone()
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


NAN = {"advantage": float("nan")}
INFINITE = {"advantage": float("inf")}
SPIKE = Limit("grad_norm", "grad_norm", 1e-6)
GAP = Limit("logprob_far", "rollout/logprob_far_frac", 0.4)
HELD = [
    ("nan-gate", NAN, CLIP, {}),
    ("infinities", INFINITE, CLIP, {}),
    ("nan", NAN, PPO, {}),
    ("overflow", {"advantage": 1e30}, PPO, {}),
    ("spike", {}, PPO, {"limits": [SPIKE]}),
    ("gap", {}, PPO, {"limits": [GAP]}),
    ("entropy", {}, PPO, {"limits": [Limit("entropy", "policy/entropy", 99.0, above=False)]}),
    ("hold", {}, PPO, {"hold": True}),
    ("closed-gate", {"advantage": 1.0}, CLIP, {"hold": True}),
]


@pytest.mark.parametrize(("what", "wrong", "settings", "rest"), HELD, ids=[h[0] for h in HELD])
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.full)])
def test_a_step_that_is_not_taken_leaves_no_trace(
    folder: Path, dtype: Any, what: str, wrong: dict[str, Any], settings: Any, rest: dict[str, Any]
) -> None:
    """Weights, moments and the optimizer's count of steps stay bit for bit, and so does the step after it."""
    good = [policy_models.sequences([20, 9], seed=i) for i in range(2)]
    far = [-9.0] * 20
    bad = [changed(s, **wrong, rollout_logprobs=far[: s.length]) for s in good[0]]
    with policy_models.one_rank(folder, PolicyConfig(dtype=dtype)) as policy:
        policy.update([good[0]], loss=PPO, lr=1e-3)
        before = state(policy)
        held = policy.update([bad], loss=settings, lr=1e-3, **rest)
        assert held["skipped"] == 1.0
        assert same(before, state(policy))
        taken = policy.update([good[1]], loss=PPO, lr=1e-3, limits=[])
        assert "skipped" not in taken
        after = state(policy)
    with policy_models.one_rank(folder, PolicyConfig(dtype=dtype)) as policy:
        policy.update([good[0]], loss=PPO, lr=1e-3)
        policy.update([good[1]], loss=PPO, lr=1e-3)
        assert same(after, state(policy))
    assert not same(before, after)
    finite = math.isfinite(held["loss/policy"]) and math.isfinite(held.get("grad_norm", 0.0))
    assert finite == (not wrong or what == "closed-gate")


def test_a_step_within_its_limits_is_taken(folder: Path) -> None:
    """The norm that is held against the limit is the one that is reported, and clipped by."""
    batch = policy_models.sequences([20, 9])
    norms = {}
    for clip in (0.0, 1e-3):
        train = TrainConfig(adam_eps=1e-5, grad_clip=clip)
        with policy_models.one_rank(folder, train=train) as policy:
            first = policy.update([batch], loss=PPO, lr=0.0)["grad_norm"]
            limit = Limit("grad_norm", "grad_norm", first)
            second = policy.update([batch], loss=PPO, lr=1e-3, limits=[limit])
        assert "skipped" not in second and second["grad_norm"] == first
        norms[clip] = first
    assert norms[0.0] == norms[1e-3] > 1e-3


def test_the_initial_weights_come_back_with_a_fresh_optimizer(folder: Path) -> None:
    batch = policy_models.sequences([20, 9])
    with policy_models.one_rank(folder) as policy:
        initial = weights(policy)
        policy.update([batch], loss=PPO, lr=1e-3)
        once = state(policy)
        policy.update([batch], loss=PPO, lr=1e-3)
        policy.load_initial(folder)
        assert same(initial, weights(policy))
        policy.update([batch], loss=PPO, lr=1e-3)
        assert same(once, state(policy))


def test_the_share_of_tokens_far_apart(folder: Path) -> None:
    with policy_models.one_rank(folder) as policy:
        (first, second) = policy_models.sequences([12, 6])
        exact = policy.score([[first, second]])["s0"].logprobs
        moved = [*(exact[:-2] + 0.9), *(exact[-2:] - 1.1)]
        known = changed(first, rollout_logprobs=moved)
        stats = policy.update([[known, second]], loss=PPO, lr=0.0)
    assert stats["rollout/logprob_far_frac"] == pytest.approx(2 / len(known.trained()))
