"""The run as the controller drives it: its journal, trainer, metrics and progress, and the operations on them."""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from agpo_megatron.algorithm.step import NO_SCORES, Decision, Scores
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.config.schema import Config
from agpo_megatron.controller.batch import Batch
from agpo_megatron.controller.checkpoints import remove_leftovers, remove_old, set_aside
from agpo_megatron.controller.guards import fires
from agpo_megatron.controller.micro_batches import plan_micro_batches
from agpo_megatron.controller.trainer_client import TrainerClient
from agpo_megatron.controller.vitals import Vitals
from agpo_megatron.controller.watch import GuardStop, Watch, stop_message
from agpo_megatron.conversion.shape import ModelShape
from agpo_megatron.journal import (
    BatchRecord,
    Journal,
    JournaledGroup,
    JournalError,
    JournalReader,
    StepVerdict,
)
from agpo_megatron.journal.reader import read_file
from agpo_megatron.journal.records import place_on_loss_mask, read_scores, sequence_columns
from agpo_megatron.observe.flops import training_flops, utilisation
from agpo_megatron.observe.metrics import MetricsWriter, read_metrics
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


@dataclass
class Run:
    """One start (attempt) of a run.

    ``version``: the trainer's current weight version; ``moved``: a step with a gradient was taken since it was last
    published. ``backend``: backend of its collectives, set by ``load``.
    ``vitals``: what is known of the roles; ``shape``: of the model, for its FLOPs.
    ``stop_requested``: returns whether to end after the current step. ``signal_lead``: seconds allowed from the
    request to the saved checkpoint; None without a limit.
    ``begin``: step and checkpoint that the run starts from when it has none of its own.
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
    watch: Watch = field(init=False)
    begin: tuple[int, Path | None] = field(init=False, default=(0, None))
    vitals: Vitals | None = field(init=False, default=None)
    shape: ModelShape | None = field(init=False, default=None)
    _longest: dict[str, float] = field(init=False, default_factory=dict)
    _saving: int | None = field(init=False, default=None)
    _last_save: float = field(init=False, default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.version = WeightVersion(0, self.journal.attempt)
        self.watch = Watch(self.config, self.folder, self.journal, read_metrics(self.folder.path))

    @contextmanager
    def phase(self, name: str, timings: dict[str, float], key: str) -> Iterator[None]:
        """Show what the run is doing and add the seconds it took to ``timings[key]``."""
        self.progress.phase(name)
        log.info("phase %s", name)
        with waiting(name), seconds_into(timings, key):
            yield

    @property
    def checkpoint(self) -> tuple[int, Path | None]:
        """Step and folder of the newest complete checkpoint; None: the initial weights."""
        saved = self.folder.complete_checkpoints()
        return saved[-1] if saved else self.begin

    async def load(
        self, recorded: JournalReader | None = None, begin: tuple[int, Path | None] = (0, None)
    ) -> int:
        """Load the newest complete checkpoint, or the initial weights; return the step that the trainer then holds.

        Trainers that outlived their last controller may be at a later step, and stay there. A damaged checkpoint is
        set aside, and the one before it taken; JournalError when the journal does not lead from that to the damaged
        one, or when it is that of ``begin``. ``recorded``: the journal to train on, if it is not this run's. ``begin``:
        step and checkpoint to start from while there is none here. Raises GuardStop if a guard has stopped the run,
        under the settings of now.
        """
        self.begin = begin
        await asyncio.to_thread(self.watch.read, recorded)
        saved = self.folder.complete_checkpoints()
        with self.phase("load weights", {}, ""):
            while True:
                step, path = saved.pop() if saved else begin
                answers = await self.trainers.call("load", checkpoint=path and str(path), step=step)
                damaged = answers[0]["damaged"]
                if not (damaged and path):
                    break
                if path == begin[1]:
                    raise JournalError(
                        f"{damaged}; {path} is the checkpoint that this replay begins from: restore it from a copy"
                    )
                older, reader = saved[-1][0] if saved else begin[0], recorded or self.journal.reader
                await asyncio.to_thread(set_aside, path, step, damaged, older, reader)
        # Only now: trainers that outlived their controller may still have been saving.
        await asyncio.to_thread(remove_leftovers, self.folder)
        self.backend = answers[0]["backend"]
        held: int = answers[0]["step"]
        self.version = WeightVersion(held, self.journal.attempt)
        if held > step and not self.metrics.has(held):  # its result reached no controller
            reader = recorded or self.journal.reader
            name = reader.batch_of(held).name
            settled = name != reader.batches()[-1].name
            batch = Batch(reader.record(name), reader.folder, name, {}, True, settled)
            await self.conclude(batch, held, answers[0]["last_update"], {})
        if held > step:  # and perhaps nobody has saved it yet
            await self._save_what_is_due()
        return held

    async def advance(self, batch: Batch) -> None:
        """Take the steps of ``batch`` that the trainer has not taken yet; report each, and save when due.

        Raises StoppedOnRequest after a step when the run is asked to end, JournalError when the batch is not the next
        one for the weights.
        """
        timings, whole, tokens = batch.timings, 0.0, int(batch.record.tokens.sum())
        trained = timings.get("time/score", 0.0)
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
            trained += timings["time/update"]
            timings |= self._trainer_metrics(batch, step, result, timings["time/update"])
            if step == batch.record.steps[-1]:
                if not batch.replayed:  # of the others nobody knows what their generation took
                    timings["throughput/tokens_per_s"] = tokens / whole
                    timings["busy/trainer_frac"] = trained / whole
                timings |= {key: seconds / whole for key, seconds in waits.items()}
            timings |= await asyncio.to_thread(self.vitals.memory) if self.vitals else {}
            await self.conclude(batch, step, result, timings)
            timings = {}
            await self._save_what_is_due()
            if self.version.step < self.recipe.steps:
                await self.stop_if_asked()

    def _trainer_metrics(
        self, batch: Batch, step: int, result: Mapping[str, float], seconds: float
    ) -> dict[str, float]:
        """Tokens per second of an update, and its MFU if the peak is stated; neither where nothing was computed."""
        record, peak = batch.record, self.config.observe.peak_tflops
        rows = record.rows(step)
        if not rows or not result.get("tokens/trained"):
            return {}
        lengths = record.tokens[rows]
        found = {"throughput/trainer_tokens_per_s": int(lengths.sum()) / seconds}
        if peak is not None and self.shape is not None:
            flops = training_flops(self.shape, lengths, record.columns["trained"][rows].sum())
            devices = self.config.policy.world_size
            found["throughput/mfu"] = utilisation(flops, seconds, peak, devices)
        return found

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
        step = self.version.step + 1
        record = BatchRecord(
            first_step=step,
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
            limits=self.watch.limits(step, rewarded="reward/mean" in decision.metrics),
            fired=self.watch.firings(step),
            gate_levels=decision.gate_levels,
            gate_state=decision.gate_state,
        )
        record, name = await asyncio.to_thread(self.journal.commit, record, decision.columns)
        return Batch(record, self.folder.journal, name, timings)

    async def _save_what_is_due(self) -> None:
        """After a step: export and save if due, and at the last."""
        run, step, last = self.config.run, self.version.step, self.recipe.steps
        path = self.folder.export(step)
        # Before the save: behind a complete checkpoint no export is missing.
        if run.export_every and step % run.export_every == 0 and not path.exists():
            await self.export(path)
        seconds = time.monotonic() - self._last_save
        late = 0 < run.checkpoint_minutes * 60 <= seconds
        if step % run.checkpoint_every == 0 or late or step == last:
            await self.save(wait=step == last)
        else:
            await self.settle_save()

    async def stop_if_asked(self) -> None:
        """Between two steps: if the run is asked to end, save what is not saved yet, and raise StoppedOnRequest."""
        await self.settle_save(wait=self.stop_requested())
        if not self.stop_requested():
            return
        step = self.version.step
        if step and step not in dict(self.folder.complete_checkpoints()):
            await self.save(wait=True)
        done = f"after step {step}, which is saved" if step else "before the first step"
        raise StoppedOnRequest(f"asked to end: stopped {done}")

    async def update(self, batch: Batch, step: int) -> dict[str, float]:
        """Take one optimizer step on its part of the batch and advance ``version``; one that a verdict does not take is
        passed over.

        Raises JournalError when ``step`` is not the next one.
        """
        if step != self.version.step + 1:
            raise JournalError(
                f"step {self.version.step + 1} is neither in a checkpoint nor in {batch.journal} "
                f"(next there: {step}); restore a checkpoint, or start in another --run-dir"
            )
        if step in self.watch.skipped:
            results = await self.trainers.call("pass_over", step=step)
            self.version = WeightVersion(step, self.journal.attempt)
            return results[0]
        rows = batch.record.rows(step)
        plan = await self.plan([int(batch.record.tokens[row]) for row in rows])
        results = await self.trainers.call(
            "update",
            journal=str(batch.journal),
            record=batch.name,
            step=step,
            plan=[[[rows[i] for i in some] for some in rank] for rank in plan],
            lr=self.recipe.lr_at(step),
            **self.watch.orders(batch, step, self.metrics.has(step)),
        )
        self.version = WeightVersion(step, self.journal.attempt)
        taken = not results[0].get("skipped")
        self.moved |= taken and results[0]["grad_norm"] * self.recipe.lr_at(step) > 0
        return results[0]

    async def conclude(
        self, batch: Batch, step: int, result: dict[str, float], timings: dict[str, float]
    ) -> None:
        """Judge a step by the result of its update, make the verdict durable, do what it says, and report the step.

        Raises GuardStop.
        """
        reported, passed_over = self.metrics.has(step), "passed_over" in result
        if passed_over:
            verdict = self.watch.verdicts.get(step)
            result = dict(verdict.metrics) if verdict else {}
        else:
            # A checkpoint that appeared behind the verdict would change what it means.
            if fires(batch.record, step, result):
                await self.settle_save(wait=True)
            verdict = await asyncio.to_thread(
                self.watch.decide, batch, step, result, reported, self.checkpoint
            )
            if verdict and verdict.action == "roll_back":
                await self._roll_back(verdict)
        if verdict and not reported:  # once, also when a kill came before it was said
            self.watch.say(verdict, batch)
        fired = {"guard/fired": float(len(verdict.findings) if verdict else 0)}
        self.report(batch.record, step, {**result, **fired}, timings)
        if verdict and verdict.action == "stop" and not passed_over:
            raise GuardStop(stop_message(verdict, batch.record))

    async def _roll_back(self, verdict: StepVerdict) -> None:
        """Give the trainer the weights of before, under the number of the step of now. Done again after a kill."""
        step, path = self.checkpoint
        with self.phase(f"roll back to step {step}", {}, ""):
            await self.trainers.call("roll_back", checkpoint=path and str(path), step=verdict.step)
        self.moved = False  # how these weights differ from those published last is not known

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

    async def save(self, wait: bool = False) -> None:
        """Save a checkpoint of the current step, once the save before it is complete. Without ``wait``, and with
        ``run.async_save``, its files are written while the run goes on: it counts from the ``settle_save`` that finds
        it complete."""
        await self.settle_save(wait=True)
        step, self._last_save = self.version.step, time.monotonic()
        wait = wait or not self.config.run.async_save
        path = str(self.folder.checkpoint(step))
        with self.phase(f"save step {step}", {}, ""):
            answers = await self.trainers.call("save", path=path, step=step, wait=wait)
        self._saving = step
        if answers[0]["done"]:
            await self._saved(answers)
        else:
            held = max(answer["held"] for answer in answers)
            log.info("save of step %d begun; it held the trainers for %.3f s", step, held)

    async def settle_save(self, wait: bool = False) -> None:
        """If a save is under way and its files are written, or (``wait``) once they are, complete it: from then on it
        is a checkpoint, and older ones are removed. Raises TrainerError if it could not be written."""
        if self._saving is None:
            return
        if wait:
            with self.phase(f"complete save of step {self._saving}", {}, ""):
                answers = await self.trainers.call("save_done", wait=True)
        else:
            answers = await self.trainers.call("save_done", wait=False)
        if answers[0]["done"]:
            await self._saved(answers)

    async def _saved(self, answers: Sequence[Mapping[str, float]]) -> None:
        step, self._saving = self._saving, None
        seconds = max(answer["seconds"] for answer in answers)
        size = sum(answer["bytes"] for answer in answers)
        log.info("checkpoint of step %s: %d bytes in %.1f s", step, size, seconds)
        self._check_lead({"time/save": seconds})
        await asyncio.to_thread(remove_old, self.folder, self.journal, self.config)

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
        left_out = sum(skipped <= step for skipped in self.watch.skipped)
        metrics = {
            **whole,
            **{key: value for key, value in result.items() if key != "skipped"},
            "guard/skipped_steps": float(left_out),
            "lr": self.recipe.lr_at(step),
            **timings,
            "step": step,
        }
        self.metrics.write(metrics)
        self.watch.past.append(metrics)
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
