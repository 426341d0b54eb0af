"""Writing a journal: one writer at a time, nothing acknowledged before it is durable.

Folder::

    owner-000002.json                     who writes now, and which files of earlier attempts count
    samples/segment-a000002-00000007-p000000112-000000115-DIGEST.arrow      attempt, number, prompt positions
    batches/details-00000012-a000002-DIGEST.arrow                           first step, attempt
    batches/batch-00000012-00000015-a000002-DIGEST.arrow                    first and last step, attempt
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from agpo_megatron.files import digest, write_durably
from agpo_megatron.journal.blocks import DIGEST, JournalError, write_blocks
from agpo_megatron.journal.reader import BatchName, JournalReader, owners, valid_files
from agpo_megatron.journal.records import (
    DETAILS_SCHEMA,
    SEGMENT_SCHEMA,
    BatchRecord,
    JournaledGroup,
    details_batch,
    encode_record,
    sample_batch,
)
from agpo_megatron.samples import Group, columns


class Journal:
    """The single writer of a journal folder. Opening it supersedes every earlier attempt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("samples", "batches"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.attempt = self._claim()
        self.reader = JournalReader(folder)
        self._segments_written = 0

    def _claim(self) -> int:
        """Take the next attempt number with an O_EXCL file that lists what is taken over."""
        segments, batches = valid_files(self.folder)
        attempt = max(owners(self.folder), default=0) + 1
        path = self.folder / owner_name(attempt)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        write_durably(temporary, inventory(segments, batches))
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
        positions = [group.prompt.position for group in groups]
        stem = (
            f"segment-a{self.attempt:06d}-{self._segments_written:08d}"
            f"-p{min(positions):09d}-{max(positions):09d}"
        )
        blocks = iter(
            write_blocks(
                self.folder / "samples",
                lambda whole: f"{stem}-{whole}.arrow",
                SEGMENT_SCHEMA,
                (sample_batch(group, sample) for group in groups for sample in group.samples),
            )
        )
        self._segments_written += 1
        return [JournaledGroup(group, [next(blocks) for _ in group.samples]) for group in groups]

    def commit(
        self, record: BatchRecord, decided: Mapping[str, Sequence[Any]]
    ) -> tuple[BatchRecord, str]:
        """Commit a batch; the record with the places of its details, and its file's name. From here on it will be
        trained, by this attempt or by a later one.

        ``decided``: per-token columns of source "step", by name one array (or None) per sample.
        """
        record = replace(record, details=self._write_details(record, decided))
        data = encode_record(record)
        steps = record.steps
        name = f"batch-{steps[0]:08d}-{steps[-1]:08d}-a{self.attempt:06d}-{digest(data)[:DIGEST]}.arrow"
        write_durably(self.folder / "batches" / name, data)
        return record, name

    def _write_details(
        self, record: BatchRecord, decided: Mapping[str, Sequence[Any]]
    ) -> list[Any]:
        per_token = {c.name: decided[c.name] for c in columns("token", "step") if c.name in decided}
        known = [
            any(values[i] is not None for values in per_token.values())
            for i in range(len(record.sample_ids))
        ]
        if not any(known):
            return [None] * len(known)

        def batches() -> Iterator[pa.RecordBatch]:
            for i, sample_id in enumerate(record.sample_ids):
                if known[i]:
                    yield details_batch(sample_id, {n: v[i] for n, v in per_token.items()})

        stem = f"details-{record.first_step:08d}-a{self.attempt:06d}"
        folder = self.folder / "batches"
        blocks = iter(
            write_blocks(folder, lambda whole: f"{stem}-{whole}.arrow", DETAILS_SCHEMA, batches())
        )
        return [next(blocks) if k else None for k in known]

    def last(self) -> BatchRecord | None:
        """The newest committed batch."""
        batches = self.reader.batches()
        return self.reader.record(batches[-1].name) if batches else None

    def pending_groups(self) -> dict[int, JournaledGroup]:
        """Groups that are durable but in no committed batch, by prompt position (read once, at resume).

        Batches take prompts in order of position, so these are the ones at or behind the last batch's cursor.
        """
        last = self.last()
        cursor = last.cursor if last else 0
        return {
            journaled.group.prompt.position: journaled
            for segment in self.reader.segments()
            if segment.last >= cursor
            for journaled in self.reader.groups(segment)
            if journaled.group.prompt.position >= cursor
        }

    def prune(self, before_step: int) -> int:
        """Remove batches whose steps are all below ``before_step`` and the segments only they used. Returns the number
        of batches and segments removed.

        Raises JournalError when another attempt has become the writer: the files are its own now.
        """
        if owners(self.folder)[-1] != self.attempt:
            raise JournalError(
                f"{self.folder} has another writer now; this run has been superseded"
            )
        batches = self.reader.batches()
        # The newest batch stays in any case: its cursor says which groups are pending.
        old = [b for b in batches[:-1] if b.last_step < before_step]
        if not old:
            return 0
        # What lies before the cursor of the last of them was used, or replaced, by them.
        cursor = self.reader.record(old[-1].name).cursor
        segments = self.reader.segments()
        dead = [s for s in segments if s.last < cursor]
        write_durably(
            self.folder / owner_name(self.attempt),
            inventory(
                [s.name for s in segments if s not in dead],
                [b.name for b in batches if b not in old],
            ),
        )
        for batch in old:
            self._remove_batch(batch)
        for segment in dead:
            (self.folder / "samples" / segment.name).unlink()
        return len(old) + len(dead)

    def _remove_batch(self, batch: BatchName) -> None:
        folder = self.folder / "batches"
        for details in folder.glob(f"details-{batch.first_step:08d}-*.arrow"):
            details.unlink()
        (folder / batch.name).unlink()


def owner_name(attempt: int) -> str:
    return f"owner-{attempt:06d}.json"


def inventory(segments: Sequence[str], batches: Sequence[str]) -> bytes:
    return json.dumps(
        {"segments": list(segments), "batches": list(batches), "pid": os.getpid()}
    ).encode()
