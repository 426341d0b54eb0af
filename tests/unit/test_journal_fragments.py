"""Fragments of unfinished responses in the journal: durable, taken over by the next attempt, gone when not needed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_journal import commit, content, flip_a_bit, make_group

from agpo_megatron.files import write_durably
from agpo_megatron.journal import Journal, JournalError, JournalReader, writer
from agpo_megatron.samples import Fragment, VersionSpan


def fragment(position: int, index: int, start: int, end: int, reason: str = "") -> Fragment:
    """Tokens and log-probs that name their place."""
    places = np.arange(start, end)
    tokens = (1000 * position + 100 * index + places).astype(np.int32)
    middle = (start + end) // 2
    versions = (VersionSpan("0.1.a", start, middle), VersionSpan("1.1.b", middle, end))
    return Fragment(
        position, index, start, tokens, -tokens.astype(np.float32) / 7, versions, reason
    )


def shown(found: Mapping[int, Sequence[Fragment]]) -> dict[int, Any]:
    return {position: content(list(some)) for position, some in found.items()}


def prefixes(found: Mapping[int, Sequence[Fragment]]) -> dict[tuple[int, int], list[int]]:
    """The tokens of each response as far as its fragments follow each other."""
    tokens: dict[tuple[int, int], list[int]] = {}
    for f in sorted((f for some in found.values() for f in some), key=lambda f: f.start):
        known = tokens.setdefault((f.position, f.index), [])
        if f.start == len(known):
            known += f.tokens.tolist()
    return tokens


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "fragments").iterdir())


def patient(journal: Journal) -> Journal:
    journal.reader.read_patience = 0.0
    return journal


def test_fragments_are_durable_and_the_next_attempt_reads_them(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    a, b, c = fragment(3, 0, 0, 4), fragment(4, 1, 0, 5), fragment(3, 0, 4, 6, "stop")
    first.append_fragments([a, b])
    first.append_fragments([c])
    assert [name[:26] for name in files(tmp_path)] == [
        "fragments-a000001-00000000",
        "fragments-a000001-00000001",
    ]
    by_file = JournalReader(tmp_path).fragments()
    assert [content(found) for found in by_file.values()] == [content([a, b]), content([c])]
    second = Journal(tmp_path)
    found = second.pending_fragments([])
    assert shown(found) == {3: content([a, c]), 4: content([b])}
    (taken_over,) = files(tmp_path)
    assert taken_over.startswith("fragments-a000002-00000000-")
    d = fragment(4, 1, 5, 7)
    second.append_fragments([d])
    assert shown(Journal(tmp_path).pending_fragments([])) == {
        3: content([a, c]),
        4: content([b, d]),
    }


def test_what_a_superseded_writer_does_to_fragments_is_without_effect(tmp_path: Path) -> None:
    old = Journal(tmp_path)
    a, b = fragment(0, 0, 0, 4), fragment(0, 0, 4, 8)
    old.append_fragments([a])
    new = Journal(tmp_path)
    old.append_fragments([b])  # not in the inventory of the new one
    old.append([make_group(0)])  # nor is this group, so the new one still needs the fragments
    assert shown(patient(new).pending_fragments(new.pending_groups())) == {0: content([a])}
    between = Journal(tmp_path)
    late = Journal(tmp_path)
    with pytest.raises(JournalError, match="superseded"):
        between.pending_fragments([])  # it would remove what the later one is about to read
    assert shown(patient(late).pending_fragments([])) == {0: content([a])}
    old.append_fragments([b])
    last = Journal(tmp_path)
    assert shown(last.pending_fragments([])) == {0: content([a])}
    assert [name[:17] for name in files(tmp_path)] == ["fragments-a000005"]


def test_a_file_goes_once_all_its_groups_are_durable(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append_fragments([fragment(0, 0, 0, 2), fragment(1, 0, 0, 2)])
    journal.append_fragments([fragment(1, 0, 2, 3)])
    both, one = files(tmp_path)
    journal.append([make_group(0), make_group(7)])
    assert files(tmp_path) == [both, one]
    journal.append([make_group(1)])
    assert files(tmp_path) == []
    assert JournalReader(tmp_path).fragments() == {}

    journal.append_fragments([fragment(2, 0, 0, 2)])
    later = Journal(tmp_path)
    assert later.pending_fragments(later.pending_groups()).keys() == {2}
    later.append([make_group(2)])
    assert files(tmp_path) == []
    assert Journal(tmp_path).pending_fragments([]) == {}


def test_fragments_of_used_and_of_finished_groups_are_dropped(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    first.append_fragments([fragment(p, 0, 0, 2) for p in range(5)])
    used, _ = first.append([make_group(1), make_group(3)])
    commit(first, 1, [used])  # the cursor is 2
    second = Journal(tmp_path)
    pending = second.pending_groups()
    assert pending.keys() == {3}
    assert second.pending_fragments(pending).keys() == {2, 4}
    (kept,) = JournalReader(tmp_path).fragments().values()
    assert [f.position for f in kept] == [2, 4]
    second.append([make_group(2), make_group(4)])
    assert files(tmp_path) == []


def test_nothing_needed_leaves_no_file(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    first.append_fragments([fragment(0, 0, 0, 2)])
    second = Journal(tmp_path)
    assert second.pending_fragments([0]) == {}
    assert files(tmp_path) == []
    assert Journal(tmp_path).pending_fragments([]) == {}


@pytest.mark.parametrize("damage", [True, False])
def test_a_damaged_or_missing_file_is_refused_by_name(tmp_path: Path, damage: bool) -> None:
    first = Journal(tmp_path)
    first.append_fragments([fragment(0, 0, 0, 2)])
    first.append_fragments([fragment(1, 0, 0, 2)])
    second = patient(Journal(tmp_path))
    path = tmp_path / "fragments" / files(tmp_path)[1]
    whole = path.read_bytes()
    if damage:
        path.write_bytes(flip_a_bit(whole, len(whole) // 2))
    else:
        path.unlink()
    with pytest.raises(JournalError, match=path.name):
        second.pending_fragments([])
    with pytest.raises(JournalError, match=path.name):
        patient(Journal(tmp_path)).pending_fragments([])
    path.write_bytes(whole)
    assert Journal(tmp_path).pending_fragments([]).keys() == {0, 1}


class Killed(BaseException):
    pass


class Kill:
    """Ends the process at the n-th file operation of ``pending_fragments``, before or after it took place."""

    def __init__(self, at: int, after: bool) -> None:
        self.at, self.after, self.done = at, after, 0

    def __call__(self, operation: Any, *args: Any, **more: Any) -> None:
        self.done += 1
        if self.done == self.at and not self.after:
            raise Killed
        operation(*args, **more)
        if self.done == self.at:
            raise Killed

    def run(self, journal: Journal) -> None:
        unlink = Path.unlink
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writer, "write_durably", lambda *a: self(write_durably, *a))
            patch.setattr(
                Path,
                "unlink",
                lambda path, missing_ok=False: (
                    unlink(path, missing_ok)
                    if path.name.startswith(".")  # within write_durably
                    else self(unlink, path, missing_ok)
                ),
            )
            journal.pending_fragments([1])


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_point_nothing_is_lost_and_the_prefixes_are_the_same(
    tmp_path: Path, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # thousands of them
    expected = {
        (p, i): [1000 * p + 100 * i + t for t in range(6)] for p, i in ((2, 0), (2, 1), (5, 0))
    }
    reached = 0
    for at in range(1, 7):
        for again in range(1, 7):
            folder = tmp_path / f"{at}-{again}"
            first = Journal(folder)
            for start, end in ((0, 2), (2, 5), (5, 6)):
                first.append_fragments([fragment(p, i, start, end) for p, i in (*expected, (1, 0))])
            for kill in (Kill(at, after), Kill(again, not after)):
                try:
                    kill.run(Journal(folder))
                except Killed:
                    reached = max(reached, kill.at)
            last = Journal(folder)
            assert prefixes(last.pending_fragments([1])) == expected, (at, again)
            assert [name[:17] for name in files(folder)] == [f"fragments-a{last.attempt:06d}"]
            assert prefixes(Journal(folder).pending_fragments([])) == expected
    assert reached == 6, "a file, the inventory, the four files of two attempts that go"


def test_prune_keeps_fragments(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    first.append_fragments([fragment(5, 0, 0, 2)])
    for position in range(3):
        commit(first, 1 + position, first.append([make_group(position)]))
    assert first.prune(before_step=2) == 2
    second = Journal(tmp_path)
    assert second.prune(before_step=3) == 2  # before it took them over
    third = Journal(tmp_path)
    assert third.pending_fragments([]).keys() == {5}
    commit(third, 4, third.append([make_group(3)]))
    assert third.prune(before_step=4) == 2  # afterwards
    assert prefixes(Journal(tmp_path).pending_fragments([])) == {(5, 0): [5000, 5001]}
