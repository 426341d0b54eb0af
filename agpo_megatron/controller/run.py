"""What the controller's loops share: one run's journal, trainer, metrics and progress, and its steps of work."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from agpo_megatron.algorithm.step import NO_SCORES, Decision, Scores
from agpo_megatron.config.run_folder import CHECKPOINT_MARKER, RunFolder
from agpo_megatron.config.schema import Config
from agpo_megatron.controller.micro_batches import plan_micro_batches
from agpo_megatron.controller.trainer_client import TrainerClient
from agpo_megatron.journal import (
    BatchRecord,
    Journal,
    JournaledGroup,
    JournalError,
    JournalReader,
)
from agpo_megatron.journal.reader import read_file
from agpo_megatron.journal.records import at_the_masked_tokens, read_scores, sequence_columns
from agpo_megatron.observe.metrics import MetricsWriter
from agpo_megatron.observe.progress import Progress
from agpo_megatron.samples import Floats, WeightVersion
from agpo_megatron.wait import waiting

log = logging.getLogger(__name__)
LEAD_MARGIN = 60.0
"""Seconds beside step and save: Slurm may signal late, processes end."""


class StoppedOnRequest(Exception):
    """The run was asked to end and has saved a checkpoint; the same command continues it."""


@dataclass(frozen=True)
class Recipe:
    """How many optimizer steps one kind of run takes, and at which learning rates."""

    lr: float
    warmup_steps: int
    steps: int
    schedule: str = "constant"
    min_lr: float = 0.0

    def lr_at(self, step: int) -> float:
        """Learning rate of optimizer step ``step`` (from 1): linear warm-up, then the schedule down to ``min_lr``."""
        if step <= self.warmup_steps:
            return self.lr * step / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        shape = 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.min_lr + (self.lr - self.min_lr) * shape


@dataclass(frozen=True, eq=False)
class Batch:
    """A committed batch on its way to the trainer. ``journal``: the folder that holds its file ``name``. ``timings``:
    what making it took. ``replayed``: it was committed by an earlier start, or by another run."""

    record: BatchRecord
    journal: Path
    name: str
    timings: dict[str, float] = field(default_factory=dict)
    replayed: bool = False


@dataclass
class Run:
    """One start (attempt) of a run.

    ``version``: identity of the weights the trainer holds now. ``backend``: of its collectives, once it has loaded.
    ``stop_requested``: whether to end after the step under way. ``signal_lead``: seconds that it may take from the
    request to the saved checkpoint; None where there is no limit.
    """

    config: Config
    folder: RunFolder
    journal: Journal
    trainers: TrainerClient
    metrics: MetricsWriter
    progress: Progress
    recipe: Recipe
    hidden_size: int
    version: WeightVersion = field(init=False)
    backend: str = field(init=False)
    stop_requested: Callable[[], bool] = field(init=False, default=lambda: False)
    signal_lead: float | None = field(init=False, default=None)
    _longest: dict[str, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.version = WeightVersion(0, self.journal.attempt)

    @contextmanager
    def phase(self, name: str, timings: dict[str, float], key: str) -> Iterator[None]:
        """Show what the run is doing and add the seconds it took to ``timings[key]``."""
        self.progress.phase(name)
        log.info("phase %s", name)
        with waiting(name), seconds_into(timings, key):
            yield

    async def load(self, recorded: JournalReader | None = None) -> int:
        """Load the newest complete checkpoint, or the initial weights; returns the step that the trainer then holds.

        Trainers that outlived their last controller may be further than that, and stay where they are. ``recorded``:
        the journal that is trained on, if it is not this run's.
        """
        step, path = latest_checkpoint(self.folder)
        with self.phase("load weights", {}, ""):
            answers = await self.trainers.call("load", checkpoint=path and str(path), step=step)
        # Only now: trainers that outlived their controller may have been in the middle of saving.
        await asyncio.to_thread(remove_leftovers, self.folder)
        self.backend = answers[0]["backend"]
        held: int = answers[0]["step"]
        self.version = WeightVersion(held, self.journal.attempt)
        if held > step and not self.metrics.has(held):  # its result reached no controller
            reader = recorded or self.journal.reader
            record = reader.record(reader.batch_of(held).name)
            self.report(record, held, answers[0]["last_update"], {})
        return held

    async def advance(self, batch: Batch) -> None:
        """Take the optimizer steps of ``batch`` that the trainer has not taken yet, each reported, and saved when due.

        Raises StoppedOnRequest after a step when the run is asked to end, JournalError when the batch does not follow
        the weights.
        """
        timings = batch.timings
        for step in batch.record.steps:
            if not self.version.step < step <= self.recipe.steps:
                continue
            name = f"{'replay' if batch.replayed else 'update'} step {step}"
            with seconds_into(timings, "time/step"), self.phase(name, timings, "time/update"):
                result = await self.update(batch, step)
            self.report(batch.record, step, result, timings)
            timings = {}
            await self._save_if_due()

    async def commit(
        self,
        groups: Sequence[JournaledGroup],
        decision: Decision,
        *,
        updates: int,
        cursor: int,
        timings: dict[str, float],
    ) -> Batch:
        """Commit what was decided about ``groups`` as the batch of the next ``updates`` optimizer steps."""
        samples = [sample for journaled in groups for sample in journaled.group.samples]
        record = BatchRecord(
            first_step=self.version.step + 1,
            updates=updates,
            attempt=self.journal.attempt,
            cursor=cursor,
            weight_version=str(self.version),
            sample_ids=[sample.sample_id for sample in samples],
            tokens=np.array([sample.length for sample in samples], dtype=np.int32),
            samples=[block for journaled in groups for block in journaled.blocks],
            details=[],
            columns=sequence_columns(decision.columns, len(samples)),
            metrics=decision.metrics,
            entropy_coef=decision.entropy_coef,
            entropy_state=decision.entropy_state,
        )
        record, name = await asyncio.to_thread(self.journal.commit, record, decision.columns)
        return Batch(record, self.folder.journal, name, timings)

    async def _save_if_due(self) -> None:
        """Checkpoint every ``run.checkpoint_every`` steps, at the last, and when asked to end.

        Raises StoppedOnRequest after the latter.
        """
        step, last = self.version.step, self.recipe.steps
        stop = self.stop_requested() and step < last
        if step % self.config.run.checkpoint_every == 0 or step == last or stop:
            await self.save()
        if stop:
            raise StoppedOnRequest(f"asked to end: stopped after step {step}, which is saved")

    async def update(self, batch: Batch, step: int) -> dict[str, float]:
        """One optimizer step on its part of the batch; afterwards ``version`` is one step further.

        Raises JournalError when it is not the step after the weights'.
        """
        if step != self.version.step + 1:
            raise JournalError(
                f"step {self.version.step + 1} is neither in a checkpoint nor in {batch.journal} "
                f"(next there: {step}); restore a checkpoint, or start in another --run-dir"
            )
        rows = batch.record.rows(step)
        plan = await self.plan([int(batch.record.tokens[row]) for row in rows])
        results = await self.trainers.call(
            "update",
            journal=str(batch.journal),
            record=batch.name,
            step=step,
            plan=[[[rows[i] for i in some] for some in rank] for rank in plan],
            lr=self.recipe.lr_at(step),
        )
        self.version = WeightVersion(step, self.journal.attempt)
        return results[0]

    async def plan(self, lengths: Sequence[int]) -> list[list[list[int]]]:
        """Micro-batches of sequences of these lengths, by data-parallel rank."""
        policy = self.config.policy
        return await asyncio.to_thread(
            plan_micro_batches,
            lengths,
            data_parallel=policy.data_parallel,
            token_budget=self.config.train.micro_batch_tokens,
            multiple_of=policy.pipeline_parallel if policy.virtual_pipeline > 1 else 1,
            hidden_size=self.hidden_size,
        )

    async def score(self, groups: Sequence[JournaledGroup], timings: dict[str, float]) -> Scores:
        """What the decisions about a batch need of the trainer before it is committed; nothing if they need nothing."""
        config = self.config
        wanted = config.algorithm.loss.scored_weights(config.train.updates_per_batch)
        if not groups or not any(wanted):
            return NO_SCORES
        samples = {s.sample_id: s for j in groups for s in j.group.samples}
        plan = await self.plan([sample.length for sample in samples.values()])
        places = [list(asdict(block).values()) for j in groups for block in j.blocks]
        found: dict[str, dict[str, Floats]] = {"policy": {}, "reference": {}}
        entropy = None
        for weights, asked in zip(found, wanted, strict=True):
            if not asked:
                continue
            path = self.folder.scores(weights)
            name = f"score step {self.version.step + 1} with {weights} weights"
            with self.phase(name, timings, "time/score"):
                results = await self.trainers.call(
                    "score_samples",
                    journal=str(self.folder.journal),
                    samples=places,
                    plan=plan,
                    weights=weights,
                    path=str(path),
                )
                data = await asyncio.to_thread(read_file, path, results[0]["digest"])
            found[weights] = {
                sample_id: at_the_masked_tokens(logprobs, samples[sample_id])
                for sample_id, logprobs in read_scores(path, data).items()
            }
            path.unlink()
            if weights == "policy":
                entropy = float(results[0]["entropy"])
        return Scores(found["policy"], found["reference"], entropy)

    async def save(self) -> None:
        """Checkpoint the trainer at the current step; keep the newest ``run.keep_checkpoints``."""
        step = self.version.step
        timings: dict[str, float] = {}
        with self.phase(f"save step {step}", timings, "time/save"):
            await self.trainers.call("save", path=str(self.folder.checkpoint(step)), step=step)
        self._check_lead(timings)
        await asyncio.to_thread(self._remove_old)

    def _check_lead(self, timings: dict[str, float]) -> None:
        """Warn, once per record, when the longest step, save and a minute do not fit between signal and time limit."""
        before = sum(self._longest.values())
        for key in ("time/step", "time/save"):
            self._longest[key] = max(self._longest.get(key, 0.0), timings.get(key, 0.0))
        step, save = self._longest["time/step"], self._longest["time/save"]
        needed = step + save + LEAD_MARGIN
        if self.signal_lead is None or needed <= self.signal_lead or step + save == before:
            return
        text = (
            f"the longest step {step:.0f} s + save {save:.0f} s + {LEAD_MARGIN:.0f} s = {needed:.0f} s exceed the "
            f"{self.signal_lead:.0f} s from signal to time limit; raise --signal and signal_lead in the batch script"
        )
        log.warning("%s", text)
        sys.stderr.write(f"warning: {text}\n")

    def _remove_old(self) -> None:
        """Checkpoints behind the newest ``run.keep_checkpoints``, and the journal behind those if so configured."""
        checkpoints = complete_checkpoints(self.folder)
        kept = checkpoints[-self.config.run.keep_checkpoints :]
        for old in checkpoints[: -len(kept)]:
            (old / CHECKPOINT_MARKER).unlink()  # first: a half-removed folder is no checkpoint
            shutil.rmtree(old)
        if self.config.journal.keep == "checkpoints":
            self.journal.prune(before_step=step_of(kept[0]) + 1)

    async def export(self, path: Path) -> None:
        """Write the policy as a Hugging Face checkpoint."""
        with self.phase("export the policy", {}, ""):
            await self.trainers.call("export", path=str(path))

    def report(
        self, record: BatchRecord, step: int, result: dict[str, float], timings: dict[str, float]
    ) -> None:
        """Write the step's metrics, once: a replayed step that was already reported is not reported again. What is
        known of the whole batch stands with its first step."""
        self._check_lead(timings)
        if self.metrics.has(step):
            return
        whole = record.metrics if step == record.first_step else {}
        metrics = {**whole, **result, "lr": self.recipe.lr_at(step), **timings, "step": step}
        if metrics.get("time/step"):
            part = record.columns["update"] == step - record.first_step
            metrics["throughput/tokens_per_s"] = (
                int(record.tokens[part].sum()) / metrics["time/step"]
            )
        self.metrics.write(metrics)
        self.progress.step(metrics)


@contextmanager
def seconds_into(timings: dict[str, float], key: str) -> Iterator[None]:
    """Add the wall seconds of the block to ``timings[key]``."""
    started = time.monotonic()
    try:
        yield
    finally:
        timings[key] = timings.get(key, 0.0) + time.monotonic() - started


def complete_checkpoints(folder: RunFolder) -> list[Path]:
    """Checkpoints of a run, oldest first; half-written folders do not count."""
    return sorted(p for p in folder.checkpoints.glob("step-*") if (p / CHECKPOINT_MARKER).exists())


def remove_leftovers(folder: RunFolder) -> None:
    """What a killed attempt left half-done: checkpoints without their marker, their temporary folders, scores."""
    for path in folder.path.glob("*scores-*.arrow*"):
        path.unlink()
    if folder.checkpoints.is_dir():
        complete = set(complete_checkpoints(folder))
        for path in folder.checkpoints.iterdir():
            if path not in complete and re.fullmatch(r"\.?step-\d+(\.\w+)?", path.name):
                shutil.rmtree(path)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def latest_checkpoint(folder: RunFolder) -> tuple[int, Path | None]:
    """Newest complete checkpoint and its step; (0, None) when there is none."""
    found = complete_checkpoints(folder)
    return (step_of(found[-1]), found[-1]) if found else (0, None)
