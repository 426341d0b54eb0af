"""The matrix must turn red: known bugs, planted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import planted
import pytest

from agpo_megatron.config.schema import PolicyConfig
from agpo_megatron.parity import models
from agpo_megatron.parity.batch import Division, Recorded, split, train_sequences
from agpo_megatron.parity.comparison import Deviation, failures
from agpo_megatron.parity.contract import Contract
from agpo_megatron.parity.ranks import RankFailed
from agpo_megatron.parity.reference import Objective
from agpo_megatron.samples import TrainSequence

BUGS = {
    "division by micro-batches": (planted.division_in_two_passes, {"data_parallel": 2}),
    "norms not summed over TP": (
        planted.norms_not_summed_over_tp,
        {"tensor_parallel": 2, "sequence_parallel": True},
    ),
    "labels shifted after the split": (
        planted.labels_shifted_after_the_split,
        {"context_parallel": 2},
    ),
    "loss divided by CP": (planted.loss_divided_by_cp, {"context_parallel": 2}),
    "keys without the other ranks' queries": (
        planted.keys_without_the_other_ranks_queries,
        {"context_parallel": 2},
    ),
}


def gradient_of(found: list[Deviation]) -> Deviation:
    return next(d for d in found if d.quantity == "gradient")


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug(contract: Contract, bug: str) -> None:
    fault, axes = BUGS[bug]
    found = contract.step(
        contract.model("dense-untied-4", models.LLAMA3),
        PolicyConfig(dtype="fp32", **axes),
        Objective(temperature=0.7),
        "packed",
        fault=fault,
    ).deviations()
    assert list(failures(found))
    assert gradient_of(found).error > 100 * gradient_of(found).limit
    if bug == "norms not summed over TP":
        assert "norm" in gradient_of(found).worst


@pytest.mark.parametrize(
    "axes",
    [
        {"tensor_parallel": 2, "sequence_parallel": True, "context_parallel": 2},
        {"pipeline_parallel": 2, "data_parallel": 2},
    ],
    ids=["tp2-sp-cp2", "pp2-dp2"],
)
def test_two_passes_without_a_bug_are_not_red(contract: Contract, axes: dict[str, Any]) -> None:
    """What sequence-ratio losses take, and what some of the bugs above are planted in."""
    found = contract.step(
        contract.model("dense-untied-4", models.LLAMA3),
        PolicyConfig(dtype="fp32", logprob_chunk=32, **axes),
        Objective(temperature=0.7, entropy=0.01),
        "packed",
        fault=planted.two_passes,
    ).deviations()
    assert list(failures(found)) == []


def test_one_pass_refuses_a_loss_scaled_behind_its_back(contract: Contract) -> None:
    with pytest.raises(RankFailed, match="upstream gradient 0.25"):
        contract.step(
            contract.model("dense-untied-4", models.LLAMA3),
            PolicyConfig(dtype="fp32", data_parallel=2),
            Objective(temperature=0.7),
            "packed",
            fault=planted.division_by_micro_batches,
        )


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"])
def test_a_denominator_of_each_replica(contract: Contract, aggregation: str) -> None:
    """The mean over each replica's own tokens, averaged over replicas."""
    model = contract.model("dense-untied-4", models.LLAMA3)
    objective = Objective(aggregation=aggregation, temperature=0.7)  # type: ignore[arg-type]
    batch, _ = contract.truth(model, objective)

    def by_replica(_: list[TrainSequence], replicas: int) -> Division:
        shares: list[list[Recorded]] = [batch[r::replicas] for r in range(replicas)]
        plan = []
        for share in shares:
            mine = train_sequences(share, objective.aggregation, objective.norm_length)
            halved = [replace(s, loss_weight=s.loss_weight / replicas) for s in mine]
            plan += split(halved, 1, "packed")
        return plan

    found = contract.step(
        model, PolicyConfig(dtype="fp32", data_parallel=2), objective, by_replica
    ).deviations()
    assert gradient_of(found).error > 100 * gradient_of(found).limit
