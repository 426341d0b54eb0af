"""Files that survive a power cut: the durable write, the durable rename, the sync and the digest, once.

A leaf: imports nothing of the project.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from typing_extensions import Buffer


class WriteError(OSError):
    """A file that could not be written: names the file, the cause and the fix."""

    def __init__(self, path: Path, cause: OSError) -> None:
        super().__init__(
            f"cannot write {path}: {cause.strerror or cause}. Nothing committed is lost: "
            "free space or mend the file system, then run the same command again."
        )


class RawFile(Protocol):
    """An unbuffered file, whose ``write`` may take only the beginning of what it is given."""

    def write(self, data: memoryview, /) -> int | None: ...


def write_durably(path: Path, *parts: Buffer) -> None:
    """Write ``parts`` one after the other to ``path``; once this returns, the file survives a power cut.

    ``path`` holds all of the new content or what it held before, never a part. Raises WriteError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb", buffering=0) as file:
            for part in parts:
                write_all(file, part)
        rename_durably(temporary, path)
    except OSError as error:
        raise WriteError(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_all(file: RawFile, data: Buffer) -> None:
    """Write every byte of a contiguous buffer: one call to the system takes 2 GB at most, or the room that is left."""
    view = memoryview(data)
    view = view.cast("B") if view.nbytes else memoryview(b"")
    while len(view):
        view = view[file.write(view) :]


def rename_durably(source: Path, target: Path) -> None:
    """Give a file or a folder its final name, after syncing all that is in it. Raises OSError."""
    for path in [*source.rglob("*"), source]:
        sync(path)
    source.rename(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Flush a file's content or a folder's list of names to disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(*parts: Buffer) -> str:
    """SHA-256, in hexadecimal, of the bytes of contiguous buffers one after the other; nothing is copied."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()
