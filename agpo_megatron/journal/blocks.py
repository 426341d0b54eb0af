"""Files of blocks: an Arrow file whose record batches, one per sample, can each be read and checked alone.

A block is known by (file, offset, length, digest): whoever needs some samples of a file reads their bytes alone and
notices damage. Blocks are read with plain reads, not mapped: an error of the file system is then an exception that
names the file, and no descriptor outlives the read. The files are ordinary Arrow IPC files besides (`datasets`, pandas
and duckdb read them).
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from agpo_megatron.files import WriteError, digest, rename_durably, write_all

MAGIC = 8
"""Bytes before the schema in an Arrow file."""
SCHEMA_BYTES = 2**16
"""No schema of this project is longer."""
DIGEST = 16
"""Hexadecimal digits of SHA-256 that are kept."""


class JournalError(RuntimeError):
    """The journal cannot be written or read; the message names the file, the cause and the fix."""


@dataclass(frozen=True)
class Block:
    """Where one record batch lies: bytes ``[offset, offset + length)`` of ``file``, whose SHA-256 begins with
    ``digest``."""

    file: str
    offset: int
    length: int
    digest: str


class _Sink:
    """What an Arrow writer writes to: a file that hashes what goes through it, but for its first ``header`` bytes."""

    closed = False

    def __init__(self, path: Path, header: int) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by close
        self._hash = hashlib.sha256()
        self._header = header
        self.position = 0

    def write(self, data: bytes) -> int:
        write_all(self._file, data)
        if self.position >= self._header:  # the header ends with a write of its own
            self._hash.update(data)
        self.position += len(data)
        return len(data)

    def take_digest(self) -> str:
        """Digest of what was written since the last call."""
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
    """Write one file of ``batches``, durable on return; its blocks, in order.

    ``name``: from the digest of all blocks' digests to the file's name. Batches are written as they come, so that no
    two need be in memory. Raises WriteError.
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
    """The record batch of each block, in order, each read when it is asked for.

    Waits up to ``patience`` seconds for a shared file system to show a file with that content. Raises JournalError when
    a block stays missing or different.
    """
    schemas: dict[str, pa.Schema] = {}
    for block in blocks:
        deadline = time.monotonic() + patience
        while (found := _read(folder / block.file, block, schemas)) is None:
            if time.monotonic() > deadline:
                path = folder / block.file
                what = (
                    f"does not hold the block {block.digest} it was announced with"
                    if path.exists()
                    else "is missing"
                )
                raise JournalError(
                    f"{path} {what}. Restore it from a copy; the run cannot be resumed without it."
                )
            time.sleep(0.05)
        yield found


def _read(path: Path, block: Block, schemas: dict[str, pa.Schema]) -> pa.RecordBatch | None:
    """The block, or None when the file does not hold it."""
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
    """The blocks of a file whose places are not known any more, in order; ``whole``: the digest that its name holds.

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
