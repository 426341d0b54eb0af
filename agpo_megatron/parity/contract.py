"""The contract, executed: one recorded batch through one layout of the real policy, compared with the reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from agpo_megatron.algorithm.settings import (
    ClipSettings,
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
    """Optimizer settings of a single step that can be compared. AdamW's first step is lr g / (|g| + eps): with eps a
    tenth of the largest entry it deviates at most ten times as far as the gradient; a small eps would turn the rounding
    of small entries into whole steps, a small lr drown them in the rounding of the parameters. The norm never clips."""
    largest = max(float(g.abs().max()) for g in expected.gradients.values())
    return TrainConfig(lr=1.0, weight_decay=0.01, adam_eps=0.1 * largest or 1.0, grad_clip=1e6)


RENEWED_AFTER = 25
"""Calls to one pool of ranks: of every layout a few gloo groups outlive their destruction, and each keeps three threads
that wake for ever; after a hundred layouts these cost more than new processes do."""

Divider = Callable[[list[TrainSequence], int], Division]
"""From the sequences and the number of replicas to micro-batches."""


@dataclass(frozen=True)
class Compared:
    """One step: what was found, from the weights ``start`` with the optimizer ``train``, and the truth."""

    found: CaseResult
    truth: Truth
    start: dict[str, Tensor]
    train: TrainConfig

    def deviations(self, limits: Limits = FP32) -> list[Deviation]:
        return deviations(self.found, self.truth, self.start, self.train, limits)

    def tensors(self, limits: Limits = FP32) -> list[Deviation]:
        """Of the gradient of each tensor, worst first."""
        return gradient_of_each_tensor(self.found, self.truth, limits)


class Contract:
    """Models, truths and ranks, made once and used by many cases. ``folder``: for checkpoints; ``ranks``: how many to
    start, more if a case needs them.

    A context manager: leaving it ends the ranks.
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
        """At least ``world`` processes, started when first asked for, again after a failure and ``RENEWED_AFTER``."""
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
        """The checkpoint folder of ``config``, written when first asked for."""
        path = self.folder / name
        if name not in self._weights:
            models.write(path, config)
            self._weights[name] = models.weights_of(path)
        return path

    def truth(
        self, model: Path, objective: Objective, *, on_policy: bool = False
    ) -> tuple[list[Recorded], Truth]:
        """The recorded batch and what the reference says of it. ``on_policy``: at ratio 1, without a reference."""
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
        """One batch of several updates, its ``parts``: each one optimizer step, with old log-probs of the weights
        before the first."""
        config = json.loads((model / "config.json").read_text())
        start = self._weights[model.name]
        scored, truths, weights = reference_updates(
            start, config, parts, objective, optimizer(train)
        )
        sequences = [
            train_sequences(part, objective.aggregation, objective.norm_length) for part in scored
        ]
        found = self.run(
            model,
            policy,
            [split(part, policy.data_parallel, how) for part in sequences],
            loss_settings(objective),
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
        """Any case in any layout. ``more``: further fields of ``Case``."""
        case = Case(str(model), policy, train, list(plans), loss, **more)
        world = policy.world_size
        return merged(self.ranks(world).run(world, execute, case))

    def build(self, model: Path, policy: PolicyConfig, **more: Any) -> CaseResult:
        """The policy as built (or loaded, ``before=``), not updated."""
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
        """One step of the recorded batch, cut as ``how`` says, beside the truth. ``settings``: of the optimizer;
        ``more``: as for ``run``."""
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
    """Several optimizer steps on one batch: what a layout found, the truth of each, and the weights at the end."""

    found: CaseResult
    truths: list[Truth]
    start: dict[str, Tensor]
    weights: dict[str, Tensor]

    def deviations(self, limits: Limits = FP32) -> list[Deviation]:
        """Of the loss, the mean ratio and the gradient norm of every step, and of the last gradient and the weights."""
        return update_deviations(self.found, self.truths, self.start, self.weights, limits)


def loss_settings(objective: Objective) -> LossSettings:
    """``objective`` in the policy's words."""
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
    )
