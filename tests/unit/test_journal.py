"""The journal: durable, immutable, one writer, exact round trip."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from agpo_megatron.journal import Journal, JournalError, JournalReader, StepRecord, StepRow
from agpo_megatron.types import Group, Prompt, Sample, VersionSpan


def make_group(position: int, size: int = 3) -> Group:
    prompt = Prompt(position, [1, 2, 3 + position], str(position), f"what is {position}?")
    samples = [
        Sample(
            group_id=prompt.group_id,
            index=i,
            prompt_tokens=prompt.tokens,
            response_tokens=list(range(10, 12 + i)),
            rollout_logprobs=[-0.5 * (k + 1) for k in range(2 + i)],
            loss_mask=[1] * (2 + i),
            versions=[VersionSpan("0.1.abc", 0, 2 + i)],
            finish_reason="stop",
            text=f"answer {i}",
            accuracy=float(i % 2),
        )
        for i in range(size)
    ]
    return Group(prompt, samples)


def make_step(step: int, journaled: list, version: str = "0.1.abc") -> StepRecord:
    rows = [
        StepRow(
            s.sample_id,
            ref,
            len(s.prompt_tokens) + len(s.response_tokens),
            1.0,
            0.5,
            0.25,
            len(s.loss_mask),
            ref_logprobs=[-1.5] * len(s.loss_mask),
            correction=[0.0] + [0.5] * (len(s.loss_mask) - 1),
        )
        for j in journaled
        for s, ref in zip(j.group.samples, j.refs, strict=True)
    ]
    segments = {ref.segment: j.digest for j in journaled for ref in j.refs}
    cursor = 1 + max(j.group.prompt.position for j in journaled)
    return StepRecord(step, 0, cursor, version, segments, rows, {"reward/mean": 0.5})


def test_round_trip_of_groups_and_steps(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journaled = journal.append([make_group(0), make_group(1)])
    assert [j.group for j in journaled] == [make_group(0), make_group(1)]
    committed = make_step(1, journaled)
    name = journal.commit_step(committed)
    reader = JournalReader(tmp_path)
    assert reader.step_names() == {1: name}
    assert reader.steps() == [1]
    assert reader.record(1) == committed
    sequences = reader.sequences(committed, [4, 0])
    assert [s.sample_id for s in sequences] == ["g000000001.1", "g000000000.0"]
    assert sequences[0].tokens == [1, 2, 4, 10, 11, 12]
    assert sequences[0].loss_weight == 0.25
    assert sequences[0].loss_mask == [0, 0, 0, 0, 1, 1], "a token of correction 0 does not train"
    assert sequences[0].trained() == [4, 5]
    assert sequences[0].correction == [0, 0, 0, 0.0, 0.5, 0.5]
    assert sequences[0].ref_logprobs == [0, 0, 0, -1.5, -1.5, -1.5]
    assert sequences[0].old_logprobs == []
    assert sequences[0].rollout_logprobs == [0, 0, 0, -0.5, -1.0, -1.5]
    assert sequences[0].advantage == 0.5


def test_finished_groups_survive_the_writer_and_are_pending(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    a, b = first.append([make_group(0), make_group(1)])
    (c,) = first.append([make_group(2)])
    first.commit_step(make_step(1, [a]))
    second = Journal(tmp_path)
    assert second.attempt == first.attempt + 1
    pending = second.pending_groups()
    assert sorted(pending) == [1, 2]
    assert pending[1] == b and pending[2] == c


def test_what_a_superseded_writer_still_writes_is_ignored(tmp_path: Path) -> None:
    old = Journal(tmp_path)
    (kept,) = old.append([make_group(0)])
    new = Journal(tmp_path)
    late = old.append([make_group(1)])
    old.commit_step(make_step(1, late))
    assert new.pending_groups() == {0: kept}
    assert JournalReader(tmp_path).steps() == []
    third = Journal(tmp_path)
    assert third.pending_groups() == {0: kept} and third.reader.steps() == []


def test_the_same_step_of_a_later_attempt_does_not_collide(tmp_path: Path) -> None:
    old = Journal(tmp_path)
    groups = old.append([make_group(0)])
    new = Journal(tmp_path)
    new.commit_step(make_step(1, new.append([make_group(0, size=2)]), "new"))
    old.commit_step(make_step(1, groups, "old"))
    assert JournalReader(tmp_path).record(1).weight_version == "new"


def test_a_half_written_file_is_not_a_step(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    name = f".step-00000001-a{journal.attempt:06d}-0123456789abcdef.arrow.99.tmp"
    (tmp_path / "steps" / name).write_bytes(b"half")
    assert Journal(tmp_path).reader.steps() == []


def test_damage_is_refused_with_the_file_name(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journaled = journal.append([make_group(0)])
    record = make_step(1, journaled)
    step = tmp_path / "steps" / journal.commit_step(record)
    segment = tmp_path / "samples" / journaled[0].refs[0].segment
    for path in (segment, step):
        whole = path.read_bytes()
        for damage in (flip_a_bit(whole), None):
            reader = JournalReader(tmp_path)
            reader.read_patience = 0.0
            if damage is None:
                path.unlink()
            else:
                path.write_bytes(damage)
            with pytest.raises(JournalError, match=path.name):
                reader.sequences(record) if path is segment else reader.read_record(step.name)
        path.write_bytes(whole)


def flip_a_bit(data: bytes) -> bytes:
    changed = bytearray(data)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


def test_prune_keeps_what_later_steps_and_pending_groups_need(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    a, b = journal.append([make_group(0), make_group(1)])
    c, d = journal.append([make_group(2), make_group(3)])
    journal.commit_step(make_step(1, [a]))
    journal.commit_step(make_step(2, [b]))
    journal.commit_step(make_step(3, [c]))
    assert journal.prune(before_step=3) == 3  # two steps, and the segment only they used
    assert JournalReader(tmp_path).steps() == [3]
    again = Journal(tmp_path)
    assert again.reader.steps() == [3] and again.pending_groups() == {3: d}
    assert again.reader.sequences(again.reader.record(3))
    with pytest.raises(JournalError, match="superseded"):
        journal.prune(before_step=4)


def test_prune_keeps_pending_groups_that_share_a_segment_with_old_steps(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    a, ahead = journal.append([make_group(0), make_group(5)])
    (b,) = journal.append([make_group(1)])
    journal.commit_step(make_step(1, [a]))
    journal.commit_step(make_step(2, [b]))
    journal.prune(before_step=3)
    assert Journal(tmp_path).pending_groups() == {5: ahead}
    assert Journal(tmp_path).reader.steps() == [2]  # the newest stays: its cursor is needed


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
        with pytest.raises(JournalError, match="(?s)cannot write .*No space left.*free space"):
            journal.append([make_group(i, size=40) for i in range(1, 40)])
        again = Journal(mounted / "journal")
        assert again.pending_groups() == {0: first[0]}
        assert not list((mounted / "journal" / "samples").glob(".*"))
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_log_probs_are_float32_from_the_first_use_on(tmp_path: Path) -> None:
    """What a live step trains on and what a replay reads must be the same bits."""
    group = make_group(0, size=1)
    sample = replace(group.samples[0], rollout_logprobs=[-0.1, -0.2])
    journal = Journal(tmp_path)
    (live,) = journal.append([Group(group.prompt, [sample])])
    os.sync()
    assert live == Journal(tmp_path).pending_groups()[0]
    assert live.group.samples[0].rollout_logprobs != [-0.1, -0.2]
