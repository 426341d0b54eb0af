"""The policy as a service: one handler per command, the same on every rank.

A command is executed once: rank 0 remembers the last sequence number it executed. A handler that raises ends the
rank: the others are inside a collective and cannot go on; controller and supervisor report the rank that failed first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from agpo_megatron.algorithm.settings import LossSettings
from agpo_megatron.journal import BatchRecord, Block, JournalReader
from agpo_megatron.journal.records import write_scores
from agpo_megatron.policy import checkpoint as policy_checkpoint
from agpo_megatron.policy.marker import CheckpointDamaged
from agpo_megatron.policy.policy import Policy
from agpo_megatron.policy.saving import PendingSave
from agpo_megatron.samples import TrainSequence
from agpo_megatron.trainer.channel import Channel, Command
from agpo_megatron.trainer.control_group import ControlGroup
from agpo_megatron.trainer.export import export_hf
from agpo_megatron.trainer.publishing import PolicyPublisher
from agpo_megatron.wait import waiting

log = logging.getLogger(__name__)


class TrainerService:
    """Service that executes the controller's commands until ``stop``."""

    def __init__(
        self,
        policy: Policy,
        publisher: PolicyPublisher,
        channel: Channel,
        initial_weights: Path,
        loss: LossSettings,
        save_seconds: float,
    ) -> None:
        """``save_seconds``: for the files of a checkpoint to be written."""
        self._save_seconds = save_seconds
        self._policy, self._channel, self._loss = policy, channel, loss
        self._publisher = publisher
        self._step = 0
        self._pending: PendingSave | None = None
        self._last_update: dict[str, Any] = {}
        self._control = ControlGroup(policy.layout.control_group)
        self._initial_weights = initial_weights
        self._record: tuple[str, BatchRecord] | None = None
        self._handlers: dict[str, Callable[..., dict[str, Any]]] = {
            "load": self.load,
            "update": self.update,
            "score": self.score,
            "score_samples": self.score_samples,
            "pass_over": self.pass_over,
            "roll_back": self.roll_back,
            "save": self.save,
            "save_done": self.save_done,
            "export": self.export,
            "publish_open": publisher.open,
            "publish_send": self.publish_send,
        }

    def run(self) -> None:
        """Fetch a command (rank 0), broadcast, execute, gather and deliver the results; repeat until ``stop``."""
        attempt, last = 0, 0
        while True:
            command = self._next(attempt, last)
            if command is None:
                continue
            if command.name == "stop":
                self._finish_save(command.name)
                if self._control.rank == 0:
                    self._channel.deliver(command, [])
                return
            started = time.monotonic()
            try:
                with waiting(f"{command.name} (command {command.seq})"):
                    result = self._handlers[command.name](**command.args)
            except Exception as error:
                self._channel.report_failure(command.name, f"{type(error).__name__}: {error}")
                raise
            log.info("%s took %.3f s", command.name, time.monotonic() - started)
            results = self._control.gather(result)
            if results is not None:
                self._channel.deliver(command, results)
            attempt, last = command.attempt, command.seq

    def _next(self, attempt: int, last: int) -> Command | None:
        """Poll once on rank 0 and broadcast the command to all ranks; None when there is no new one."""
        message: dict[str, Any] | None = None
        if self._control.rank == 0:
            with waiting("the next command"):
                command = self._channel.next_command(attempt, last)
            message = {"command": vars(command) if command else None}
        with waiting("the next command, from rank 0"):
            handed = self._control.broadcast(message)["command"]
        return Command(**handed) if handed else None

    def load(self, checkpoint: str | None, step: int) -> dict[str, Any]:
        """Load the checkpoint of ``step`` with optimizer and RNG state; None: keep the initial weights of the build.

        A policy already at ``step`` or later (from a former controller) stays as it is: each of its updates was on a
        committed record, so replaying those would give the same state. A damaged checkpoint leaves it as it is too:
        every rank then answers ``damaged``, what is wrong with it.
        """
        self._finish_save("load")
        damaged = ""
        if checkpoint is not None and self._step < step:
            try:
                self._step, _ = policy_checkpoint.load(Path(checkpoint), self._policy)
            except CheckpointDamaged as error:  # on all ranks, before anything was loaded
                damaged = str(error)
        return {
            "step": self._step,
            "damaged": damaged,
            "backend": self._policy.backend.dist_backend,
            "last_update": self._last_update,
        }

    def update(
        self,
        journal: str,
        record: str,
        step: int,
        plan: list[list[list[int]]],
        lr: float,
        limited: bool = False,
        hold: bool = False,
    ) -> dict[str, Any]:
        """Take one optimizer step on its part of the committed batch ``record``; ``plan[dp_rank][micro_batch]``: rows.
        ``limited``: not if it breaks a limit of the record; ``hold``: compute everything, but do not step.

        Raises ValueError when the policy is not at the step before.
        """
        self._follows(step)
        reader = JournalReader(Path(journal))
        if self._record is None or self._record[0] != record:
            self._record = record, reader.record(record)
        batch = self._record[1]
        mine = plan[self._policy.layout.dp_rank]
        sequences = iter(reader.sequences(batch, [row for rows in mine for row in rows]))
        loss = self._loss.with_entropy(batch.entropy_coef).with_gate_level(
            batch.gate_levels, step - batch.first_step
        )
        metrics: dict[str, Any] = self._policy.update(
            [[next(sequences) for _ in rows] for rows in mine],
            loss=loss,
            lr=lr,
            limits=batch.limits if limited else (),
            hold=hold,
        )
        self._step, self._last_update = step, metrics
        return metrics

    def _follows(self, step: int) -> None:
        if step != self._step + 1:
            raise ValueError(
                f"step {step} was asked for, the weights are those of step {self._step}"
            )

    def pass_over(self, step: int) -> dict[str, Any]:
        """Count a step that a verdict does not take; nothing is computed. Raises ValueError like ``update``."""
        self._follows(step)
        self._step, self._last_update = step, {"passed_over": 1.0}
        return self._last_update

    def roll_back(self, checkpoint: str | None, step: int) -> dict[str, Any]:
        """Take weights, optimizer and random state of ``checkpoint`` (None: the initial weights), as those of the later
        ``step``."""
        self._finish_save("roll_back")
        if checkpoint is None:
            self._policy.load_initial(self._initial_weights)
        else:
            policy_checkpoint.load(Path(checkpoint), self._policy)
        self._step = step
        return {}

    def score_samples(
        self,
        journal: str,
        samples: list[list[Any]],
        plan: list[list[list[int]]],
        weights: str,
        path: str,
    ) -> dict[str, Any]:
        """Score journaled samples, [file, offset, length, digest] each, under the current (``policy``) or the
        ``reference`` weights; rank 0 writes the log-probs to ``path`` and returns mean entropy and file digest."""
        mine = plan[self._policy.layout.dp_rank]
        blocks = [Block(*samples[row]) for rows in mine for row in rows]
        sequences = iter(JournalReader(Path(journal)).score_sequences(blocks))
        batches = [[next(sequences) for _ in rows] for rows in mine]
        other = self._policy.reference_weights() if weights == "reference" else nullcontext()
        with other:
            scores = self._policy.score(batches, every_token=False)
        if self._control.rank != 0:
            return {}
        logprobs = {name: score.logprobs for name, score in scores.items()}
        broken = [name for name, values in logprobs.items() if not np.isfinite(values).all()]
        if broken:
            raise FloatingPointError(
                f"log-probs of {len(broken)} sample(s) under the {weights} weights are not finite, {broken[0]} among "
                "them; these weights, or the trainer's precision, are broken: resume from an earlier checkpoint"
            )
        tokens = sum(len(score.logprobs) for score in scores.values())
        total = sum(score.entropy * len(score.logprobs) for score in scores.values())
        return {
            "entropy": total / max(tokens, 1),
            "digest": write_scores(Path(path), logprobs),
        }

    def score(self, tokens: list[int], temperature: float) -> dict[str, Any]:
        """Return the log-prob of every token of one sequence given those before it (entry 0 is 0)."""
        sequence = TrainSequence(
            "probe",
            np.zeros(0, np.int32),
            np.asarray(tokens, np.int32),
            np.ones(len(tokens), np.uint8),
        )
        batches = [[sequence]] if self._policy.layout.dp_rank == 0 else []
        scores = self._policy.score(batches, temperature=temperature)
        logprobs = scores["probe"].logprobs.tolist() if "probe" in scores else None
        return {"step": self._step, "logprobs": logprobs}

    def publish_send(self, **request: Any) -> dict[str, Any]:
        return self._publisher.send(**request, held=self._step)

    def save(self, path: str, step: int, wait: bool) -> dict[str, Any]:
        """Begin to save a checkpoint, after the one before it is complete; with ``wait``, also finish it.

        It is complete and durable, and counts, only when acknowledged as ``done``.
        """
        self._finish_save("save")
        started = time.monotonic()
        self._pending = policy_checkpoint.begin_save(
            Path(path), self._policy, step, {}, copy=not wait
        )
        held = time.monotonic() - started
        return self.save_done(wait=True) if wait else {"done": False, "held": held}

    def save_done(self, wait: bool) -> dict[str, Any]:
        """Complete the save under way if every rank has written its files, or (``wait``) when they have.

        ``done``: no save is under way any more; ``seconds``: what that of this rank took, ``bytes`` of its files.
        Raises CheckpointError when a rank could not write.
        """
        pending = self._pending
        if pending is None:
            return {"done": True, "seconds": 0.0, "bytes": 0}
        if not wait and not pending.done():
            return {"done": False}
        self._pending = None
        pending.finish(self._save_seconds)
        return {"done": True, "seconds": pending.seconds, "bytes": pending.bytes}

    def _finish_save(self, before: str) -> None:
        if self._pending is not None:
            with waiting(f"the save under way, before {before}"):
                self.save_done(wait=True)

    def export(self, path: str) -> dict[str, Any]:
        """Export the policy as a Hugging Face checkpoint, with the tokenizer of the initial weights."""
        export_hf(self._policy, Path(path), self._initial_weights)
        return {}
