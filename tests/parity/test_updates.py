"""Several optimizer steps on one batch: ratios that are not 1, for every policy loss, in any layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from agpo_megatron.config.schema import PolicyConfig, TrainConfig
from agpo_megatron.parity import models
from agpo_megatron.parity.batch import LENGTHS, Recorded, recorded
from agpo_megatron.parity.comparison import failures
from agpo_megatron.parity.contract import Contract, Updates
from agpo_megatron.parity.reference import Objective

UPDATES = 4
TRAIN = TrainConfig(lr=2e-2, adam_eps=1e-2, grad_clip=1e6, weight_decay=0.01)
"""Steps that take ratios to both sides of a clip of 0.1; eps is far above the rounding of a gradient."""
CLIPS = {"gspo": (0.02, 0.02), "gspo_token": (0.02, 0.02), "gmpo": (0.1, 0.1), "cispo": (0.1, 0.1)}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2-sp-dp2": {"tensor_parallel": 2, "sequence_parallel": True, "data_parallel": 2},
    "pp2-dp2": {"pipeline_parallel": 2, "data_parallel": 2},
    "cp2-tp2": {"context_parallel": 2, "tensor_parallel": 2},
}


def parts() -> list[list[Recorded]]:
    """Six groups, divided as a seeded shuffle might."""
    batch = recorded((*LENGTHS, 18, 22, 14, 8, 27), vocab=67)
    of_group = {"g0": 2, "g1": 0, "g2": 1, "g3": 3, "g4": 0, "g5": 1}
    return [[s for s in batch if of_group[s.group_id] == part] for part in range(UPDATES)]


def run(contract: Contract, kind: str, layout: str, **more: Any) -> Updates:
    model = contract.model("dense-untied-4", models.LLAMA3)
    policy = PolicyConfig(dtype="fp32", logprob_chunk=32, **LAYOUTS[layout])
    objective = Objective(kind=kind, clip=CLIPS.get(kind, (0.1, 0.1)), **more)  # type: ignore[arg-type]
    return contract.updates(model, policy, objective, parts(), TRAIN)


KINDS = ("ppo", "gspo", "gspo_token", "cispo", "gmpo", "sapo")
EVERY = [(kind, layout) for kind in KINDS for layout in LAYOUTS]
DEFAULT = list(zip(KINDS, [*LAYOUTS][1:] * 2, strict=True))
"""Each loss in one layout of several ranks; the full tier has every pair."""


@pytest.mark.parametrize(
    ("kind", "layout"),
    [pytest.param(*p, marks=() if p in DEFAULT else pytest.mark.full) for p in EVERY],
)
def test_four_updates_of_a_batch_are_those_of_the_reference(
    contract: Contract, kind: str, layout: str
) -> None:
    step = run(contract, kind, layout)
    assert list(failures(step.deviations())) == []
    first, *later = step.truths
    assert first.ratios.equal(torch.ones_like(first.ratios))
    low, high = CLIPS.get(kind, (0.1, 0.1))
    for truth in later:
        outside = (truth.ratios < 1 - low) | (truth.ratios > 1 + high)
        assert float(outside.double().mean()) > 0.1, "ratios that matter"


def test_an_adaptive_gate_is_decided_by_each_update_for_itself(contract: Contract) -> None:
    step = run(contract, "ppo", "tp2-sp-dp2", adaptive="exp", tau=1.0)
    assert list(failures(step.deviations())) == []
    gains = [s["loss/clip_gate"] for s in step.found.stats]
    expected = [torch.tensor(t.loss).exp().item() for t in step.truths]
    assert gains == pytest.approx(expected, rel=1e-5)
    assert len({round(gain, 3) for gain in gains}) == UPDATES


@pytest.mark.full
def test_losses_that_agree_at_ratio_one_differ_afterwards(contract: Contract) -> None:
    """After one update all weights are the same; after four no two are."""
    kinds = ["ppo", "gspo", "cispo", "gmpo", "sapo"]
    found = {kind: run(contract, kind, "one").found for kind in kinds}
    norms = {kind: [s["grad_norm"] for s in f.stats] for kind, f in found.items()}
    for kind in kinds[1:]:
        if kind not in ("gspo", "gmpo"):  # whose gradient is the mean over the sequence
            assert norms[kind][0] == pytest.approx(norms["ppo"][0], rel=1e-5)
    last = [round(n[-1], 6) for n in norms.values()]
    assert len(set(last)) == len(kinds), norms
