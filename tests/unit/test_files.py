"""What is written durably is there whole or not at all, and is on the disk before it has its name."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from agpo_megatron.files import WriteError, digest, rename_durably, sync, write_all, write_durably


def test_parts_of_every_kind_follow_each_other_and_replace_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"the old content, which is longer than the new")
    numbers = np.arange(6, dtype=np.int32).reshape(2, 3)
    parts = (b"ab", memoryview(b"cd"), pa.py_buffer(b"ef"), numbers, np.zeros((0, 3)), b"")
    write_durably(path, *parts)
    assert path.read_bytes() == b"abcdef" + numbers.tobytes()
    assert digest(*parts) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_no_parts_make_an_empty_file(tmp_path: Path) -> None:
    write_durably(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b""
    assert digest() == hashlib.sha256().hexdigest()


def test_content_is_synced_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = _record_calls(monkeypatch)
    write_durably(tmp_path / "file", b"content")
    (temporary,) = {name for what, name in events if what == "rename"}
    assert events == [("fsync", temporary), ("rename", temporary), ("fsync", tmp_path.name)]
    assert temporary != "file"


def test_a_folder_is_renamed_after_everything_in_it_was_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "partial" / "inner").mkdir(parents=True)
    (tmp_path / "partial" / "inner" / "leaf").write_bytes(b"content")
    events = _record_calls(monkeypatch)
    rename_durably(tmp_path / "partial", tmp_path / "whole")
    synced, rest = events[:3], events[3:]
    assert sorted(synced) == [("fsync", "inner"), ("fsync", "leaf"), ("fsync", "partial")]
    assert rest == [("rename", "partial"), ("fsync", tmp_path.name)]
    assert (tmp_path / "whole" / "inner" / "leaf").read_bytes() == b"content"


def test_a_refused_write_names_file_cause_and_fix_and_leaves_the_old_file_alone(
    tmp_path: Path,
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with (
        _files_of_at_most(1000),
        pytest.raises(WriteError, match="(?s)cannot write .*/file: File too large.*free space"),
    ):
        write_durably(path, b"x" * 900, b"y" * 900)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_sync_is_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(WriteError, match="Input/output error"):
        write_durably(tmp_path / "file", b"content")
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_a_write_error(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="No such file or directory"):
        write_durably(tmp_path / "nowhere" / "file", b"content")


def test_write_all_goes_on_where_the_system_took_a_part() -> None:
    class Reluctant:
        def __init__(self) -> None:
            self.content = b""

        def write(self, data: memoryview) -> int:
            taken = bytes(data[:3])
            self.content += taken
            return len(taken)

    file = Reluctant()
    write_all(file, b"ten bytes.")
    assert file.content == b"ten bytes."


def test_a_buffer_with_gaps_is_refused_rather_than_written_wrongly(tmp_path: Path) -> None:
    gaps = np.arange(10)[::2]
    with pytest.raises((TypeError, BufferError)):
        write_durably(tmp_path / "file", gaps)
    with pytest.raises((ValueError, BufferError)):
        digest(gaps)
    assert not list(tmp_path.iterdir())


def test_sync_of_what_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "file")


def _record_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is synced and renamed from now on, in order, by the last part of its path."""
    events: list[tuple[str, str]] = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> Path:
        events.append(("rename", source.name))
        return real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    return events


@contextmanager
def _files_of_at_most(nbytes: int) -> Iterator[None]:
    """Make the system refuse to let a file of this process grow beyond ``nbytes``."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
