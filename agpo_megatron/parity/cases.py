"""The program of the ranks of a layout: build the policy, score, update, report."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from agpo_megatron.algorithm.settings import LossSettings
from agpo_megatron.config.schema import PolicyConfig, TrainConfig
from agpo_megatron.parity.batch import Division
from agpo_megatron.samples import Floats


@dataclass(frozen=True)
class Case:
    """Optimizer steps in one layout. ``plans``: one per step.

    ``before``/``after``: checkpoint folders to load first and to save last. ``gradients``: report those of the last
    step; ``scores``: those of the last plan, under the weights before it. ``fault``: makes a context around the whole
    case, in which tests of the contract plant bugs.
    """

    hf_dir: str
    policy: PolicyConfig
    train: TrainConfig
    plans: list[Division]
    loss: LossSettings
    temperature: float = 1.0
    before: str = ""
    after: str = ""
    gradients: bool = True
    scores: bool = True
    seed: int = 1
    fault: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass
class CaseResult:
    """The report of a rank; tensors only from the rank that publishes its stage. ``stats``: one per step;
    ``scores``: log-probs and mean entropy by sample id; ``layers``: numbers by stage; ``random``: digest of the random
    states at each (stage, tensor, expert) position."""

    stats: list[dict[str, float]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, tuple[Floats, float]] = field(default_factory=dict)
    layers: dict[int, list[int]] = field(default_factory=dict)
    random: dict[tuple[int, int, int], str] = field(default_factory=dict)
    step: int = -1


def execute(rank: int, case: Case) -> CaseResult:
    """Build the policy of ``case``, update it, and destroy the process groups."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    from agpo_megatron.policy import backend

    backend.activate("cpu")
    from agpo_megatron.policy import parallel
    from agpo_megatron.policy.policy import Policy

    try:
        with case.fault():
            policy = Policy.build(
                case.hf_dir,
                case.policy,
                case.train,
                temperature=case.temperature,
                seed=case.seed,
            )
            return execute_on(policy, case)
    finally:
        parallel.shutdown()


def execute_on(policy: Any, case: Case) -> CaseResult:
    """Update ``policy``, this rank's, as ``case`` says; its process groups stay."""
    from agpo_megatron.policy import checkpoint, weights

    outcome = CaseResult()
    layout = policy.layout
    outcome.layers[layout.pp_rank] = weights.layer_numbers(policy.chunks)
    if case.before:
        outcome.step, _ = checkpoint.load(case.before, policy)
    for number, plan in enumerate(case.plans):
        mine = plan[layout.dp_rank]
        if case.scores and number == len(case.plans) - 1:
            scored = policy.score(mine)
            outcome.scores = {k: (s.logprobs, s.entropy) for k, s in scored.items()}
        outcome.stats.append(policy.update(mine, loss=case.loss, lr=case.train.lr))
    outcome.weights = {n: t.clone() for n, t in policy.named_hf_tensors()}
    if case.gradients:
        outcome.gradients = {n: t.clone() for n, t in policy.named_hf_gradients()}
    position = (layout.pp_rank, layout.tp_rank, layout.ep_rank)
    outcome.random[position] = checkpoint.random_digest()
    if case.after:
        checkpoint.save(case.after, policy, len(case.plans), {"note": "parity"})
    return outcome


def merged(outcomes: list[CaseResult]) -> CaseResult:
    """Merge the results of all ranks and stages. Raises ValueError when ranks report different statistics."""
    whole = CaseResult(stats=outcomes[0].stats, step=outcomes[0].step)
    for rank, outcome in enumerate(outcomes):
        if outcome.stats != whole.stats:
            raise ValueError(f"rank {rank} reports {outcome.stats}, rank 0 {whole.stats}")
        for part in ("weights", "gradients", "scores", "layers", "random"):
            getattr(whole, part).update(getattr(outcome, part))
    return whole
