"""Reading a journal: by trainers during a run, by replay and inspection afterwards."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agpo_megatron.files import digest
from agpo_megatron.journal.blocks import Block, JournalError, find_blocks, read_blocks, when_shown
from agpo_megatron.journal.records import (
    BatchRecord,
    JournaledGroup,
    batch_to_sample,
    batches_to_groups,
    decode_fragments,
    decode_record,
    score_sequence,
    train_sequence,
)
from agpo_megatron.journal.verdicts import StepVerdict, decode_verdict
from agpo_megatron.samples import Fragment, Sample, TrainSequence

OWNER = re.compile(r"owner-(\d{6})\.json$")
SEGMENT = re.compile(r"segment-a(\d{6})-(\d{8})-p(\d{9})-(\d{9})-([0-9a-f]{16})\.arrow$")
FRAGMENTS = re.compile(r"fragments-a(\d{6})-(\d{8})-([0-9a-f]{16})\.arrow$")
VERDICT = re.compile(r"verdict-(\d{8})-a(\d{6})-([0-9a-f]{16})\.json$")
BATCH = re.compile(r"batch-(\d{8})-(\d{8})-a(\d{6})-([0-9a-f]{16})\.arrow$")


@dataclass(frozen=True)
class SegmentName:
    """The parsed name of a segment, with prompt positions ``first`` to ``last``."""

    name: str
    first: int
    last: int
    digest: str

    @staticmethod
    def parse(name: str) -> SegmentName:
        match = SEGMENT.fullmatch(name)
        if match is None:
            raise JournalError(f"{name} is not the name of a segment")
        return SegmentName(name, int(match[3]), int(match[4]), match[5])


@dataclass(frozen=True)
class BatchName:
    """The parsed name of a batch file, with its first and last optimizer step."""

    name: str
    first_step: int
    last_step: int
    digest: str

    @staticmethod
    def parse(name: str) -> BatchName:
        match = BATCH.fullmatch(name)
        if match is None:
            raise JournalError(f"{name} is not the name of a batch file")
        return BatchName(name, int(match[1]), int(match[2]), match[4])


def owners(folder: Path) -> list[int]:
    """Return the attempts that have written to this journal, in order."""
    return sorted(int(m[1]) for p in folder.glob("owner-*.json") if (m := OWNER.search(p.name)))


@dataclass(frozen=True)
class ValidFiles:
    """The names of the valid files of a journal, in order.

    Valid = the inventory that the newest attempt took over, plus the files it wrote itself. Files that an older attempt
    wrote after it was superseded are in neither and are ignored.
    """

    segments: list[str]
    batches: list[str]
    fragments: list[str]
    verdicts: list[str] = field(default_factory=list)


def valid_files(folder: Path) -> ValidFiles:
    attempts = owners(folder)
    if not attempts:
        return ValidFiles([], [], [])
    newest = attempts[-1]
    inventory = json.loads((folder / f"owner-{newest:06d}.json").read_text())
    if "fragments" not in inventory:
        raise JournalError(
            f"{folder} was written by an earlier release, which this one cannot read. Finish that run with the release "
            "it began with, or start in another --run-dir."
        )
    found = {kind: set(inventory[kind]) for kind in ("segments", "batches", "fragments")}
    found["verdicts"] = set(inventory.get("verdicts", []))
    for kind, pattern, place, group in (
        ("segments", SEGMENT, "samples", 1),
        ("batches", BATCH, "batches", 3),
        ("fragments", FRAGMENTS, "fragments", 1),
        ("verdicts", VERDICT, "verdicts", 2),
    ):
        for path in (folder / place).glob("*"):
            if (m := pattern.fullmatch(path.name)) and int(m[group]) == newest:
                found[kind].add(path.name)
    return ValidFiles(**{kind: sorted(names) for kind, names in found.items()})


class JournalReader:
    """Reader of one journal folder: it reads the small records of batches whole, samples block by block."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise JournalError(f"{folder} is not a journal. Name the folder of a run that has one.")
        self.folder = folder
        self.read_patience = 5.0  # seconds to wait for a shared file system to show a file

    def batches(self) -> list[BatchName]:
        """Return the committed batches, in order."""
        return [BatchName.parse(name) for name in valid_files(self.folder).batches]

    def segments(self) -> list[SegmentName]:
        """Return the valid segments."""
        return [SegmentName.parse(name) for name in valid_files(self.folder).segments]

    def batch_of(self, step: int) -> BatchName:
        """Return the committed batch of optimizer step ``step``. Raises JournalError when there is none."""
        batches = self.batches()
        for batch in batches:
            if batch.first_step <= step <= batch.last_step:
                return batch
        held = f"{batches[0].first_step} to {batches[-1].last_step}" if batches else "none"
        raise JournalError(f"{self.folder} has no committed batch with step {step} (it has {held})")

    def verdicts(self) -> dict[int, StepVerdict]:
        """Read what the guards have decided, by optimizer step. Raises JournalError."""
        folder, found = self.folder / "verdicts", {}
        for name in valid_files(self.folder).verdicts:
            match = VERDICT.fullmatch(name)
            assert match is not None
            path = folder / name
            found[int(match[1])] = decode_verdict(
                path, read_file(path, match[3], self.read_patience)
            )
        return found

    def fragments(self) -> dict[str, list[Fragment]]:
        """Read the fragments of unfinished groups, by the name of their file. Raises JournalError."""
        folder, found = self.folder / "fragments", {}
        for name in valid_files(self.folder).fragments:
            match = FRAGMENTS.fullmatch(name)
            assert match is not None
            data = read_file(folder / name, match[3], self.read_patience)
            found[name] = decode_fragments(folder / name, data)
        return found

    def record(self, name: str) -> BatchRecord:
        """Read the batch file ``name`` and check it against the digest in its name. Raises JournalError."""
        path, wanted = self.folder / "batches" / name, BatchName.parse(name).digest
        return decode_record(path, read_file(path, wanted, self.read_patience))

    def samples(self, blocks: Sequence[Block]) -> list[Sample]:
        """Read the samples of some blocks, in their order."""
        return [batch_to_sample(b) for b in read_blocks(self._samples, blocks, self.read_patience)]

    def sequences(self, record: BatchRecord, rows: Sequence[int]) -> list[TrainSequence]:
        """Read the sequences of some rows of a batch, in that order, and nothing else."""
        samples = read_blocks(self._samples, [record.samples[r] for r in rows], self.read_patience)
        found = [record.details[r] for r in rows]
        details = read_blocks(
            self.folder / "batches", [block for block in found if block], self.read_patience
        )
        return [
            train_sequence(record, row, sample, next(details) if block else None)
            for row, sample, block in zip(rows, samples, found, strict=True)
        ]

    def score_sequences(self, blocks: Sequence[Block]) -> list[TrainSequence]:
        """Read journaled samples for scoring, before their batch is decided, in their order."""
        return [score_sequence(b) for b in read_blocks(self._samples, blocks, self.read_patience)]

    def groups(self, segment: SegmentName) -> list[JournaledGroup]:
        """Read all groups of a segment, with the blocks of their samples. Raises JournalError for a damaged file."""
        blocks = find_blocks(self._samples, segment.name, segment.digest)
        groups = batches_to_groups(list(read_blocks(self._samples, blocks, self.read_patience)))
        places = iter(blocks)
        return [JournaledGroup(g, [next(places) for _ in g.samples]) for g in groups]

    @property
    def _samples(self) -> Path:
        return self.folder / "samples"


def read_file(path: Path, wanted: str, patience: float = 5.0) -> bytes:
    """Read a whole file. ``wanted``: the SHA-256 it must have, or the beginning of it.

    Waits up to ``patience`` seconds for a shared file system to show the file with that content.
    Raises JournalError when it stays missing or different.
    """

    def read() -> bytes | None:
        data = path.read_bytes() if path.exists() else None
        return data if data is not None and digest(data).startswith(wanted) else None

    return when_shown(read, path, wanted, patience)
