"""Execution of the contract: one recorded batch through one layout of the real policy, compared with the reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from agpo_megatron.algorithm.settings import (
    ClipSettings,
    CorrectionSettings,
    EntropySettings,
    KlSettings,
    LossSettings,
)
from agpo_megatron.config.schema import PolicyConfig, TrainConfig
from agpo_megatron.parity import models
from agpo_megatron.parity.batch import (
    Division,
    Recorded,
    Split,
    off_policy,
    recorded,
    split,
    train_sequences,
)
from agpo_megatron.parity.cases import Case, CaseResult, execute, merged
from agpo_megatron.parity.comparison import (
    FP32,
    Deviation,
    Limits,
    deviations,
    gradient_of_each_tensor,
    optimizer,
    update_deviations,
)
from agpo_megatron.parity.ranks import Ranks
from agpo_megatron.parity.reference import Objective, Truth, truth
from agpo_megatron.parity.reference import updates as reference_updates
from agpo_megatron.samples import TrainSequence


def one_step(expected: Truth) -> TrainConfig:
    """Return optimizer settings for a comparable single step. AdamW's first step is lr g / (|g| + eps): with eps a
    tenth of the largest entry its deviation is at most ten times that of the gradient. A small eps would turn the
    rounding of small entries into whole steps, a small lr hide them in that of the parameters. The norm never clips."""
    largest = max(float(g.abs().max()) for g in expected.gradients.values())
    return TrainConfig(lr=1.0, weight_decay=0.01, adam_eps=0.1 * largest or 1.0, grad_clip=1e6)


RENEWED_AFTER = 25
"""Calls to one pool of ranks: a few gloo groups of every layout outlive their destruction, and each keeps three threads
that never stop waking; after a hundred layouts they cost more than new processes."""

Divider = Callable[[list[TrainSequence], int], Division]
"""Function from the sequences and the number of replicas to micro-batches."""


@dataclass(frozen=True)
class Compared:
    """One step from the weights ``start`` with the optimizer ``train``: the result of a layout, and the truth."""

    found: CaseResult
    truth: Truth
    start: dict[str, Tensor]
    train: TrainConfig

    def deviations(self, limits: Limits = FP32) -> list[Deviation]:
        return deviations(self.found, self.truth, self.start, self.train, limits)

    def tensors(self, limits: Limits = FP32) -> list[Deviation]:
        """Return the deviation of each tensor's gradient, worst first."""
        return gradient_of_each_tensor(self.found, self.truth, limits)


class Contract:
    """Models, truths and ranks, made once and used by many cases. ``folder``: for checkpoints; ``ranks``: number to
    start, more if a case needs them.

    Use it as a context manager: leaving it ends the ranks.
    """

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder = folder
        self._size = ranks
        self._pool: Ranks | None = None
        self._weights: dict[str, dict[str, Tensor]] = {}
        self._truths: dict[tuple[str, Objective, bool], tuple[list[Recorded], Truth]] = {}

    def __enter__(self) -> Contract:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.close()

    def ranks(self, world: int) -> Ranks:
        """Return at least ``world`` processes, started on the first call, after a failure and ``RENEWED_AFTER``."""
        if self._pool is not None:
            worn = not self._pool.alive or self._pool.calls >= RENEWED_AFTER
            if worn or world > self._size:
                self._pool.close()
                self._pool = None
        if self._pool is None:
            self._size = max(self._size, world)
            self._pool = Ranks(self._size)
        return self._pool

    def model(self, name: str, config: dict[str, Any]) -> Path:
        """Return the checkpoint folder of ``config``, written on the first call."""
        path = self.folder / name
        if name not in self._weights:
            models.write(path, config)
            self._weights[name] = models.weights_of(path)
        return path

    def truth(
        self, model: Path, objective: Objective, *, on_policy: bool = False
    ) -> tuple[list[Recorded], Truth]:
        """Return the recorded batch and its truth. ``on_policy``: at ratio 1, without reference log-probs."""
        key = (model.name, objective, on_policy)
        if key not in self._truths:
            config = json.loads((model / "config.json").read_text())
            batch = recorded(vocab=config["vocab_size"])
            weights = self._weights[model.name]
            if not on_policy:
                current = Objective(temperature=objective.temperature)
                _, now = self.truth(model, current, on_policy=True)
                batch = off_policy(batch, now.logprobs)
            self._truths[key] = batch, truth(weights, config, batch, objective)
        return self._truths[key]

    def updates(
        self,
        model: Path,
        policy: PolicyConfig,
        objective: Objective,
        parts: Sequence[Sequence[Recorded]],
        train: TrainConfig,
        how: Split = "packed",
    ) -> Updates:
        """Take one optimizer step per part of a batch, all with old log-probs of the weights before the first step; the
        layout is given them where the trainer would have scored them."""
        config = json.loads((model / "config.json").read_text())
        start = self._weights[model.name]
        scored, truths, weights = reference_updates(
            start, config, parts, objective, optimizer(train)
        )
        loss = loss_settings(objective)
        if not loss.scored_weights(len(parts))[0]:
            scored = [[replace(s, old_logprobs=[]) for s in part] for part in scored]
        sequences = [
            train_sequences(part, objective.aggregation, objective.norm_length, objective.tis)
            for part in scored
        ]
        found = self.run(
            model,
            policy,
            [split(part, policy.data_parallel, how) for part in sequences],
            loss,
            train,
            temperature=objective.temperature,
            scores=False,
        )
        return Updates(found, truths, start, weights)

    def run(
        self,
        model: Path,
        policy: PolicyConfig,
        plans: Sequence[Division],
        loss: LossSettings,
        train: TrainConfig,
        **more: Any,
    ) -> CaseResult:
        """Run any case in any layout. ``more``: further fields of ``Case``."""
        case = Case(str(model), policy, train, list(plans), loss, **more)
        world = policy.world_size
        return merged(self.ranks(world).run(world, execute, case))

    def build(self, model: Path, policy: PolicyConfig, **more: Any) -> CaseResult:
        """Build (or load, ``before=``) the policy, without an update."""
        return self.run(model, policy, [], LossSettings(), TrainConfig(), **more)

    def step(
        self,
        model: Path,
        policy: PolicyConfig,
        objective: Objective,
        how: Split | Divider,
        *,
        on_policy: bool = False,
        settings: Callable[[Truth], TrainConfig] = one_step,
        **more: Any,
    ) -> Compared:
        """Take one step on the recorded batch, divided by ``how``, and pair it with the truth. ``settings``: makes the
        optimizer's; ``more``: as for ``run``."""
        batch, expected = self.truth(model, objective, on_policy=on_policy)
        sequences = train_sequences(batch, objective.aggregation, objective.norm_length)
        cut = partial(split, how=how) if isinstance(how, str) else how
        train = settings(expected)
        found = self.run(
            model,
            policy,
            [cut(sequences, policy.data_parallel)],
            loss_settings(objective),
            train,
            temperature=objective.temperature,
            **more,
        )
        return Compared(found, expected, self._weights[model.name], train)


@dataclass(frozen=True)
class Updates:
    """Several optimizer steps on one batch: the result of a layout, the truth of each step, and the final weights."""

    found: CaseResult
    truths: list[Truth]
    start: dict[str, Tensor]
    weights: dict[str, Tensor]

    def deviations(self, limits: Limits = FP32) -> list[Deviation]:
        """Return the deviations: loss, mean ratio and gradient norm of every step, last gradient, and weights."""
        return update_deviations(self.found, self.truths, self.start, self.weights, limits)


def loss_settings(objective: Objective) -> LossSettings:
    """Convert ``objective`` to the policy's settings."""
    return LossSettings(
        policy=objective.kind,
        clip_low=objective.clip[0],
        clip_high=objective.clip[1],
        clip=ClipSettings(
            kind=objective.adaptive,
            min=objective.minimum,
            tau=objective.tau,
            scope=objective.scope,
        ),
        kl=KlSettings(coef=objective.kl),
        entropy=EntropySettings(coef=objective.entropy),
        correction=CorrectionSettings()
        if objective.tis is None
        else CorrectionSettings(kind="tis", high=objective.tis),
    )
