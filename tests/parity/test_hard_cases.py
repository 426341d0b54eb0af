"""What batches and layouts do to each other at the edges."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import made
import pytest

from agpo_megatron.config.schema import PolicyConfig, TrainConfig
from agpo_megatron.controller.micro_batches import plan_micro_batches
from agpo_megatron.controller.publishing import stage_layers
from agpo_megatron.parity import models
from agpo_megatron.parity.batch import BUDGET, Division
from agpo_megatron.parity.comparison import BF16, EXPERTS, FP32, Limits, failures
from agpo_megatron.parity.contract import Contract, Divider, one_step
from agpo_megatron.parity.reference import Objective, Truth
from agpo_megatron.samples import TrainSequence

INTERLEAVED = {"pipeline_parallel": 2, "virtual_pipeline": 2}
SEQUENCE_PARALLEL = {"tensor_parallel": 2, "sequence_parallel": True}


def check(
    contract: Contract,
    axes: dict[str, Any],
    cut: Divider,
    *,
    experts: bool = False,
    **more: Any,
) -> None:
    kind, config = ("experts", models.MIXTRAL) if experts else ("dense", models.LLAMA3)
    limits: Limits = more.pop("limits", EXPERTS if experts else FP32)
    step = contract.step(
        contract.model(f"{kind}-untied-4", config),
        PolicyConfig(**{"dtype": "fp32", "logprob_chunk": 32, **axes}),
        Objective(temperature=0.7),
        cut,
        **more,
    )
    assert list(failures(step.deviations(limits))) == []


def all_on_the_first(work: list[TrainSequence], replicas: int) -> Division:
    """Three micro-batches, in one of them nothing trains; the other replicas have none."""
    masked = [s for s in work if not len(s.trained())]
    rest = [s for s in work if len(s.trained())]
    return [[rest[:4], masked, rest[4:]], *([] for _ in range(replicas - 1))]


@pytest.mark.parametrize(
    ("axes", "experts"),
    [
        ({"data_parallel": 2}, False),
        ({"data_parallel": 2, "distributed_optimizer": False, **SEQUENCE_PARALLEL}, False),
        ({"data_parallel": 2, **INTERLEAVED}, False),
        ({"data_parallel": 2, "context_parallel": 2}, False),
        ({"data_parallel": 2, "expert_parallel": 2}, True),
    ],
    ids=["dp2", "dp2-tp2-sp", "dp2-pp2-vpp2", "dp2-cp2", "dp2-ep2"],
)
def test_a_replica_without_work(contract: Contract, axes: dict[str, Any], experts: bool) -> None:
    check(contract, axes, all_on_the_first, experts=experts)


def in_pieces(pieces: int) -> Divider:
    def cut(work: list[TrainSequence], replicas: int) -> Division:
        """Uneven counts: ``pieces`` micro-batches on the first replica, fewer on each further one."""
        shares = [work[r::replicas] for r in range(replicas)]
        counts = [max(1, pieces - r) for r in range(replicas)]
        return [[share[i::n] for i in range(n)] for share, n in zip(shares, counts, strict=True)]

    return cut


@pytest.mark.parametrize(
    ("axes", "pieces"),
    [
        ({"pipeline_parallel": 4}, 1),
        ({"pipeline_parallel": 4}, 5),
        ({"pipeline_parallel": 2, "data_parallel": 2}, 3),
        ({"data_parallel": 2, **INTERLEAVED}, 3),
        ({"context_parallel": 2, **INTERLEAVED}, 1),
    ],
    ids=["pp4-1", "pp4-5", "pp2-dp2-3", "pp2-vpp2-dp2-3", "pp2-vpp2-cp2-1"],
)
def test_micro_batches_that_pp_does_not_divide(
    contract: Contract, axes: dict[str, Any], pieces: int
) -> None:
    check(contract, axes, in_pieces(pieces))


def test_the_controllers_plan(contract: Contract) -> None:
    """One sequence is longer than the budget; the last micro-batches are fillers."""

    def cut(work: list[TrainSequence], replicas: int) -> Division:
        plan = plan_micro_batches(
            [s.length for s in work],
            data_parallel=replicas,
            token_budget=BUDGET,
            multiple_of=2,
        )
        assert max(s.length for s in work) > BUDGET
        return [[[work[i] for i in micro] for micro in share] for share in plan]

    check(contract, {"data_parallel": 2, **INTERLEAVED}, cut)


@pytest.mark.parametrize(
    "axes",
    [{**SEQUENCE_PARALLEL, "pipeline_parallel": 2}, {"context_parallel": 2, "data_parallel": 2}],
    ids=["tp2-sp-pp2", "cp2-dp2"],
)
def test_bf16(contract: Contract, axes: dict[str, Any]) -> None:
    check(contract, {"dtype": "bf16", **axes}, in_pieces(3), limits=BF16, on_policy=True)


@pytest.mark.parametrize("axes", [{"pipeline_parallel": 2}, INTERLEAVED], ids=["pp2", "pp2-vpp2"])
def test_megatron_places_layers_where_publishing_expects_them(
    contract: Contract, axes: dict[str, Any]
) -> None:
    policy = PolicyConfig(dtype="fp32", **axes)
    model = contract.model("dense-untied-4", models.LLAMA3)
    found = contract.build(model, policy)
    assert [found.layers[stage] for stage in range(2)] == stage_layers(4, policy)


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_the_norm_of_the_whole_gradient_clips(
    contract: Contract, distributed_optimizer: bool
) -> None:
    def clipping(truth: Truth) -> TrainConfig:
        norm = sum(float(g.pow(2).sum()) for g in truth.gradients.values()) ** 0.5
        return one_step(truth).model_copy(update={"grad_clip": 0.1 * norm})

    found = contract.step(
        contract.model("dense-untied-4", models.LLAMA3),
        PolicyConfig(
            dtype="fp32",
            pipeline_parallel=2,
            distributed_optimizer=distributed_optimizer,
            **SEQUENCE_PARALLEL,
        ),
        Objective(temperature=0.7),
        "packed",
        settings=clipping,
    ).deviations()
    assert {d.quantity for d in found if not d.passes} <= {"gradient"}, "scaled in place or not"


ADAPTIVE = list(
    itertools.product(["tp2-sp-dp2", "pp2-vpp2-cp2"], ["batch", "group"], [True, False])
)
DEFAULT = [ADAPTIVE[3], ADAPTIVE[5], ADAPTIVE[6]]
"""Every scope and both kinds of ratio; the full tier has them in both layouts."""


@pytest.mark.parametrize(
    ("layout", "scope", "on_policy"),
    [pytest.param(*case, marks=() if case in DEFAULT else pytest.mark.full) for case in ADAPTIVE],
)
def test_the_adaptive_part_with_other_terms(
    contract: Contract, layout: str, scope: Literal["batch", "group"], on_policy: bool
) -> None:
    """Its gain is known before backward, and does not touch the entropy bonus and the KL term; groups are spread over
    replicas."""
    axes: dict[str, Any] = {"context_parallel": 2, **INTERLEAVED}
    if layout == "tp2-sp-dp2":
        axes = {"data_parallel": 2, **SEQUENCE_PARALLEL}
    kl = 0.0 if on_policy else 0.3
    objective = Objective(adaptive="exp", scope=scope, kl=kl, entropy=0.2, tau=1.0)
    found = contract.step(
        contract.model("dense-untied-4", models.LLAMA3),
        PolicyConfig(dtype="fp32", **axes),
        objective,
        "packed",
        on_policy=on_policy,
    )
    assert list(failures(found.deviations())) == []


def test_supervised(contract: Contract) -> None:
    found = contract.step(
        contract.model("dense-tied-4", models.QWEN2),
        PolicyConfig(dtype="fp32", pipeline_parallel=2, context_parallel=2),
        Objective(kind="nll"),
        "packed",
        on_policy=True,
    )
    assert list(failures(found.deviations())) == []


def test_a_closed_gate_leaves_the_weights_alone(contract: Contract) -> None:
    """The gate is decided by the loss of all replicas together: one replica alone would open it."""
    model = contract.model("dense-untied-4", models.LLAMA3)
    objective = Objective(adaptive="max0", minimum=100.0)
    _, truth = contract.truth(model, objective)
    up, down = ([made.sequence("g0.0", [1, 2, 3], 1.0, [0, 1, 1], a)] for a in (-150.0, 101.0))
    found = contract.run(
        model,
        PolicyConfig(dtype="fp32", data_parallel=2),
        [[[up], [down]]],
        made.loss(adaptive="max0", minimum=100.0, when_clipped="skip_step"),
        one_step(truth),
        scores=False,
    )
    (stats,) = found.stats
    assert stats["loss/unclipped"] == pytest.approx(98.0)
    assert (stats["loss/policy"], stats["loss/clip_gate"]) == (100.0, 0.0)
    start = models.weights_of(model)
    assert all((found.weights[n].double() == w).all() for n, w in start.items())
