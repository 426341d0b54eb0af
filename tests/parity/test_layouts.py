"""One batch, one answer: every layout against the fp64 reference that has none."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import cases
import pytest
import reference
import tiny_models
import torch
from ranks import Ranks
from torch import Tensor

from agpo_megatron.config.schema import PolicyConfig, TrainConfig
from agpo_megatron.controller.publishing import stage_layers
from agpo_megatron.policy.objective import LossSettings

LENGTHS = [40, 7, 23, 1, 2, 16, 31, 12]
TRAIN = {"adam_eps": 1e-5, "lr": 1e-3, "grad_clip": 0.0}
PPO = {"loss": LossSettings(), "lr": 1e-3}
NLL = {"loss": LossSettings("nll"), "lr": 1e-3}
GRADIENT, LOSS, BF16 = 1e-5, 1e-6, 1e-2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: tiny_models.write(root / name, c) for name, c in tiny_models.CONFIGS.items()}


@pytest.fixture(scope="module")
def pools() -> Any:
    made: dict[int, Ranks] = {}

    def pool(world: int) -> Ranks:
        if world not in made or not made[world].alive:
            made[world] = Ranks(world)
        return made[world]

    yield pool
    for ranks in made.values():
        ranks.close()


def layout(**axes: Any) -> PolicyConfig:
    return PolicyConfig(**{"dtype": "fp32", "logprob_chunk": 32, **axes})


def split(replicas: int, micro: int) -> cases.Plan:
    """The batch dealt out to replicas, then cut into micro-batches of ``micro`` sequences."""
    dealt = [tiny_models.sequences(LENGTHS)[r::replicas] for r in range(replicas)]
    return [[mine[i : i + micro] for i in range(0, len(mine), micro)] for mine in dealt]


def run(pools: Any, hf_dir: Path, policy: PolicyConfig, **changes: Any) -> cases.Outcome:
    settings: dict[str, Any] = {
        "hf_dir": str(hf_dir),
        "policy": policy,
        "train": TrainConfig(**TRAIN),
        "plan": split(policy.data_parallel, 3),
        "update": PPO,
        "gradients": not policy.distributed_optimizer,
        **changes,
    }
    return cases.merged(pools(policy.world_size).run(cases.execute, cases.Case(**settings)))


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Largest deviation of a tensor, relative to that tensor's largest entry, and its name."""
    assert found.keys() == expected.keys()
    return max(
        (
            float((found[n].double() - e).abs().max() / e.abs().max().clamp_min(1e-12)),
            n,
        )
        for n, e in expected.items()
    )


PLAIN = {"distributed_optimizer": False}
MATRIX = {
    "tp2": ("llama", {"tensor_parallel": 2, **PLAIN}),
    "tp2-sp-tied": ("tied", {"tensor_parallel": 2, "sequence_parallel": True, **PLAIN}),
    "tp2-qwen2": ("qwen2", {"tensor_parallel": 2, "recompute": "full", **PLAIN}),
    "pp2-tied": ("tied", {"pipeline_parallel": 2, **PLAIN}),
    "dp2": ("llama3", {"data_parallel": 2, **PLAIN}),
    "tp2-pp2": ("llama", {"tensor_parallel": 2, "pipeline_parallel": 2, **PLAIN}),
    "tp2-pp2-sp-tied": (
        "tied",
        {
            "tensor_parallel": 2,
            "pipeline_parallel": 2,
            "sequence_parallel": True,
            "recompute": "selective",
            **PLAIN,
        },
    ),
    "tp2-dp2-sp-qwen2": (
        "qwen2",
        {"tensor_parallel": 2, "data_parallel": 2, "sequence_parallel": True, **PLAIN},
    ),
    "tp4-two-kv-heads": ("llama", {"tensor_parallel": 4, **PLAIN}),
    "pp2-vpp2": ("llama", {"pipeline_parallel": 2, "virtual_pipeline": 2, **PLAIN}),
    "pp2-vpp2-tp2-tied": (
        "tied",
        {"pipeline_parallel": 2, "virtual_pipeline": 2, "tensor_parallel": 2, **PLAIN},
    ),
}


@pytest.mark.parametrize("name", MATRIX)
def test_loss_and_every_gradient(pools: Any, models: dict[str, Path], name: str) -> None:
    model, axes = MATRIX[name]
    found = run(pools, models[model], layout(**axes), temperature=0.7)
    task = (
        tiny_models.weights_of(models[model]),
        tiny_models.CONFIGS[model],
        tiny_models.sequences(LENGTHS),
    )
    loss, grads = reference.gradients(*task, kind="ppo", temperature=0.7)
    assert found.stats[0]["loss/unclipped"] == pytest.approx(loss, abs=LOSS)
    entropy = reference.mean_entropy(*task, temperature=0.7)
    assert found.stats[0]["policy/entropy"] == pytest.approx(entropy, abs=1e-5)
    error, tensor = worst(found.gradients, grads)
    assert error < GRADIENT, f"{tensor} is off by {error:.1e}"


def test_bf16(pools: Any, models: dict[str, Path]) -> None:
    """Activations have 8 bits, gradients are summed in fp32: small deviations everywhere, large ones nowhere."""
    axes = {"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": True, **PLAIN}
    found = run(pools, models["tied"], layout(dtype="bf16", **axes), update=NLL)
    task = (
        tiny_models.weights_of(models["tied"]),
        tiny_models.TIED,
        tiny_models.sequences(LENGTHS),
    )
    loss, grads = reference.gradients(*task, kind="nll")
    assert found.stats[0]["loss/policy"] == pytest.approx(loss, rel=BF16)
    assert found.stats[0]["policy/entropy"] == pytest.approx(
        reference.mean_entropy(*task), rel=BF16
    )
    for name, expected in grads.items():
        error = (found.gradients[name].double() - expected).norm() / expected.norm()
        assert error < 4 * BF16, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize(
    "axes",
    [
        {"tensor_parallel": 2},
        {"pipeline_parallel": 2},
        {"tensor_parallel": 2, "data_parallel": 2, "sequence_parallel": True},
        {"pipeline_parallel": 2, "data_parallel": 2},
    ],
    ids=lambda a: "-".join(f"{k[0]}{v}" for k, v in a.items()),
)
def test_one_step_of_the_distributed_optimizer(
    pools: Any, models: dict[str, Path], axes: dict[str, Any]
) -> None:
    """With decay and norm clipping: the parameters after the step, and the norm, are the reference's."""
    train = TrainConfig(adam_eps=1e-5, lr=1e-3, grad_clip=0.1, weight_decay=0.1)
    found = run(pools, models["llama"], layout(**axes), train=train)
    start = tiny_models.weights_of(models["llama"])
    _, grads = reference.gradients(
        start, tiny_models.LLAMA, tiny_models.sequences(LENGTHS), kind="ppo"
    )
    stepped, norm = reference.adamw_step(
        start, grads, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-5, grad_clip=0.1
    )
    assert norm > 0.2, "the case must clip"
    assert found.stats[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    moved = {n: stepped[n] - start[n] for n in start}
    error, tensor = worst({n: w.double() - start[n] for n, w in found.weights.items()}, moved)
    assert error < 2e-3, f"{tensor} moved wrongly by {error:.1e} of its step"


@pytest.mark.parametrize(
    ("axes", "micro"),
    [({"tensor_parallel": 2}, 1), ({"tensor_parallel": 2}, 8), ({"data_parallel": 2}, 2)],
)
def test_the_loss_scale_does_not_depend_on_the_split(
    pools: Any, models: dict[str, Path], axes: dict[str, Any], micro: int
) -> None:
    found = run(
        pools,
        models["llama"],
        layout(**axes, **PLAIN),
        plan=split(axes.get("data_parallel", 1), micro),
        update=NLL,
    )
    loss, grads = reference.gradients(
        tiny_models.weights_of(models["llama"]),
        tiny_models.LLAMA,
        tiny_models.sequences(LENGTHS),
        kind="nll",
    )
    assert found.stats[0]["loss/policy"] == pytest.approx(loss, abs=1e-5)
    error, tensor = worst(found.gradients, grads)
    assert error < GRADIENT, f"{tensor} is off by {error:.1e}"


@pytest.mark.parametrize(
    "axes",
    [
        {"data_parallel": 2},
        {"data_parallel": 2, "tensor_parallel": 2, "sequence_parallel": True},
        {"data_parallel": 2, "pipeline_parallel": 2, "virtual_pipeline": 2},
    ],
    ids=["dp2", "dp2-tp2-sp", "dp2-pp2-vpp2"],
)
def test_a_replica_without_work(pools: Any, models: dict[str, Path], axes: dict[str, Any]) -> None:
    """One replica has three micro-batches, one of them all masked; the other has none."""
    masked = [
        replace(s, loss_mask=[0] * len(s.tokens)) for s in tiny_models.sequences([9, 4], seed=5)
    ]
    work = tiny_models.sequences([21, 6, 14])
    found = run(
        pools, models["llama"], layout(**axes, **PLAIN), plan=[[work[:2], masked, work[2:]], []]
    )
    loss, grads = reference.gradients(
        tiny_models.weights_of(models["llama"]), tiny_models.LLAMA, work, kind="ppo"
    )
    assert found.stats[0]["loss/policy"] == pytest.approx(loss, abs=LOSS)
    trained = sum(len(s.trained()) for s in work)
    assert found.stats[0]["tokens/trained"] == trained
    assert worst(found.gradients, grads)[0] < GRADIENT


def test_a_checkpoint_continues_in_every_other_layout(
    pools: Any, models: dict[str, Path], tmp_path: Path
) -> None:
    saved = str(tmp_path / "step2")
    shapes = {
        "tp2": {"tensor_parallel": 2},
        "pp2": {"pipeline_parallel": 2},
        "dp2": {"data_parallel": 2},
        "tp2-dp2": {"tensor_parallel": 2, "data_parallel": 2},
        "pp2-vpp2": {"pipeline_parallel": 2, "virtual_pipeline": 2},
    }
    whole = run(pools, models["llama"], layout(tensor_parallel=2), steps=4)
    run(pools, models["llama"], layout(tensor_parallel=2), steps=2, after=saved)
    for name, axes in shapes.items():
        found = run(pools, models["llama"], layout(**axes), steps=2, before=saved)
        assert found.step == 2
        for mine, expected in zip(found.stats, whole.stats[2:], strict=True):
            for key in ("loss/policy", "grad_norm", "policy/entropy"):
                assert mine[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), (name, key)
        error, tensor = worst(found.weights, {n: w.double() for n, w in whole.weights.items()})
        assert error < 1e-4, f"{name}: {tensor} is off by {error:.1e}"


def test_a_tied_checkpoint_of_two_stages_continues_on_one(
    pools: Any, models: dict[str, Path], tmp_path: Path
) -> None:
    """The first and the last stage hold a copy each of the one embedding."""
    saved = str(tmp_path / "step2")
    both = layout(tensor_parallel=2, pipeline_parallel=2)
    whole = run(pools, models["tied"], both, steps=4)
    run(pools, models["tied"], both, steps=2, after=saved)
    expected = {n: w.double() for n, w in whole.weights.items()}
    for axes in ({"data_parallel": 2}, {"pipeline_parallel": 2}):
        found = run(pools, models["tied"], layout(**axes), steps=2, before=saved)
        for mine, wanted in zip(found.stats, whole.stats[2:], strict=True):
            for key in ("loss/policy", "grad_norm", "policy/entropy"):
                assert mine[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-6), (axes, key)
        error, tensor = worst(found.weights, expected)
        assert error < 1e-4, f"{axes}: {tensor} is off by {error:.1e}"


@pytest.mark.parametrize(
    "axes",
    [{"pipeline_parallel": 2}, {"pipeline_parallel": 2, "virtual_pipeline": 2}],
    ids=["pp2", "pp2-vpp2"],
)
def test_megatron_places_layers_where_publishing_expects_them(
    pools: Any, models: dict[str, Path], axes: dict[str, Any]
) -> None:
    policy = layout(**axes)
    found = run(pools, models["llama"], policy)
    expected = stage_layers(tiny_models.LLAMA["num_hidden_layers"], policy)
    assert [found.layers[stage] for stage in range(2)] == expected


@pytest.mark.parametrize(
    "axes", [{"tensor_parallel": 2}, {"pipeline_parallel": 2, "data_parallel": 2}]
)
def test_scores_reach_rank_0(pools: Any, models: dict[str, Path], axes: dict[str, Any]) -> None:
    found = run(pools, models["qwen2"], layout(**axes), scores=True)
    weights = tiny_models.weights_of(models["qwen2"])
    assert len(found.scores) == len(LENGTHS)
    for s in tiny_models.sequences(LENGTHS):
        logprobs, entropy = found.scores[s.sample_id]
        expected, entropies = reference.log_probs(weights, tiny_models.QWEN2, s.tokens)
        assert logprobs == pytest.approx([0.0, *expected.tolist()], abs=1e-5)
        if len(s.tokens) > 1:
            assert entropy == pytest.approx(float(entropies.mean()), abs=1e-5)


def test_a_closed_gate_leaves_the_weights_alone(pools: Any, models: dict[str, Path]) -> None:
    """The gate is decided by the loss of all replicas together: here one replica alone is above the bound."""
    work = tiny_models.sequences(LENGTHS)
    up = [replace(s, advantage=1.0) for s in work[:1]]
    down = [replace(s, advantage=-0.1) for s in work[1:2]]
    found = run(
        pools,
        models["llama"],
        layout(data_parallel=2),
        plan=[[up], [down]],
        update={"loss": LossSettings(adaptive="max0", when_clipped="skip_step"), "lr": 1e-3},
    )
    assert found.stats[0]["loss/unclipped"] < 0
    assert found.stats[0]["loss/policy"] == 0
    assert found.stats[0]["loss/clip_gate"] == 0
    start = tiny_models.weights_of(models["llama"])
    assert all((found.weights[n].double() == w).all() for n, w in start.items())


@pytest.mark.parametrize("scope", ["batch", "group"])
@pytest.mark.parametrize(
    "axes",
    [
        {"tensor_parallel": 2, "data_parallel": 2, "sequence_parallel": True},
        {"pipeline_parallel": 2, "data_parallel": 2},
        {"pipeline_parallel": 2, "virtual_pipeline": 2},
    ],
    ids=["tp2-dp2-sp", "pp2-dp2", "pp2-vpp2"],
)
def test_the_adaptive_part_off_policy_with_kl_and_entropy(
    pools: Any, models: dict[str, Path], axes: dict[str, Any], scope: str
) -> None:
    """Ratios that are not 1, groups spread over replicas, terms that the adaptive part must not touch."""
    start = tiny_models.weights_of(models["llama"])
    work = []
    for i, s in enumerate(tiny_models.sequences(LENGTHS)):
        chosen, _ = reference.log_probs(start, tiny_models.LLAMA, s.tokens)
        scored = [0.0, *chosen.tolist()]
        old = [x + 0.15 * math.sin(3 * t + i) for t, x in enumerate(scored)]
        ref = [x + 0.5 * math.cos(t) for t, x in enumerate(scored)]
        name = f"g{i % 3}.{i}"
        work.append(replace(s, sample_id=name, old_logprobs=old, ref_logprobs=ref))
    replicas = axes.get("data_parallel", 1)
    dealt = [work[r::replicas] for r in range(replicas)]
    loss = LossSettings(adaptive="exp", tau=0.5, scope=scope, kl_coef=0.3, entropy_coef=0.2)  # type: ignore[arg-type]
    found = run(
        pools,
        models["llama"],
        layout(**axes, **PLAIN),
        plan=[[mine[i : i + 3] for i in range(0, len(mine), 3)] for mine in dealt],
        update={"loss": loss, "lr": 1e-3},
    )
    old_of = {s.sample_id: s.old_logprobs for s in work}
    parts = (
        [work]
        if scope == "batch"
        else [[s for s in work if s.group_id == g] for g in ("g0", "g1", "g2")]
    )
    total = {n: torch.zeros_like(w) for n, w in start.items()}
    value = 0.0
    for part in parts:
        weight = sum(s.loss_weight * len(s.trained()) for s in part) if scope == "group" else 1.0
        part_loss, grads = reference.gradients(
            start, tiny_models.LLAMA, part, kind="ppo", old=old_of
        )
        gain = math.exp(part_loss / weight / 0.5)
        value += weight * 0.5 * gain
        total = {n: total[n] + gain * grads[n] for n in total}
    _, others = reference.gradients(start, tiny_models.LLAMA, work, kind="terms", terms=(0.3, 0.2))
    total = {n: total[n] + others[n] for n in total}
    assert found.stats[0]["loss/policy"] == pytest.approx(value, rel=1e-5)
    error, tensor = worst(found.gradients, total)
    assert error < 2 * GRADIENT, f"{tensor} is off by {error:.1e}"
