"""Writing a journal: one writer at a time, and nothing is acknowledged before it is durable.

Folder::

    owner-000002.json                     current writer, and the valid files of earlier attempts
    fragments/fragments-a000002-00000003-DIGEST.arrow     attempt, number; gone once their groups are in segments
    samples/segment-a000002-00000007-p000000112-000000115-DIGEST.arrow      attempt, number, prompt positions
    batches/details-00000012-a000002-DIGEST.arrow                           first step, attempt
    batches/batch-00000012-00000015-a000002-DIGEST.arrow                    first and last step, attempt
    verdicts/verdict-00000012-a000002-DIGEST.json                           step, attempt
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from agpo_megatron.files import digest, write_durably
from agpo_megatron.journal.blocks import DIGEST, JournalError, write_blocks
from agpo_megatron.journal.reader import (
    FRAGMENTS,
    BatchName,
    JournalReader,
    ValidFiles,
    owners,
    valid_files,
)
from agpo_megatron.journal.records import (
    DETAILS_SCHEMA,
    SEGMENT_SCHEMA,
    BatchRecord,
    JournaledGroup,
    details_batch,
    encode_fragments,
    encode_record,
    sample_batches,
)
from agpo_megatron.journal.verdicts import StepVerdict, encode_verdict
from agpo_megatron.samples import Fragment, Group, columns


class Journal:
    """The single writer of a journal folder. Opening it supersedes every earlier attempt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("samples", "batches", "fragments", "verdicts"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.attempt = self._claim()
        self.reader = JournalReader(folder)
        self._segments_written = 0
        self._fragments_written = 0
        self._unfinished: dict[str, set[int]] = {}  # positions that a file of fragments is kept for

    def _claim(self) -> int:
        """Claim the next attempt number with an exclusive file that lists the files taken over."""
        valid = valid_files(self.folder)
        self._inherited, self._verdicts = valid.fragments, valid.verdicts
        attempt = max(owners(self.folder), default=0) + 1
        path = self.folder / owner_name(attempt)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        write_durably(temporary, inventory(valid))
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
        """Write finished groups durably as one segment; they are valid only once this has returned. The returned groups
        have no texts: from here on the journal alone keeps them."""
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
                (batch for group in groups for batch in sample_batches(group)),
            )
        )
        self._segments_written += 1
        self._drop_fragments(set(positions))
        return [
            JournaledGroup(without_texts(group), [next(blocks) for _ in group.samples])
            for group in groups
        ]

    def append_fragments(self, fragments: Sequence[Fragment]) -> None:
        """Write fragments of unfinished groups durably, as one file; it goes when their groups are appended."""
        data = encode_fragments(fragments)
        number = self._fragments_written
        name = f"fragments-a{self.attempt:06d}-{number:08d}-{digest(data)[:DIGEST]}.arrow"
        write_durably(self.folder / "fragments" / name, data)
        self._fragments_written += 1
        self._unfinished[name] = {fragment.position for fragment in fragments}

    def pending_fragments(self, finished: Collection[int]) -> dict[int, list[Fragment]]:
        """Return the durable fragments of unfinished groups by prompt position (used once, on resume). ``finished``:
        the positions that need none, because their group is pending.

        What is still needed becomes a file of this attempt, so that those of earlier ones can go: a file that a shared
        file system shows late can then never be taken for a part of what was generated in its place.

        Raises JournalError when a file is damaged or missing, or another attempt has become the writer.
        """
        last = self.last()
        cursor = last.cursor if last else 0
        found: dict[int, list[Fragment]] = {}
        for fragments in self.reader.fragments().values():
            for fragment in fragments:
                if fragment.position >= cursor and fragment.position not in finished:
                    found.setdefault(fragment.position, []).append(fragment)
        if found:
            self.append_fragments([fragment for some in found.values() for fragment in some])
        valid = valid_files(self.folder)
        self._require_writer()
        self._inherited = []
        self._write_inventory(valid.segments, valid.batches)
        for path in (self.folder / "fragments").iterdir():
            if (m := FRAGMENTS.fullmatch(path.name)) and int(m[1]) < self.attempt:
                path.unlink(missing_ok=True)
        return found

    def _drop_fragments(self, finished: Collection[int]) -> None:
        """Remove the files of fragments whose groups are all durable; not when another attempt has taken them over."""
        if self._superseded:
            return
        for name, positions in list(self._unfinished.items()):
            positions.difference_update(finished)
            if not positions:
                (self.folder / "fragments" / name).unlink(missing_ok=True)
                del self._unfinished[name]

    def commit(
        self, record: BatchRecord, decided: Mapping[str, Sequence[Any]]
    ) -> tuple[BatchRecord, str]:
        """Commit a batch; return the record with the blocks of its details, and its file name. This attempt or a
        later one will train on it.

        ``decided``: per-token columns of source "step", by name, one array (or None) per sample.
        """
        record = replace(record, details=self._write_details(record, decided))
        data = encode_record(record)
        steps = record.steps
        name = f"batch-{steps[0]:08d}-{steps[-1]:08d}-a{self.attempt:06d}-{digest(data)[:DIGEST]}.arrow"
        write_durably(self.folder / "batches" / name, data)
        return record, name

    def add_verdict(self, verdict: StepVerdict) -> None:
        """Write durably what the guards have decided about a step. Raises WriteError."""
        data = encode_verdict(verdict)
        name = f"verdict-{verdict.step:08d}-a{self.attempt:06d}-{digest(data)[:DIGEST]}.json"
        write_durably(self.folder / "verdicts" / name, data)

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
        """Return the newest committed batch, or None."""
        batches = self.reader.batches()
        return self.reader.record(batches[-1].name) if batches else None

    def pending_groups(self) -> dict[int, JournaledGroup]:
        """Return the durable groups that are in no committed batch, by prompt position (used once, on resume).

        Batches take prompts in order of position, so these are the groups at or after the cursor of the last batch.
        """
        last = self.last()
        cursor = last.cursor if last else 0
        return {
            journaled.group.prompt.position: replace(
                journaled, group=without_texts(journaled.group)
            )
            for segment in self.reader.segments()
            if segment.last >= cursor
            for journaled in self.reader.groups(segment)
            if journaled.group.prompt.position >= cursor
        }

    def prune(self, before_step: int) -> int:
        """Remove batches whose steps are all below ``before_step`` and the segments only they used; return the number
        of batches and segments removed.

        Raises JournalError when another attempt has become the writer: the files belong to it now.
        """
        self._require_writer()
        batches = self.reader.batches()
        # The newest batch always stays: its cursor determines the pending groups.
        old = [b for b in batches[:-1] if b.last_step < before_step]
        if not old:
            return 0
        # Groups before the cursor of the last removed batch were used or discarded by removed batches.
        cursor = self.reader.record(old[-1].name).cursor
        segments = self.reader.segments()
        dead = {s for s in segments if s.last < cursor}
        self._write_inventory(
            [s.name for s in segments if s not in dead],
            [b.name for b in batches if b not in old],
        )
        self._remove_batches(old)
        for segment in dead:
            (self.folder / "samples" / segment.name).unlink()
        return len(old) + len(dead)

    @property
    def _superseded(self) -> bool:
        return owners(self.folder)[-1] != self.attempt

    def _require_writer(self) -> None:
        if self._superseded:
            raise JournalError(
                f"{self.folder} has another writer now; this run has been superseded"
            )

    def _write_inventory(self, segments: list[str], batches: list[str]) -> None:
        kept = ValidFiles(segments, batches, self._inherited, self._verdicts)
        write_durably(self.folder / owner_name(self.attempt), inventory(kept))

    def _remove_batches(self, old: Sequence[BatchName]) -> None:
        folder, steps = self.folder / "batches", {batch.first_step for batch in old}
        for details in list(folder.glob("details-*.arrow")):
            if int(details.name.split("-")[1]) in steps:
                details.unlink()
        for batch in old:
            (folder / batch.name).unlink()


def without_texts(group: Group) -> Group:
    """The group as the controller holds it: a text takes as much memory as the tokens that it was made of."""
    return Group(group.prompt, [replace(sample, text="") for sample in group.samples])


def owner_name(attempt: int) -> str:
    return f"owner-{attempt:06d}.json"


def inventory(valid: ValidFiles) -> bytes:
    return json.dumps({**asdict(valid), "pid": os.getpid()}).encode()
