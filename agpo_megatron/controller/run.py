"""What the controller's loops share: one run's journal, trainer, metrics and progress, and its steps of work."""

from __future__ import annotations

import asyncio
import json
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
from typing import Any

from agpo_megatron.config.run_folder import CHECKPOINT_MARKER, RunFolder
from agpo_megatron.config.schema import Config
from agpo_megatron.controller.batching import NO_SCORES, Scores, plan_micro_batches
from agpo_megatron.controller.trainer_client import TrainerClient
from agpo_megatron.files import write_durably
from agpo_megatron.journal import Journal, JournalError, JournalReader, StepRecord
from agpo_megatron.journal.records import read_scores
from agpo_megatron.journal.writer import JournaledGroup
from agpo_megatron.observe.metrics import MetricsWriter
from agpo_megatron.observe.progress import Progress
from agpo_megatron.types import Sample, VersionSpan, WeightVersion
from agpo_megatron.wait import waiting

log = logging.getLogger(__name__)
LEAD_MARGIN = 60.0
"""Seconds beside step and save: Slurm may signal late, processes end."""


class StoppedOnRequest(Exception):
    """The run was asked to end and has saved a checkpoint; the same command continues it."""


@dataclass(frozen=True)
class Recipe:
    """How one kind of run turns a step record into an update. ``loss``: of policy.objective.LossSettings."""

    loss: dict[str, Any]
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
            record = reader.read_record(reader.step_names()[held])
            self.report(record, self._stats(record, answers[0]["last_update"]), {})
        return held

    def _stats(self, record: StepRecord, result: dict[str, float]) -> dict[str, float]:
        """Metrics of an update from what the trainer answered."""
        return {**result, "lr": self.recipe.lr_at(record.step)}

    async def save_if_due(self, last: int) -> None:
        """Checkpoint every ``run.checkpoint_every`` steps, at step ``last``, and when asked to end.

        Raises StoppedOnRequest after the latter.
        """
        step = self.version.step
        stop = self.stop_requested() and step < last
        if step % self.config.run.checkpoint_every == 0 or step == last or stop:
            await self.save()
        if stop:
            raise StoppedOnRequest(f"asked to end: stopped after step {step}, which is saved")

    async def update(self, record: StepRecord, journal: Path, name: str) -> dict[str, float]:
        """One optimizer step on the committed record ``name``; afterwards ``version`` is one step further.

        Raises JournalError when it is not the step after the weights'.
        """
        if record.step != self.version.step + 1:
            raise JournalError(
                f"step {self.version.step + 1} is neither in a checkpoint nor in {journal} "
                f"(next there: {record.step}); restore a checkpoint, or start in another --run-dir"
            )
        with_weight = [i for i, row in enumerate(record.rows) if row.has_weight]
        plan = await self.plan([record.rows[i].tokens for i in with_weight])
        numbered = [[[with_weight[i] for i in batch] for batch in rank] for rank in plan]
        results = await self.trainers.call(
            "update",
            journal=str(journal),
            record=name,
            step=record.step,
            plan=numbered,
            loss={**self.recipe.loss, "entropy_coef": record.entropy_coef},
            lr=self.recipe.lr_at(record.step),
        )
        self.version = WeightVersion(record.step, self.journal.attempt)
        return self._stats(record, results[0])

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
        """What the step's decisions need of the trainer before it is committed; nothing if they need nothing."""
        loss = self.config.algorithm.loss
        old = (
            loss.correction.kind != "none"
            or loss.entropy.target is not None
            or (loss.kl.coef > 0 and loss.kl.place == "reward")
        )
        wanted = [("policy", old), ("reference", loss.kl.coef > 0)]
        if not groups or not any(asked for _, asked in wanted):
            return NO_SCORES
        samples = [sample for j in groups for sample in j.group.samples]
        plan = await self.plan([len(s.prompt_tokens) + len(s.response_tokens) for s in samples])
        rows = [[ref.segment, ref.row, j.digest] for j in groups for ref in j.refs]
        found: dict[str, dict[str, list[float]]] = {"policy": {}, "reference": {}}
        entropy = None
        for weights, asked in wanted:
            if not asked:
                continue
            path = self.folder.scores(weights)
            name = f"score step {self.version.step + 1} with {weights} weights"
            with self.phase(name, timings, "time/score"):
                results = await self.trainers.call(
                    "score_samples",
                    journal=str(self.folder.journal),
                    samples=rows,
                    plan=plan,
                    weights=weights,
                    path=str(path),
                )
                found[weights] = await asyncio.to_thread(read_scores, path, results[0]["digest"])
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

    async def replay(self, done: int) -> None:
        """Train again on the committed steps that the checkpoint does not contain; nothing is generated."""
        for step, name in sorted(self.journal.reader.step_names().items()):
            if step <= done:
                continue
            timings: dict[str, float] = {}
            record = self.journal.reader.read_record(name)
            with self.phase(f"replay step {step}", timings, "time/update"):
                stats = await self.update(record, self.folder.journal, name)
            self.report(record, stats, timings)

    def report(
        self, record: StepRecord, stats: dict[str, float], timings: dict[str, float]
    ) -> None:
        """Write the step's metrics, once: a replayed step that was already reported is not reported again."""
        self._check_lead(timings)
        if self.metrics.has(record.step):
            return
        metrics: dict[str, Any] = {**record.metrics, **stats, **timings, "step": record.step}
        if metrics.get("time/step"):
            tokens = sum(row.tokens for row in record.rows)
            metrics["throughput/tokens_per_s"] = tokens / metrics["time/step"]
        self.metrics.write(metrics)
        self.progress.step(metrics)

    def saved_evaluation(self, step: int) -> Evaluation | None:
        path = self.folder.evaluation(step)
        return Evaluation.read(path) if path.exists() else None

    def save_evaluation(self, step: int, evaluation: Evaluation) -> None:
        evaluation.write(self.folder.evaluation(step))


@dataclass(frozen=True)
class Evaluation:
    """``scores``: accuracy, tokens_mean, tokens_correct_mean (0 if none is right). ``samples``: one per problem."""

    scores: dict[str, float]
    samples: list[Sample]

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"scores": self.scores, "samples": [asdict(sample) for sample in self.samples]}
        write_durably(path, json.dumps(content).encode())

    @staticmethod
    def read(path: Path) -> Evaluation:
        content = json.loads(path.read_text())
        samples = [
            Sample(**{**s, "versions": [VersionSpan(**v) for v in s["versions"]]})
            for s in content["samples"]
        ]
        return Evaluation(content["scores"], samples)


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
