"""The journal: durable, immutable, one writer, exact round trip."""

from __future__ import annotations

import os
import subprocess
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import made
import numpy as np
import pyarrow as pa
import pytest

from agpo_megatron.files import WriteError
from agpo_megatron.journal import (
    BatchRecord,
    Journal,
    JournaledGroup,
    JournalError,
    JournalReader,
    records,
    writer,
)
from agpo_megatron.journal.reader import SegmentName
from agpo_megatron.journal.records import sequence_columns
from agpo_megatron.samples import Group, VersionSpan


def make_group(position: int, size: int = 3) -> Group:
    prompt = made.prompt(position, [1, 2, 3 + position], str(position))
    samples = [
        made.sample(
            prompt,
            i,
            2 + i,
            response_tokens=np.arange(10, 12 + i, dtype=np.int32),
            rollout_logprobs=np.arange(-1, -3 - i, -1, dtype=np.float32) / 2,
            versions=(VersionSpan("0.1.abc", 0, 2 + i),),
            text=f"answer {i}",
            raw_reward=i / 3,
            correct=bool(i % 2),
            reward_parts={"near": 0.5},
        )
        for i in range(size)
    ]
    return Group(prompt, samples)


def make_batch(
    first_step: int, journaled: list[JournaledGroup], version: str = "0.1.abc", updates: int = 1
) -> tuple[BatchRecord, dict[str, list[Any]]]:
    """A batch and its per-token decisions: the first token of each response has correction 0; of the first sample
    nothing is known."""
    samples = [s for j in journaled for s in j.group.samples]
    decided = {
        "loss_weight": [0.25] * len(samples),
        "advantage": [0.5] * len(samples),
        "trained": [len(s.response_tokens) for s in samples],
        "update": [i * updates // len(samples) for i in range(len(samples))],
    }
    record = BatchRecord(
        first_step=first_step,
        updates=updates,
        attempt=0,
        cursor=1 + max(j.group.prompt.position for j in journaled),
        weight_version=version,
        sample_ids=[s.sample_id for s in samples],
        tokens=np.array([s.length for s in samples], np.int32),
        samples=[block for j in journaled for block in j.blocks],
        details=[],
        columns=sequence_columns(decided, len(samples)),
        metrics={"reward/mean": 0.5},
        entropy_coef=0.25,
        entropy_state=0.125,
        gate_levels=[0.5] * updates,
        gate_state=[2.0, -0.25, 0.75],
    )
    counts = [len(s.response_tokens) for s in samples]
    factors = [np.array([0.0] + [0.5] * (n - 1), np.float32) for n in counts]
    refs = [np.full(n, -1.5, np.float32) for n in counts]
    olds = [np.full(n, -1.25, np.float32) for n in counts]
    return record, {
        "correction": [None, *factors[1:]],
        "ref_logprobs": [None, *refs[1:]],
        "old_logprobs": [None, *olds[1:]],
    }


def commit(journal: Journal, *args: Any, **more: Any) -> str:
    return journal.commit(*make_batch(*args, **more))[1]


def content(value: Any) -> Any:
    """What a noun holds, arrays as lists with their type: equal content, equal value."""
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.tolist()
    if is_dataclass(value):
        return {f.name: content(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {name: content(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [content(part) for part in value]
    return value


def pending(journal: Journal) -> dict[int, Any]:
    return {p: content(j) for p, j in journal.pending_groups().items()}


def steps(reader: JournalReader) -> list[int]:
    """First steps of the committed batches."""
    return [batch.first_step for batch in reader.batches()]


def test_round_trip_of_groups_and_batches(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    groups = [make_group(0), make_group(1)]
    journaled = journal.append(groups)
    assert {s.text for j in journaled for s in j.group.samples} == {""}, "the journal has them"
    record, name = journal.commit(*make_batch(5, journaled, updates=2))
    reader = JournalReader(tmp_path)
    assert [(b.name, b.first_step, b.last_step) for b in reader.batches()] == [(name, 5, 6)]
    assert reader.batch_of(6).name == name
    found = reader.record(name)
    assert content(found) == content(record)
    assert found.steps == range(5, 7)
    assert (found.rows(5), found.rows(6)) == ([0, 1, 2], [3, 4, 5])
    samples = reader.samples(found.samples)
    whole = [s for group in groups for s in group.samples]
    assert content(samples) == content(whole) and samples[4].sample_id == "g000000001.1"
    later, first = reader.sequences(found, [4, 0])
    assert [later.sample_id, first.sample_id] == ["g000000001.1", "g000000000.0"]
    assert later.tokens.tolist() == [1, 2, 4, 10, 11, 12]
    assert later.scalar("loss_weight") == 0.25 and later.scalar("advantage") == 0.5
    assert later.trained().tolist() == [1, 2], "a token of correction 0 does not train"
    assert later.columns["correction"].tolist() == [0.0, 0.5, 0.5]
    assert later.columns["ref_logprobs"].tolist() == [-1.5] * 3
    assert later.columns["old_logprobs"].tolist() == [-1.25] * 3, "the ratio starts from them"
    assert later.columns["rollout_logprobs"].tolist() == [-0.5, -1.0, -1.5]
    assert first.trained().tolist() == [0, 1] and "old_logprobs" not in first.columns


def test_a_reader_takes_the_bytes_of_its_own_samples_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path)
    record, _ = journal.commit(*make_batch(1, journal.append([make_group(p) for p in range(20)])))
    read: list[tuple[int, int]] = []
    plain = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: read.append((at, n)) or plain(fd, n, at))
    JournalReader(tmp_path).sequences(record, [7, 31])
    blocks = [record.samples[7], record.samples[31], record.details[7], record.details[31]]
    wanted = {(b.offset, b.length) for b in blocks if b}
    assert wanted <= set(read)
    schemas = [(at, n) for at, n in read if (at, n) not in wanted]
    assert len(schemas) == 2 and {at for at, _ in schemas} == {8}


def test_files_are_plain_arrow_files(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    name = commit(journal, 1, journal.append([make_group(0), make_group(1)]))
    (segment,) = (tmp_path / "samples").iterdir()
    table = pa.ipc.open_file(segment).read_all()
    assert table.column("text").to_pylist() == ["answer 0", "answer 1", "answer 2"] * 2
    assert table.column("response_tokens")[1].as_py() == [10, 11, 12]
    batch = pa.ipc.open_file(tmp_path / "batches" / name).read_all()
    assert batch.column("advantage").to_pylist() == [0.5] * 6


def test_finished_groups_survive_the_writer_and_are_pending(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    a, b = first.append([make_group(0), make_group(1)])
    (c,) = first.append([make_group(2)])
    commit(first, 1, [a])
    second = Journal(tmp_path)
    assert second.attempt == first.attempt + 1
    assert pending(second) == {1: content(b), 2: content(c)}


def test_what_a_superseded_writer_still_writes_is_ignored(tmp_path: Path) -> None:
    old = Journal(tmp_path)
    (kept,) = old.append([make_group(0)])
    new = Journal(tmp_path)
    late = old.append([make_group(1)])
    commit(old, 1, late)
    assert pending(new) == {0: content(kept)}
    assert steps(JournalReader(tmp_path)) == []
    third = Journal(tmp_path)
    assert pending(third) == {0: content(kept)} and steps(third.reader) == []


def test_the_same_step_of_a_later_attempt_does_not_collide(tmp_path: Path) -> None:
    old = Journal(tmp_path)
    groups = old.append([make_group(0)])
    new = Journal(tmp_path)
    commit(new, 1, new.append([make_group(0, size=2)]), "new")
    commit(old, 1, groups, "old")
    (batch,) = JournalReader(tmp_path).batches()
    assert JournalReader(tmp_path).record(batch.name).weight_version == "new"


def test_a_half_written_file_is_not_a_step(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    name = f".batch-00000001-00000001-a{journal.attempt:06d}-0123456789abcdef.arrow.99.tmp"
    (tmp_path / "batches" / name).write_bytes(b"half")
    assert steps(Journal(tmp_path).reader) == []


def test_damage_is_refused_with_the_file_name(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journaled = journal.append([make_group(0)])
    record, name = journal.commit(*make_batch(1, journaled))
    batch = tmp_path / "batches" / name
    (details,) = (tmp_path / "batches").glob("details-*")
    segment = tmp_path / "samples" / record.samples[1].file
    block = record.samples[1]
    for path, place in ((segment, block), (details, record.details[1]), (batch, None)):
        whole = path.read_bytes()
        for damage in (flip_a_bit(whole, place.offset + place.length // 2 if place else 99), None):
            reader = JournalReader(tmp_path)
            reader.read_patience = 0.0
            if damage is None:
                path.unlink()
            else:
                path.write_bytes(damage)
            with pytest.raises(JournalError, match=path.name):
                reader.sequences(record, [1]) if place else reader.record(name)
            if path is segment:
                assert damage is None or reader.sequences(record, [0]), "others are whole"
                with pytest.raises(JournalError, match=path.name):
                    reader.groups(SegmentName.parse(path.name))
        path.write_bytes(whole)


def flip_a_bit(data: bytes, at: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


def test_prune_keeps_what_later_steps_and_pending_groups_need(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    a, b = journal.append([make_group(0), make_group(1)])
    c, d = journal.append([make_group(2), make_group(3)])
    commit(journal, 1, [a])
    commit(journal, 2, [b])
    commit(journal, 3, [c])
    assert journal.prune(before_step=3) == 3  # two steps, and the segment only they used
    assert steps(JournalReader(tmp_path)) == [3]
    again = Journal(tmp_path)
    assert steps(again.reader) == [3] and pending(again) == {3: content(d)}
    record = again.reader.record(again.reader.batches()[0].name)
    assert again.reader.sequences(record, [0, 1, 2])
    assert len(list((tmp_path / "batches").iterdir())) == 2  # the batch and its details
    with pytest.raises(JournalError, match="superseded"):
        journal.prune(before_step=4)


def test_prune_keeps_pending_groups_that_share_a_segment_with_old_steps(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    a, ahead = journal.append([make_group(0), make_group(5)])
    (b,) = journal.append([make_group(1)])
    commit(journal, 1, [a])
    commit(journal, 2, [b])
    journal.prune(before_step=3)
    assert pending(Journal(tmp_path)) == {5: content(ahead)}
    assert steps(Journal(tmp_path).reader) == [2]  # the newest stays: its cursor is needed


def test_a_full_disk_is_one_clear_error_and_loses_nothing(tmp_path: Path) -> None:
    mounted = tmp_path / "small"
    mounted.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mounted)], capture_output=True
    )
    if mount.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        journal = Journal(mounted / "journal")
        first = journal.append([make_group(0)])
        with pytest.raises(WriteError, match="(?s)cannot write .*No space left.*free space"):
            journal.append([make_group(i, size=40) for i in range(1, 40)])
        again = Journal(mounted / "journal")
        assert pending(again) == {0: content(first[0])}
        assert not list((mounted / "journal" / "samples").glob(".*"))
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_what_is_trained_on_live_is_what_a_replay_reads(tmp_path: Path) -> None:
    """Bit for bit, also what is no number."""
    group = make_group(0, size=1)
    values = np.array([-0.1, float("nan")], np.float32)
    sample = replace(group.samples[0], rollout_logprobs=values)
    journal = Journal(tmp_path)
    (live,) = journal.append([Group(group.prompt, [sample])])
    read = Journal(tmp_path).pending_groups()[0]
    assert read.blocks == live.blocks
    found = read.group.samples[0].rollout_logprobs
    assert found.dtype == np.float32 and found.tobytes() == values.tobytes()


def test_a_journal_without_a_column_that_was_added_since_reads_its_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:
        fields = [f for f in records.SEGMENT_SCHEMA if f.name != "rollout_logprobs"]
        earlier.setattr(writer, "SEGMENT_SCHEMA", pa.schema(fields))
        earlier.setattr(records, "SEGMENT_SCHEMA", pa.schema(fields))
        Journal(tmp_path).append([make_group(0)])
    (journaled,) = Journal(tmp_path).pending_groups().values()
    assert np.isnan(journaled.group.samples[0].rollout_logprobs).all()
