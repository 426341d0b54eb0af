"""The attempts of a run and what went wrong in them, on the axis of its steps.

The journal knows the attempts and the step that each began after. The rest is told by whoever knows the folders of the
starts (``cluster/history.py``): this room takes it as plain facts.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agpo_megatron.journal import JournalReader
from agpo_megatron.journal.reader import BATCH, owners, valid_files


@dataclass(frozen=True)
class Event:
    """Something that happened. ``time``: seconds since the epoch. ``step``: the last one begun before, None if unknown.
    ``kind``: "start", "end", "killed", "exited", "hung", "server lost", "server quarantined"."""

    time: float
    step: int | None
    kind: str
    who: str
    what: str


@dataclass(frozen=True)
class Launch:
    """One start of the run, by the supervisor or by Slurm. ``outcome``: "finished", "stopped", "failed", or "" while it
    has not ended. ``seen``: last sign of life, seconds since the epoch. ``controllers``: why each controller of it, of
    an attempt each, began. ``events``: oldest first."""

    label: str
    mode: str
    began: float
    outcome: str
    reason: str
    seen: float
    controllers: list[str]
    events: list[Event]


@dataclass(frozen=True)
class Attempt:
    """One writer of the journal. ``after_step``: the last step committed before it; ``batches``: number that it
    committed and that are still there; ``reason``: why it began, "" where the logs do not say."""

    number: int
    after_step: int
    batches: int
    reason: str


def attempts(reader: JournalReader, launches: Sequence[Launch]) -> list[Attempt]:
    """List the attempts, oldest first. Reasons are those of the launches' controllers, one for each attempt; where
    their numbers differ (a controller died before it was a writer, or logs are gone) none is claimed."""
    numbers = owners(reader.folder)
    valid = valid_files(reader.folder).batches
    reasons = list(itertools.chain.from_iterable(launch.controllers for launch in launches))
    if len(reasons) != len(numbers):
        reasons = [""] * len(numbers)
    found = []
    for number, reason in zip(numbers, reasons, strict=True):
        known = [*valid, *_inherited(reader.folder, number)]
        steps = [last for last, attempt in map(_step_and_attempt, known) if attempt < number]
        mine = sum(attempt == number for _, attempt in map(_step_and_attempt, valid))
        found.append(Attempt(number, max(steps, default=0), mine, reason))
    return found


def _inherited(folder: Path, attempt: int) -> list[str]:
    """Return the names of the batches that an attempt took over, which may be pruned by now."""
    owner = json.loads((folder / f"owner-{attempt:06d}.json").read_text())
    return list(owner.get("batches", []))


def _step_and_attempt(name: str) -> tuple[int, int]:
    match = re.fullmatch(BATCH, name)
    return (int(match[2]), int(match[3])) if match else (0, 0)
