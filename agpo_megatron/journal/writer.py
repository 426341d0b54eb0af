"""Writing a journal: one writer at a time, nothing acknowledged before it is durable.

Folder::

    owner-000002.json            who writes now, and which files of earlier attempts count
    samples/segment-a000002-00000007.arrow
    steps/step-00000012-a000002.arrow
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agpo_megatron.journal.reader import STEP, JournalReader, owners, valid_files
from agpo_megatron.journal.records import (
    JournalError,
    SampleRef,
    StepRecord,
    digest_of,
    encode_table,
    groups_to_table,
    read_file,
    step_to_table,
    table_to_groups,
    write_durably,
)
from agpo_megatron.types import Group


@dataclass(frozen=True)
class JournaledGroup:
    """A group whose samples are durable, and where they lie (one ref per sample)."""

    group: Group
    refs: list[SampleRef]
    digest: str


class Journal:
    """The single writer of a journal folder. Opening it supersedes every earlier attempt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("samples", "steps"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.attempt = self._claim()
        self.reader = JournalReader(folder)
        self._segments_written = 0

    def _claim(self) -> int:
        """Take the next attempt number with an O_EXCL file that lists what is taken over."""
        segments, steps = valid_files(self.folder)
        attempt = max(owners(self.folder), default=0) + 1
        path = self.folder / owner_name(attempt)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        write_durably(temporary, inventory(segments, steps))
        try:
            os.link(temporary, path)
        except FileExistsError as error:
            raise JournalError(
                f"another process has just become the writer of {self.folder}; two runs share one run folder. "
                "Stop one of them or give it another --run-dir."
            ) from error
        finally:
            temporary.unlink()
        return attempt

    def append(self, groups: Sequence[Group]) -> list[JournaledGroup]:
        """Make finished groups durable as one segment; they count only once this has returned."""
        table = groups_to_table(groups)
        data = encode_table(table)
        name = f"segment-a{self.attempt:06d}-{self._segments_written:08d}.arrow"
        write_durably(self.folder / "samples" / name, data)
        self._segments_written += 1
        return locate(table_to_groups(table), name, digest_of(data))

    def commit_step(self, record: StepRecord) -> str:
        """Commit a step; returns its file name. From here on it will be trained, by this attempt or by a later one."""
        data = encode_table(step_to_table(record))
        name = f"step-{record.step:08d}-a{self.attempt:06d}-{digest_of(data)[:16]}.arrow"
        write_durably(self.folder / "steps" / name, data)
        return name

    def last_step(self) -> StepRecord | None:
        """The newest committed step."""
        steps = self.reader.steps()
        return self.reader.record(steps[-1]) if steps else None

    def pending_groups(self) -> dict[int, JournaledGroup]:
        """Groups that are durable but in no committed step, by prompt position (read once, at resume).

        Steps take prompts in order of position, so these are the ones at or behind the last step's cursor.
        """
        segments, _ = valid_files(self.folder)
        last = self.last_step()
        cursor = last.cursor if last else 0
        pending: dict[int, JournaledGroup] = {}
        for name in segments:
            data = read_file(self.folder / "samples" / name)
            table = self.reader.segment(name)
            if max(table.column("position").to_pylist(), default=-1) < cursor:
                continue
            for journaled in locate(table_to_groups(table), name, digest_of(data)):
                if journaled.group.prompt.position >= cursor:
                    pending[journaled.group.prompt.position] = journaled
        return pending

    def prune(self, before_step: int) -> int:
        """Remove steps below ``before_step`` and the segments only they used. Returns the number of files removed.

        Raises JournalError when another attempt has become the writer: the files are its own now.
        """
        if owners(self.folder)[-1] != self.attempt:
            raise JournalError(
                f"{self.folder} has another writer now; this run has been superseded"
            )
        segments, steps = valid_files(self.folder)
        # The newest step stays in any case: its cursor says which groups are pending.
        old = [n for n in steps[:-1] if (m := STEP.fullmatch(n)) and int(m[1]) < before_step]
        kept = [n for n in steps if n not in old]
        needed = {segment for n in kept for segment in self.reader.read_record(n).segments}
        needed |= {j.refs[0].segment for j in self.pending_groups().values()}
        dead = {segment for n in old for segment in self.reader.read_record(n).segments} - needed
        survivors = [n for n in segments if n not in dead]
        write_durably(self.folder / owner_name(self.attempt), inventory(survivors, kept))
        for name in old:
            (self.folder / "steps" / name).unlink()
        for name in dead:
            (self.folder / "samples" / name).unlink()
        return len(old) + len(dead)


def owner_name(attempt: int) -> str:
    return f"owner-{attempt:06d}.json"


def inventory(segments: Sequence[str], steps: Sequence[str]) -> bytes:
    return json.dumps(
        {"segments": list(segments), "steps": list(steps), "pid": os.getpid()}
    ).encode()


def locate(groups: Sequence[Group], segment: str, digest: str) -> list[JournaledGroup]:
    """Row numbers of each group's samples: rows are written group by group, in order."""
    result, row = [], 0
    for group in groups:
        refs = [SampleRef(segment, row + i) for i in range(len(group.samples))]
        result.append(JournaledGroup(group, refs, digest))
        row += len(group.samples)
    return result
