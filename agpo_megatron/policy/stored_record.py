"""A tensor that ``torch.save`` wrote into a stretch of a file, as memory mapped from there: no value is copied.

The record is a zip archive: a small pickle that describes the tensor, and its values, uncompressed
(torch/serialization.py). The pickle is taken apart by an unpickler that knows a dozen names and gives descriptions:
nothing of the file's choosing is imported or called.
"""

from __future__ import annotations

import io
import pickle
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from mmap import ACCESS_COPY, ALLOCATIONGRANULARITY, mmap
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from agpo_megatron.conversion.shape import DTYPES

_LOCAL_HEADER = 30
"""Bytes of a zip entry's header before its name; the last four are the lengths of name and extra field."""


class KnownOnly(pickle.Unpickler):
    """Answers the names of ``known``, (module, name) -> anything, and refuses all others."""

    def __init__(self, file: IO[bytes], known: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(file)
        self._known = known

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._known[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}") from None


class _Described(KnownOnly):
    def persistent_load(self, pid: Any) -> Any:
        return pid  # ("storage", dtype, key, device, elements)


@dataclass(frozen=True)
class _Strided:
    storage: Any
    offset: Any
    size: Any
    stride: Any
    dtype: Any


def _typed(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Strided:
    return _Strided(storage, offset, size, stride, storage[1])


def _untyped(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> _Strided:
    return _Strided(storage, offset, size, stride, dtype)


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_KNOWN: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _typed,
    ("torch._utils", "_rebuild_tensor_v3"): _untyped,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch.storage", "UntypedStorage"): None,
    ("collections", "OrderedDict"): dict,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
}


def read_record(path: Path, start: int, length: int) -> Tensor:
    """The tensor in bytes [start, start + length) of ``path``, of any shape and strides, on the CPU. Writing to it does
    not change the file. Raises whatever a damaged or hostile record leads to: OSError, ValueError, UnpicklingError, ...
    """
    with path.open("rb") as file:
        record = _Record(file, start, length)
        with zipfile.ZipFile(cast("IO[bytes]", record)) as archive:
            folder = archive.namelist()[0].split("/")[0]
            order = archive.read(f"{folder}/byteorder").decode()
            with archive.open(f"{folder}/data.pkl") as pickled:
                described = _Described(pickled, _KNOWN).load()
            if not isinstance(described, _Strided) or order != sys.byteorder:
                raise ValueError(f"a {order}-endian {type(described).__name__} is no tensor")
            entry = archive.getinfo(f"{folder}/data/{described.storage[2]}")
            at = _place(record, entry)
        if entry.compress_type != zipfile.ZIP_STORED or at + entry.file_size > length:
            raise ValueError(f"{entry.filename} is compressed or reaches beyond its record")
        return _mapped(file, start + at, entry.file_size, described)


def _place(record: _Record, entry: zipfile.ZipInfo) -> int:
    """Where the values of an entry begin."""
    record.seek(entry.header_offset)
    header = record.read(_LOCAL_HEADER)
    name, extra = header[-4:-2], header[-2:]
    lengths = int.from_bytes(name, "little") + int.from_bytes(extra, "little")
    return entry.header_offset + _LOCAL_HEADER + lengths


def _mapped(file: IO[bytes], at: int, nbytes: int, described: _Strided) -> Tensor:
    if nbytes == 0:
        return torch.empty(described.size, dtype=described.dtype)
    start = at // ALLOCATIONGRANULARITY * ALLOCATIONGRANULARITY
    window = mmap(file.fileno(), at - start + nbytes, access=ACCESS_COPY, offset=start)
    values = torch.frombuffer(window, dtype=torch.uint8, offset=at - start, count=nbytes)
    if values.data_ptr() % described.dtype.itemsize:
        values = values.clone()
    # Refuses what lies beyond the values.
    return values.view(described.dtype).as_strided(
        described.size, described.stride, described.offset
    )


class _Record(io.RawIOBase):
    """A stretch of an open file as a file of its own."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(view)
        self._at += count
        return count
