"""Layouts stay together over a training run, and a run changes its layout through a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from agpo_megatron.algorithm.settings import LossSettings
from agpo_megatron.config.schema import PolicyConfig, TrainConfig
from agpo_megatron.parity import models
from agpo_megatron.parity.batch import Division, recorded, split, train_sequences
from agpo_megatron.parity.cases import CaseResult
from agpo_megatron.parity.comparison import worst
from agpo_megatron.parity.contract import Contract
from agpo_megatron.parity.ranks import RankFailed

TRAIN = TrainConfig(lr=1e-3, adam_eps=1e-5, grad_clip=1.0, weight_decay=0.01)
"""With AdamW's usual eps of 1e-8 rounding of the smallest gradients grows to whole steps."""
SEQUENCE_PARALLEL = {"tensor_parallel": 2, "sequence_parallel": True}
INTERLEAVED = {"pipeline_parallel": 2, "virtual_pipeline": 2}


def policy_of(axes: dict[str, Any]) -> PolicyConfig:
    return PolicyConfig(**{"dtype": "fp32", "logprob_chunk": 32, **axes})


def plans(steps: int, replicas: int) -> list[Division]:
    """Another batch of five sequences for each step."""
    batches = [recorded([24, 3, 17, 9, 12], vocab=67, seed=step) for step in range(steps)]
    return [split(train_sequences(b, "token_mean", 1), replicas, "packed") for b in batches]


def train(
    contract: Contract, model: Path, axes: dict[str, Any], steps: slice, **more: Any
) -> CaseResult:
    policy = policy_of(axes)
    chosen = plans(steps.stop, policy.data_parallel)[steps]
    more = {"scores": False, **more}
    return contract.run(model, policy, chosen, LossSettings(), TRAIN, **more)


def drift(a: dict[str, Tensor], b: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """||a - b|| / ||b - start||, over all parameters."""
    apart = sum(float((a[n].double() - b[n].double()).pow(2).sum()) for n in start)
    moved = sum(float((b[n].double() - start[n]).pow(2).sum()) for n in start)
    return float((apart / moved) ** 0.5)


@pytest.mark.parametrize(
    ("family", "axes"),
    [
        pytest.param("dense", {"data_parallel": 2, **SEQUENCE_PARALLEL}, id="tp2-sp-dp2"),
        pytest.param(
            "dense",
            {"context_parallel": 2, **INTERLEAVED},
            id="pp2-vpp2-cp2",
            marks=pytest.mark.full,
        ),
        pytest.param(
            "experts",
            {"data_parallel": 2, "expert_parallel": 2},
            id="ep2-dp2",
            marks=pytest.mark.full,
        ),
    ],
)
def test_twenty_steps(contract: Contract, family: str, axes: dict[str, Any]) -> None:
    config = models.LLAMA3 if family == "dense" else models.MIXTRAL
    model = contract.model(f"{family}-untied-4", config)
    alone = train(contract, model, {}, slice(0, 20))
    shared = train(contract, model, axes, slice(0, 20))
    apart = drift(shared.weights, alone.weights, models.weights_of(model))
    assert apart <= 1e-4


SAVED = {
    "dense": (models.QWEN2, {"pipeline_parallel": 2, **SEQUENCE_PARALLEL}),
    "experts": (models.QWEN3_MOE, {"data_parallel": 2, "expert_parallel": 2}),
}
LOADED = {
    "dense": {
        "alone": {},
        "pp2-vpp2": INTERLEAVED,
        "tp2-sp-cp2": {"context_parallel": 2, **SEQUENCE_PARALLEL},
    },
    "experts": {
        "alone": {},
        "ep4-dp2-cp2": {"data_parallel": 2, "context_parallel": 2, "expert_parallel": 4},
    },
}
MORE = {
    "dense": {
        "tp2": {"tensor_parallel": 2},
        "dp2": {"data_parallel": 2},
        "cp2": {"context_parallel": 2},
        "pp4": {"pipeline_parallel": 4},
        "tp2-sp-dp2": {"data_parallel": 2, **SEQUENCE_PARALLEL},
        "cp2-pp2": {"context_parallel": 2, "pipeline_parallel": 2},
    },
    "experts": {
        "tp2-sp": SEQUENCE_PARALLEL,
        "ep2-dp2-pp2": {"data_parallel": 2, "expert_parallel": 2, "pipeline_parallel": 2},
    },
}


@pytest.mark.parametrize(
    "layouts", [LOADED, pytest.param(MORE, marks=pytest.mark.full)], ids=["some", "more"]
)
@pytest.mark.parametrize("family", SAVED)
def test_a_checkpoint_continues_in_every_other_layout(
    contract: Contract, tmp_path: Path, family: str, layouts: dict[str, dict[str, Any]]
) -> None:
    """Weights, moments and step count: the next gradient, and the weights after it, are those of the run that went on.
    The embedding is tied; between the stages of the saving layout there are two copies of it."""
    config, axes = SAVED[family]
    model = contract.model(f"{family}-tied-4", config)
    saved = str(tmp_path / "step2")
    train(contract, model, axes, slice(0, 2), after=saved)
    whole = train(contract, model, axes, slice(0, 3))
    limits = {"gradients": 1e-5 if family == "dense" else 1e-4, "weights": 1e-4}
    for name, others in layouts[family].items():
        found = train(contract, model, others, slice(2, 3), before=saved, seed=9)
        assert found.step == 2
        for quantity, limit in limits.items():
            mine, expected = getattr(found, quantity), getattr(whole, quantity)
            off = worst(quantity, mine, {n: t.double() for n, t in expected.items()}, limit)
            assert off.passes, f"{name}: {off}"


@pytest.mark.parametrize(
    ("axes", "same"),
    [
        ({"tensor_parallel": 2, "data_parallel": 2}, {"tensor_parallel": 2, "context_parallel": 2}),
        ({"data_parallel": 2, "expert_parallel": 2}, {"context_parallel": 2, "expert_parallel": 2}),
    ],
    ids=["tp2", "ep2"],
)
def test_random_states_of_each_position_come_back(
    contract: Contract, tmp_path: Path, axes: dict[str, Any], same: dict[str, Any]
) -> None:
    """Also those of each expert-parallel rank, which differ among ranks that are replicas of everything else."""
    family, config = (
        ("experts", models.MIXTRAL) if "expert_parallel" in axes else ("dense", models.LLAMA3)
    )
    model = contract.model(f"{family}-untied-4", config)
    saved = str(tmp_path / "step1")
    was = train(contract, model, axes, slice(0, 1), after=saved).random
    assert len(set(was.values())) == 2
    for seed, before, expected in ((1, "", True), (9, "", False), (9, saved, True)):
        found = contract.build(model, policy_of(same), seed=seed, before=before).random
        assert (found == was) is expected


@pytest.mark.parametrize(
    ("family", "saved_in", "loaded_in", "words"),
    [
        (
            "dense",
            {"data_parallel": 2},
            {"tensor_parallel": 2, "distributed_optimizer": False},
            "saved with policy.distributed_optimizer true",
        ),
        (
            "experts",
            {"data_parallel": 2, "expert_parallel": 2, "distributed_optimizer": False},
            {"distributed_optimizer": False},
            "saved with policy.expert_parallel 2",
        ),
    ],
    ids=["other-optimizer", "plain-optimizer-of-experts"],
)
def test_a_checkpoint_that_cannot_continue_says_why(
    contract: Contract,
    tmp_path: Path,
    family: str,
    saved_in: dict[str, Any],
    loaded_in: dict[str, Any],
    words: str,
) -> None:
    config = models.LLAMA3 if family == "dense" else models.MIXTRAL
    model = contract.model(f"{family}-untied-4", config)
    saved = str(tmp_path / "step0")
    contract.build(model, policy_of(saved_in), after=saved)
    with pytest.raises(RankFailed, match=words):
        contract.build(model, policy_of(loaded_in), before=saved)
