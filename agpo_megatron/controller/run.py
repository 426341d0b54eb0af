"""The run as the controller drives it: its journal, trainer, metrics and progress, and the operations on them."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from agpo_megatron.journal.records import place_on_loss_mask, read_scores, sequence_columns
from agpo_megatron.observe.metrics import MetricsWriter
from agpo_megatron.observe.progress import Progress
from agpo_megatron.samples import Floats, Sample, WeightVersion
from agpo_megatron.wait import waiting

log = logging.getLogger(__name__)
LEAD_MARGIN = 60.0
"""Seconds beside step and save, for a late signal of Slurm and the end of the processes."""


class StoppedOnRequest(Exception):
    """The run was asked to end and has saved a checkpoint; the same command continues it."""


@dataclass(frozen=True)
class Recipe:
    """The number of optimizer steps of one kind of run, and their learning rates."""

    lr: float
    warmup_steps: int
    steps: int
    schedule: str = "constant"
    min_lr: float = 0.0

    def lr_at(self, step: int) -> float:
        """Return the learning rate of step ``step`` (from 1): linear warm-up, then the schedule down to ``min_lr``."""
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
    seconds spent on it. ``replayed``: it was committed by an earlier start, or by another run."""

    record: BatchRecord
    journal: Path
    name: str
    timings: dict[str, float] = field(default_factory=dict)
    replayed: bool = False


@dataclass
class Run:
    """One start (attempt) of a run.

    ``version``: the trainer's current weight version; ``moved``: a step with a gradient was taken since it was last
    published. ``backend``: backend of its collectives, set by ``load``.
    ``stop_requested``: returns whether to end after the current step. ``signal_lead``: seconds allowed from the
    request to the saved checkpoint; None without a limit.
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
    moved: bool = field(init=False, default=False)
    backend: str = field(init=False)
    stop_requested: Callable[[], bool] = field(init=False, default_factory=lambda: lambda: False)
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
        """Load the newest complete checkpoint, or the initial weights; return the step that the trainer then holds.

        Trainers that outlived their last controller may be at a later step, and stay there. ``recorded``: the journal
        to train on, if it is not this run's.
        """
        saved = self.folder.complete_checkpoints()
        step, path = saved[-1] if saved else (0, None)
        with self.phase("load weights", {}, ""):
            answers = await self.trainers.call("load", checkpoint=path and str(path), step=step)
        # Only now: trainers that outlived their controller may still have been saving.
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
        """Take the steps of ``batch`` that the trainer has not taken yet; report each, and save when due.

        Raises StoppedOnRequest after a step when the run is asked to end, JournalError when the batch is not the next
        one for the weights.
        """
        timings, whole, tokens = batch.timings, 0.0, int(batch.record.tokens.sum())
        waits = {
            key: timings[name]
            for key, name in (
                ("idle/trainer_frac", "time/rollout"),
                ("idle/publish_frac", "time/publish"),
            )
            if name in timings
        }
        for step in batch.record.steps:
            if not self.version.step < step <= self.recipe.steps:
                continue
            name = f"{'replay' if batch.replayed else 'update'} step {step}"
            with seconds_into(timings, "time/step"), self.phase(name, timings, "time/update"):
                result = await self.update(batch, step)
            whole += timings["time/step"]
            if step == batch.record.steps[-1]:
                timings["throughput/tokens_per_s"] = tokens / whole
                timings |= {key: seconds / whole for key, seconds in waits.items()}
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
        """Commit the decision about ``groups`` as the batch of the next ``updates`` optimizer steps."""
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
            gate_levels=decision.gate_levels,
            gate_state=decision.gate_state,
        )
        record, name = await asyncio.to_thread(self.journal.commit, record, decision.columns)
        return Batch(record, self.folder.journal, name, timings)

    async def _save_if_due(self) -> None:
        """Save every ``run.checkpoint_every`` steps and at the last; before that, end if asked to."""
        step, last = self.version.step, self.recipe.steps
        if step % self.config.run.checkpoint_every == 0 or step == last:
            await self.save()
        if step < last:
            await self.stop_if_asked()

    async def stop_if_asked(self) -> None:
        """Between two steps: if the run is asked to end, save what is not saved yet, and raise StoppedOnRequest."""
        if not self.stop_requested():
            return
        step = self.version.step
        if step and step not in dict(self.folder.complete_checkpoints()):
            await self.save()
        done = f"after step {step}, which is saved" if step else "before the first step"
        raise StoppedOnRequest(f"asked to end: stopped {done}")

    async def update(self, batch: Batch, step: int) -> dict[str, float]:
        """Take one optimizer step on its part of the batch and advance ``version``.

        Raises JournalError when ``step`` is not the next one.
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
        self.moved |= results[0]["grad_norm"] * self.recipe.lr_at(step) > 0
        return results[0]

    async def plan(self, lengths: Sequence[int]) -> list[list[list[int]]]:
        """Plan the micro-batches of sequences of these lengths, by data-parallel rank."""
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
        """Let the trainer compute the log-probs that the decision about a batch needs; empty if it needs none."""
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
                digest = results[0]["digest"]
                found[weights] = await asyncio.to_thread(_scores_of, samples, path, digest)
            path.unlink()
            if weights == "policy":
                entropy = float(results[0]["entropy"])
        return Scores(found["policy"], found["reference"], entropy)

    async def save(self) -> None:
        """Save a checkpoint of the current step; keep the newest ``run.keep_checkpoints``."""
        step = self.version.step
        timings: dict[str, float] = {}
        with self.phase(f"save step {step}", timings, "time/save"):
            await self.trainers.call("save", path=str(self.folder.checkpoint(step)), step=step)
        self._check_lead(timings)
        await asyncio.to_thread(self._remove_old)

    def _check_lead(self, timings: dict[str, float]) -> None:
        """Warn, at each new maximum, when the longest step, the longest save and a minute exceed ``signal_lead``."""
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
        """Remove all but the newest ``run.keep_checkpoints``, and the journal before those if so configured."""
        checkpoints = self.folder.complete_checkpoints()
        kept = checkpoints[-self.config.run.keep_checkpoints :]
        for _, old in checkpoints[: -len(kept)]:
            (old / CHECKPOINT_MARKER).unlink()  # first: a half-removed folder is no checkpoint
            shutil.rmtree(old)
        if self.config.journal.keep == "checkpoints":
            self.journal.prune(before_step=kept[0][0] + 1)

    async def export(self, path: Path) -> None:
        """Write the policy as a Hugging Face checkpoint."""
        with self.phase("export the policy", {}, ""):
            await self.trainers.call("export", path=str(path))

    def report(
        self, record: BatchRecord, step: int, result: dict[str, float], timings: dict[str, float]
    ) -> None:
        """Write the metrics of a step, once: a replayed step that has been reported is skipped. Metrics of the whole
        batch are written with its first step."""
        self._check_lead(timings)
        if self.metrics.has(step):
            return
        whole = dict(record.metrics) if step == record.first_step else {}
        if record.gate_levels:
            whole["loss/gate_level"] = record.gate_levels[step - record.first_step]
        metrics = {**whole, **result, "lr": self.recipe.lr_at(step), **timings, "step": step}
        self.metrics.write(metrics)
        self.progress.step(metrics)


def _scores_of(samples: Mapping[str, Sample], path: Path, digest: str) -> dict[str, Floats]:
    """Read what a trainer has scored; each log-prob at its place in the response."""
    return {
        sample_id: place_on_loss_mask(logprobs, samples[sample_id])
        for sample_id, logprobs in read_scores(path, read_file(path, digest)).items()
    }


@contextmanager
def seconds_into(timings: dict[str, float], key: str) -> Iterator[None]:
    """Add the wall seconds of the block to ``timings[key]``."""
    started = time.monotonic()
    try:
        yield
    finally:
        timings[key] = timings.get(key, 0.0) + time.monotonic() - started


def remove_leftovers(folder: RunFolder) -> None:
    """Remove the leftovers of a killed attempt: checkpoints without a marker, their temporary folders, scores."""
    for path in folder.path.glob("*scores-*.arrow*"):
        path.unlink()
    if folder.checkpoints.is_dir():
        complete = {path for _, path in folder.complete_checkpoints()}
        for path in folder.checkpoints.iterdir():
            if path not in complete and re.fullmatch(r"\.?step-\d+(\.\w+)?", path.name):
                shutil.rmtree(path)
