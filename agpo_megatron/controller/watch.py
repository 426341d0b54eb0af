"""Guards of one start: what they know of the steps before, their verdicts, and the files of these."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from agpo_megatron.algorithm.limits import Limit
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.config.schema import Config
from agpo_megatron.controller import guards
from agpo_megatron.controller.batch import Batch
from agpo_megatron.controller.guard_dump import replay_command, write_dump
from agpo_megatron.journal import BatchRecord, Journal, JournalReader, StepVerdict
from agpo_megatron.journal.verdicts import skipped_steps

log = logging.getLogger(__name__)


class GuardStop(RuntimeError):
    """Raised when a guard has ended the run; the message names step, numbers, samples, and the keys that decided it."""


def stop_message(verdict: StepVerdict, record: BatchRecord) -> str:
    return (
        f"{guards.described(verdict, record)}. The same command stops here again; to go on without the step, change "
        f"{guards.keys_of(verdict)} in the configuration"
    )


class Watch:
    """``past``: the metrics of every step so far. ``verdicts``: by step, of this run and of the journal that it trains
    on."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        journal: Journal,
        past: Sequence[guards.StepMetrics],
    ) -> None:
        self.config, self.folder, self.journal = config, folder, journal
        self.past = list(past)
        self.verdicts: dict[int, StepVerdict] = {}

    def read(self, recorded: JournalReader | None) -> None:
        """Read the verdicts of earlier starts, and of ``recorded``, the journal to train on if it is not this run's.

        Raises GuardStop if one of them has stopped this run and the settings that decided it are those of now, unless
        others have let it go on since.
        """
        own = self.journal.reader.verdicts()
        self.verdicts = {**(recorded.verdicts() if recorded else {}), **own}
        last = own[max(own)] if own else None
        overruled = last and any(row["step"] > last.last for row in self.past)
        if last and last.action == "stop" and last.settings == self._settings and not overruled:
            reader = recorded or self.journal.reader
            raise GuardStop(stop_message(last, reader.record(reader.batch_of(last.step).name)))

    @property
    def _settings(self) -> dict[str, Any]:
        """Settings that verdicts depend on."""
        own = self.config.guards.model_dump()
        return {**own, "reward.max_error_frac": self.config.reward.max_error_frac}

    @property
    def skipped(self) -> set[int]:
        """Steps that are not taken."""
        return skipped_steps(self.verdicts.values())

    def firings(self, step: int) -> list[int]:
        """Return the steps before ``step`` in which a guard fired, as far as they count."""
        return guards.firings(self.verdicts.values(), step)

    def limits(self, step: int, *, rewarded: bool) -> list[Limit]:
        """Return the limits of a batch that begins with ``step``."""
        train = self.config.train
        back = [v.last for v in self.verdicts.values() if v.action == "roll_back" and v.step < step]
        # The surplus of dynamic sampling was begun a batch earlier.
        resamples = self.config.algorithm.advantage.zero_variance == "resample"
        ahead = (train.max_staleness + resamples) * train.updates_per_batch
        old = max(back) + ahead if back else 0
        return guards.limits(
            self.config.guards,
            self.config.reward.max_error_frac,
            self.past,
            rewarded=rewarded,
            rolled_back=old,
            quiet=step <= old,
        )

    def orders(self, batch: Batch, step: int, reported: bool) -> dict[str, bool]:
        """Tell the trainer whether limits hold the step, and whether it is held whatever comes out."""
        record, settled = batch.record, self._settled(batch, step, reported)
        action = guards.action_of(self.config.guards.actions, self._earlier(record, step), False)
        holds = action != "warn" and not settled
        return {"limited": holds, "hold": holds and bool(guards.broken_before(record, step))}

    def decide(
        self,
        batch: Batch,
        step: int,
        result: guards.StepMetrics,
        reported: bool,
        checkpoint: tuple[int, Path | None],
    ) -> StepVerdict | None:
        """Return the verdict on a step whose update gave ``result``; None if no guard fires. A new one is durable, with
        its dump."""
        if step in self.verdicts:
            return self.verdicts[step]
        record = batch.record
        verdict = guards.judge(
            self.config.guards.actions,
            record,
            step,
            result,
            earlier=self._earlier(record, step),
            checkpoint=checkpoint[0],
            settled=self._settled(batch, step, reported),
        )
        if verdict is None:
            return None
        samples = JournalReader(batch.journal).samples(record.samples)
        findings = [
            replace(f, samples=guards.worst(f.guard, record, step, samples))
            for f in verdict.findings
        ]
        verdict = replace(verdict, findings=findings, settings=self._settings)
        replayable = "reward/mean" in record.metrics and batch.journal == self.folder.journal
        if verdict.action != "warn" and replayable:  # a cold start cannot be replayed
            write_dump(self.folder, self.config, verdict, checkpoint)
        self.journal.add_verdict(verdict)
        self.verdicts[step] = verdict
        return verdict

    def say(self, verdict: StepVerdict, batch: Batch) -> None:
        """Name a verdict in the log and on the terminal."""
        text = f"{guards.described(verdict, batch.record)}; file {batch.name}"
        if (dump := self.folder.dump(verdict.step)).exists():
            text += f". To meet it again: {replay_command(dump)}"
        log.warning("%s", text)
        sys.stderr.write(f"warning: {text}\n")

    def _settled(self, batch: Batch, step: int, reported: bool) -> bool:
        """Return whether the step was decided by an earlier start, or by the replayed run: no limit counts then,
        lest a number that comes out otherwise on this machine decide otherwise."""
        return batch.settled or reported or step in self.verdicts

    def _earlier(self, record: BatchRecord, step: int) -> int:
        """Return the number of firings before ``step`` that count: those before the batch are committed with it."""
        mine = [v for v in self.verdicts.values() if v.step in record.steps and v.step < step]
        known = [f for f in record.fired if step - guards.WINDOW < f]
        stopped = any(v.action == "stop" for v in mine)
        return (0 if stopped else len(known)) + len(guards.firings(mine, step))
