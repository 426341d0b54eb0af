"""What the ranks of a layout execute. Top-level functions, so that they can be sent to other processes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from agpo_megatron.config.schema import PolicyConfig, TrainConfig
from agpo_megatron.types import TrainSequence

Plan = list[list[list[TrainSequence]]]
"""Micro-batches of each data-parallel replica."""


@dataclass(frozen=True)
class Case:
    """One update in one layout. ``before``/``after``: checkpoint folders to load first and to save last."""

    hf_dir: str
    policy: PolicyConfig
    train: TrainConfig
    plan: Plan
    update: dict[str, Any]
    temperature: float = 1.0
    steps: int = 1
    before: str = ""
    after: str = ""
    gradients: bool = False
    scores: bool = False


@dataclass
class Outcome:
    """What a rank reports; tensors only from the rank that publishes its stage. ``layers``: of its stage."""

    stats: list[dict[str, float]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, tuple[list[float], float]] = field(default_factory=dict)
    layers: dict[int, list[int]] = field(default_factory=dict)
    step: int = -1


def execute(rank: int, case: Case) -> Outcome:
    """Build the policy of ``case``, update it, take the groups down again."""
    logging.disable(logging.WARNING)
    from agpo_megatron.policy import backend

    backend.activate("cpu")
    from agpo_megatron.policy import checkpoint, parallel, weights
    from agpo_megatron.policy.policy import Policy

    policy = Policy.build(
        case.hf_dir, case.policy, case.train, temperature=case.temperature, seed=1
    )
    try:
        outcome = Outcome()
        outcome.layers[policy.layout.pp_rank] = weights.layer_numbers(policy.chunks)
        if case.before:
            outcome.step, _ = checkpoint.load(case.before, policy)
        mine = case.plan[policy.layout.dp_rank]
        if case.scores:
            scored = policy.score(mine)
            outcome.scores = {k: (s.logprobs, s.entropy) for k, s in scored.items()}
        for _ in range(case.steps):
            outcome.stats.append(policy.update(mine, **case.update))
        outcome.weights = {n: t.clone() for n, t in policy.named_hf_tensors()}
        if case.gradients:
            outcome.gradients = _gradients(policy)
        if case.after:
            checkpoint.save(case.after, policy, case.steps, {"note": "parity"})
        return outcome
    finally:
        parallel.shutdown()


def _gradients(policy: Any) -> dict[str, Tensor]:
    """Full gradients by Hugging Face name; needs the plain optimizer (whole buffers) and no norm clipping."""
    from agpo_megatron.policy import weights

    held = {}
    for parameter in weights.global_parameters(policy.chunks).values():
        held[parameter] = parameter.data
        parameter.data = parameter.main_grad
    try:
        return {n: t.clone() for n, t in policy.named_hf_tensors()}
    finally:
        for parameter, data in held.items():
            parameter.data = data


def merged(outcomes: list[Outcome]) -> Outcome:
    """One outcome of all ranks: stages' tensors united, statistics checked to be the same everywhere."""
    whole = Outcome(stats=outcomes[0].stats, step=outcomes[0].step)
    for outcome in outcomes:
        assert outcome.stats == whole.stats, "ranks report different statistics"
        for part in ("weights", "gradients", "scores", "layers"):
            getattr(whole, part).update(getattr(outcome, part))
    return whole
