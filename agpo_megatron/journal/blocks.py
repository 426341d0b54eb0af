"""Files of blocks: an Arrow file whose record batches, one per sample, can each be read and checked alone.

A block is identified by (file, offset, length, digest): a reader of some samples reads only their bytes and notices
damage. Blocks are read with plain reads, not mapped: an error of the file system is then an exception that names the
file, and no descriptor outlives the read. The files are ordinary Arrow IPC files (`datasets`, pandas and duckdb read
them).
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from agpo_megatron.files import WriteError, digest, rename_durably, write_all

T = TypeVar("T")
MAGIC = 8
"""Number of bytes before the schema in an Arrow file."""
SCHEMA_BYTES = 2**16
"""Upper limit of the length of a schema."""
DIGEST = 16
"""Number of hexadecimal digits of SHA-256 that are kept."""


class JournalError(RuntimeError):
    """The journal cannot be written or read; the message names the file, the cause and the fix."""


@dataclass(frozen=True)
class Block:
    """The place of one record batch: bytes ``[offset, offset + length)`` of ``file``, whose SHA-256 begins with
    ``digest``."""

    file: str
    offset: int
    length: int
    digest: str


class _Sink:
    """File for an Arrow writer that hashes everything written to it after the first ``header`` bytes."""

    closed = False

    def __init__(self, path: Path, header: int) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by close
        self._hash = hashlib.sha256()
        self._header = header
        self.position = 0

    def write(self, data: bytes) -> int:
        write_all(self._file, data)
        self._hash.update(memoryview(data)[max(0, self._header - self.position) :])
        self.position += len(data)
        return len(data)

    def take_digest(self) -> str:
        """Return the digest of the bytes written since the last call."""
        found, self._hash = self._hash.hexdigest()[:DIGEST], hashlib.sha256()
        return found

    def tell(self) -> int:
        return self.position

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._file.close()


def write_blocks(
    folder: Path,
    name: Callable[[str], str],
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
) -> list[Block]:
    """Write one file of ``batches``, durable on return; return its blocks, in order.

    ``name``: maps the digest of all blocks' digests to the file name. Batches are written one by one, so that no two
    need to be in memory. Raises WriteError.
    """
    temporary = folder / f".{name('new')}.{os.getpid()}.tmp"
    header = MAGIC + schema.serialize().size
    places: list[tuple[int, int, str]] = []
    try:
        sink = _Sink(temporary, header)
        try:
            with pa.ipc.new_file(sink, schema) as writer:
                for batch in batches:
                    start = max(sink.position, header)  # the first batch brings the schema along
                    writer.write_batch(batch)
                    places.append((start, sink.position - start, sink.take_digest()))
        finally:
            sink.close()
        final = name(digest(*(d.encode() for _, _, d in places))[:DIGEST])
        rename_durably(temporary, folder / final)
    except OSError as error:
        raise WriteError(folder / name("new"), error) from error
    finally:
        temporary.unlink(missing_ok=True)
    return [Block(final, *place) for place in places]


def read_blocks(
    folder: Path, blocks: Sequence[Block], patience: float = 5.0
) -> Iterator[pa.RecordBatch]:
    """Yield the record batch of each block, in order, each read when it is requested.

    Waits up to ``patience`` seconds for a shared file system to show a file with that content. Raises JournalError when
    a block stays missing or different.
    """
    schemas: dict[str, pa.Schema] = {}
    for block in blocks:
        path = folder / block.file
        yield when_shown(partial(_read, path, block, schemas), path, block.digest, patience)


def when_shown(read: Callable[[], T | None], path: Path, wanted: str, patience: float) -> T:
    """Return the result of ``read`` as soon as it is not None. Raises JournalError after ``patience`` seconds."""
    deadline = time.monotonic() + patience
    while (found := read()) is None:
        if time.monotonic() > deadline:
            cause = f"does not hold the content {wanted} it was announced with"
            raise JournalError(
                f"{path} {cause if path.exists() else 'is missing'}. "
                "Restore it from a copy; the run cannot be resumed without it."
            )
        time.sleep(0.05)
    return found


def _read(path: Path, block: Block, schemas: dict[str, pa.Schema]) -> pa.RecordBatch | None:
    """Read the block; None when the file does not hold it."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), block.length, block.offset)
            if not digest(data).startswith(block.digest):
                return None
            if block.file not in schemas:
                start = os.pread(file.fileno(), SCHEMA_BYTES, MAGIC)
                schemas[block.file] = pa.ipc.read_schema(pa.BufferReader(start))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise JournalError(f"cannot read {path}: {error.strerror}") from error
    return pa.ipc.read_record_batch(pa.py_buffer(data), schemas[block.file])


def find_blocks(folder: Path, name: str, whole: str) -> list[Block]:
    """Find the blocks of a file by scanning it, in order; ``whole``: the digest in its name.

    Raises JournalError for a damaged file.
    """
    path, blocks = folder / name, []
    try:
        with pa.OSFile(str(path)) as file:
            count = pa.ipc.open_file(file).num_record_batches
            file.seek(MAGIC)
            pa.ipc.read_message(file)  # the schema
            for _ in range(count):
                start = file.tell()
                pa.ipc.read_message(file)
                end = file.tell()
                file.seek(start)
                data = file.read_buffer(end - start)
                blocks.append(Block(name, start, end - start, digest(data)[:DIGEST]))
    except (OSError, EOFError, pa.ArrowInvalid) as error:
        raise JournalError(f"{path} is damaged ({error}). {RESTORE}") from error
    if digest(*(b.digest.encode() for b in blocks))[:DIGEST] != whole:
        raise JournalError(
            f"{path} is damaged (it does not have the digest in its name). {RESTORE}"
        )
    return blocks


RESTORE = "Restore it from a copy, or remove the run folder and start again."
