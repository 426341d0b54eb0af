"""Responses of older weights: token corrections and the gate, in the update and scored before it, in any layout."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from test_updates import LAYOUTS, TRAIN

from agpo_megatron.config.schema import PolicyConfig
from agpo_megatron.parity import models
from agpo_megatron.parity.batch import LENGTHS, Recorded, recorded, stale
from agpo_megatron.parity.comparison import failures
from agpo_megatron.parity.contract import Contract, Updates
from agpo_megatron.parity.reference import Objective, log_probs

HIGH = 1.5
Parts = list[list[Recorded]]


def parts(contract: Contract, updates: int) -> tuple[Parts, dict[str, torch.Tensor]]:
    """The recorded batch with log-probs of a server that is behind, in parts of whole groups; and its log q."""
    model = contract.model("dense-untied-4", models.LLAMA3)
    config = json.loads((model / "config.json").read_text())
    weights = {n: w.double() for n, w in models.weights_of(model).items()}
    batch = recorded((*LENGTHS, 18, 22, 14, 8, 27), vocab=config["vocab_size"])
    with torch.no_grad():
        own = {s.sample_id: log_probs(weights, config, s.tokens)[0] for s in batch}
    behind = stale(batch, own)
    gaps = {
        s.sample_id: (own[s.sample_id] - torch.tensor(s.rollout_logprobs[1:]).double())[
            torch.tensor(s.loss_mask[1:], dtype=torch.bool)
        ]
        for s in behind
        if s.kept and sum(s.loss_mask)
    }
    return [[s for s in behind if int(s.group_id[1:]) % updates == u] for u in range(updates)], gaps


def run(contract: Contract, layout: str, updates: int, **more: Any) -> tuple[Updates, Any]:
    of_updates, gaps = parts(contract, updates)
    policy = PolicyConfig(dtype="fp32", logprob_chunk=32, **LAYOUTS[layout])
    objective = Objective(clip=(0.1, 0.1), tis=HIGH, **more)
    model = contract.model("dense-untied-4", models.LLAMA3)
    found = contract.updates(model, policy, objective, of_updates, TRAIN)
    by_part = [[gaps[s.sample_id] for s in part if s.sample_id in gaps] for part in of_updates]
    return found, by_part


def effective(q: torch.Tensor) -> float:
    return float(q.sum() ** 2 / (len(q) * q.square().sum()))


EVERY = [(updates, layout) for updates in (1, 2) for layout in LAYOUTS]
SLOW = [(1, "one"), (1, "pp2-dp2")]
"""One update computes the correction, two have it scored."""


@pytest.mark.parametrize(
    ("updates", "layout"),
    [pytest.param(*case, marks=pytest.mark.full if case in SLOW else ()) for case in EVERY],
)
def test_truncated_weights_and_an_exponential_gate_are_those_of_the_reference(
    contract: Contract, updates: int, layout: str
) -> None:
    step, gaps = run(contract, layout, updates, adaptive="exp", tau=1.0)
    assert list(failures(step.deviations())) == []
    for stats, truth, mine in zip(step.found.stats, step.truths, gaps, strict=True):
        q = torch.cat(mine).exp()
        assert 0.1 < float((q > HIGH).double().mean()) < 0.5, "truncations that matter"
        assert stats["loss/clip_gate"] == pytest.approx(math.exp(truth.loss), rel=1e-5)
        assert stats["rollout/ess_token"] == pytest.approx(effective(q), rel=1e-4)
        products = torch.stack([gap.sum() for gap in mine]).exp()
        assert stats["rollout/ess_sequence"] == pytest.approx(effective(products), rel=1e-3)
        if updates == 1:
            mean = float(q.clamp(max=HIGH).mean())
            assert stats["correction/mean"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_gate_the_loss_is_the_corrected_one(contract: Contract, layout: str) -> None:
    step, _ = run(contract, layout, 1)
    assert list(failures(step.deviations())) == []
    gated, _ = run(contract, layout, 1, adaptive="exp", tau=1.0)
    assert abs(step.truths[0].loss - gated.truths[0].loss) > 1e-3
