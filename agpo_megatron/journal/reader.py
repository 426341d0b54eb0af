"""Reading a journal: by trainers during a run, by replay and inspection afterwards."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from pathlib import Path

import pyarrow as pa

from agpo_megatron.journal.records import (
    JournalError,
    SampleRef,
    StepRecord,
    decode_table,
    read_file,
    row_to_sample,
    table_to_step,
    to_train_sequence,
)
from agpo_megatron.types import Sample, TrainSequence

OWNER = re.compile(r"owner-(\d{6})\.json$")
SEGMENT = re.compile(r"segment-a(\d{6})-(\d{8})\.arrow$")
STEP = re.compile(r"step-(\d{8})-a(\d{6})-([0-9a-f]{16})\.arrow$")


def owners(folder: Path) -> list[int]:
    """Attempts that have written to this journal, in order."""
    return sorted(int(m[1]) for p in folder.glob("owner-*.json") if (m := OWNER.search(p.name)))


def valid_files(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the segments and of the steps that count.

    Truth = the inventory the newest attempt took over, plus what that attempt wrote itself. What an older attempt
    wrote after it was superseded is in neither and is ignored.
    """
    attempts = owners(folder)
    if not attempts:
        return [], []
    newest = attempts[-1]
    inventory = json.loads((folder / f"owner-{newest:06d}.json").read_text())
    segments, steps = set(inventory["segments"]), set(inventory["steps"])
    for path in (folder / "samples").iterdir():
        if (m := SEGMENT.fullmatch(path.name)) and int(m[1]) == newest:
            segments.add(path.name)
    for path in (folder / "steps").iterdir():
        if (m := STEP.fullmatch(path.name)) and int(m[2]) == newest:
            steps.add(path.name)
    return sorted(segments), sorted(steps)


class JournalReader:
    """Reads segments and steps of one journal folder; keeps the segments used last in memory."""

    def __init__(self, folder: Path, cached_segments: int = 64) -> None:
        if not folder.is_dir():
            raise JournalError(f"{folder} is not a journal. Name the folder of a run that has one.")
        self.folder = folder
        self._cache: OrderedDict[str, pa.Table] = OrderedDict()
        self._cached_segments = cached_segments
        self.read_patience = 5.0  # seconds a shared file system is given to show a file

    def steps(self) -> list[int]:
        """Committed step numbers, ascending."""
        return sorted(self.step_names())

    def step_names(self) -> dict[int, str]:
        """File name of every committed step."""
        return {int(m[1]): n for n in valid_files(self.folder)[1] if (m := STEP.fullmatch(n))}

    def segment(self, name: str, digest: str | None = None) -> pa.Table:
        if name not in self._cache:
            path = self.folder / "samples" / name
            self._cache[name] = decode_table(path, read_file(path, digest, self.read_patience))
            while len(self._cache) > self._cached_segments:
                self._cache.popitem(last=False)
        self._cache.move_to_end(name)
        return self._cache[name]

    def record(self, step: int) -> StepRecord:
        """The committed record of ``step``. Raises JournalError when there is none."""
        name = self.step_names().get(step)
        if name is None:
            raise JournalError(
                f"{self.folder} has no committed step {step} (it has {self.steps()[-3:] or 'none'} last)"
            )
        return self.read_record(name)

    def read_record(self, name: str) -> StepRecord:
        """The step file ``name``, checked against the digest in its name. Raises JournalError."""
        match = STEP.fullmatch(name)
        if match is None:
            raise JournalError(f"{name} is not the name of a step file")
        path = self.folder / "steps" / name
        return table_to_step(decode_table(path, read_file(path, match[3], self.read_patience)))

    def sequences(self, record: StepRecord, rows: list[int] | None = None) -> list[TrainSequence]:
        """The step's sequences (all, or those of the given row numbers), in that order."""
        wanted = range(len(record.rows)) if rows is None else rows
        result = []
        for number in wanted:
            row = record.rows[number]
            sample = self.sample(row.ref, record.segments[row.ref.segment])
            result.append(to_train_sequence(sample, row))
        return result

    def sample(self, ref: SampleRef, digest: str) -> Sample:
        """One sample of the segment that has ``digest``."""
        table = self.segment(ref.segment, digest)
        return row_to_sample(table.slice(ref.row, 1).to_pylist()[0])
