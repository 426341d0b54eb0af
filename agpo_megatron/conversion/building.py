"""A folder that appears complete or not at all, built file by file, and taken up again where an interruption left it.

Everything happens in a hidden folder beside the target. A file counts once its record is there: it was written under a
temporary name, synced and renamed before. The target appears by one rename at the end.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agpo_megatron.conversion.errors import ConversionError
from agpo_megatron.files import rename_durably, write_durably

WORK = ".building"
"""Folder of the bookkeeping; gone before the target appears."""
MARGIN = 1.01
"""Disk asked for beyond the tensors: headers and bookkeeping."""


class Stopped(Exception):
    """Raised in the threads of a build when another thread failed or the user interrupted."""


class MemoryGate:
    """Lets threads in as long as what they hold together stays within ``limit`` bytes; one alone may hold more."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, nbytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + nbytes <= self._limit)
            self._held += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._held -= nbytes
                self._changed.notify_all()


@dataclass(frozen=True)
class Pace:
    """The pace of a build. ``workers``: threads, one file each; ``advance``: called with the bytes of each tensor done,
    from those threads; it may raise ``Stopped``."""

    workers: int = 2
    advance: Callable[[int], None] = lambda _: None


@dataclass(frozen=True)
class FileJob:
    """A file to write. ``nbytes``: about its size. ``write(path, advance)`` returns a JSON value to keep with it."""

    nbytes: int
    write: Callable[[Path, Callable[[int], None]], Any]


class Building:
    """The hidden folder beside ``target``; use ``open_building``. ``folder``: where further files may be put."""

    def __init__(self, target: Path, folder: Path) -> None:
        self.target, self.folder = target, folder

    def write(self, files: Mapping[str, FileJob], pace: Pace) -> dict[str, Any]:
        """Write all ``files`` that are not there yet, in parallel; returns what their jobs returned, by name.

        Raises ConversionError when the disk has no room for what is missing, before anything is written, and what a job
        raises; the others then end at their next tensor, and finished files stay for the next attempt.
        """
        records = {name: self._record(name) for name in files}
        missing = {name: job for name, job in files.items() if records[name] is None}
        check_space(self.folder, sum(job.nbytes for job in missing.values()))
        for name in files.keys() - missing.keys():
            pace.advance(files[name].nbytes)
        stop = threading.Event()

        def advance(nbytes: int) -> None:
            if stop.is_set():
                raise Stopped
            pace.advance(nbytes)

        with ThreadPoolExecutor(max(1, pace.workers)) as pool:
            running = {
                name: pool.submit(self._write_one, name, job, advance)
                for name, job in missing.items()
            }
            try:
                wait(running.values(), return_when=FIRST_EXCEPTION)
            finally:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
        failures = [f.exception() for f in running.values() if not f.cancelled() and f.exception()]
        for failure in sorted(failures, key=lambda e: isinstance(e, Stopped)):
            assert failure is not None
            raise failure
        return {
            name: running[name].result() if record is None else record["value"]
            for name, record in records.items()
        }

    def publish(self, overwrite: bool = False) -> None:
        """Sync everything and rename the folder to ``target``."""
        shutil.rmtree(self.folder / WORK)
        publish_folder(self.folder, self.target, overwrite)

    def _write_one(self, name: str, job: FileJob, advance: Callable[[int], None]) -> Any:
        temporary = self.folder / WORK / f"{name}.partial"
        record = {"value": job.write(temporary, advance)}
        rename_durably(temporary, self.folder / name)
        write_durably(self.folder / WORK / f"{name}.json", json.dumps(record).encode())
        return record["value"]

    def _record(self, name: str) -> dict[str, Any] | None:
        try:
            note = (self.folder / WORK / f"{name}.json").read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        return dict(json.loads(note)) if (self.folder / name).is_file() else None


def check_space(folder: Path, nbytes: int) -> None:
    """Raise ConversionError when the file system of ``folder`` cannot take ``nbytes``."""
    free = shutil.disk_usage(folder).free
    if free < nbytes * MARGIN:
        raise ConversionError(
            f"{folder.parent} has {free / 1e9:.2f} GB free, {nbytes * MARGIN / 1e9:.2f} GB are needed; "
            "free some space or choose another folder"
        )


@contextmanager
def open_building(
    target: Path, identity: Mapping[str, Any], overwrite: bool = False
) -> Iterator[Building]:
    """Open the place to build ``target`` in. ``identity`` (JSON values) describes source and result: what an earlier
    attempt with the same identity left is taken up, that of another is removed. After an error, finished files stay.

    Raises ConversionError when ``target`` exists (unless ``overwrite``) or another process is building it.
    """
    target = target.absolute()
    refuse_existing(target, overwrite)
    folder = target.with_name(f".{target.name}.partial")
    wanted = json.loads(json.dumps(identity))
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConversionError(f"another process is writing {target}; wait for it") from None
        if _identity(folder) != wanted:
            _empty(folder)
            (folder / WORK).mkdir()
            (folder / WORK / "identity.json").write_text(json.dumps(wanted), encoding="utf-8")
        yield Building(target, folder)
    except OSError as error:
        raise ConversionError(f"writing {target} failed: {error}") from error
    finally:
        if folder.is_dir() and not _finished(folder):
            shutil.rmtree(folder)
        os.close(lock)


def refuse_existing(target: Path, overwrite: bool = False) -> None:
    """Raise ConversionError when ``target`` is there already."""
    if target.exists() and not overwrite:
        raise ConversionError(f"{target} exists already; remove it or choose another folder")


def publish_folder(partial: Path, target: Path, overwrite: bool = False) -> None:
    """Rename a folder to its final name, after syncing its files; an old folder there is replaced if ``overwrite``."""
    refuse_existing(target, overwrite)
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(old)
    rename_durably(partial, target)
    shutil.rmtree(old, ignore_errors=True)


def _identity(folder: Path) -> Any:
    try:
        return json.loads((folder / WORK / "identity.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _finished(folder: Path) -> bool:
    """Say whether any file was finished, so that there is something to take up."""
    return any(note.name != "identity.json" for note in (folder / WORK).glob("*.json"))


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
