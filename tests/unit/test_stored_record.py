"""Records of ``torch.save``, mapped: every kind of tensor, and what is refused."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from agpo_megatron.conversion.shape import DTYPES
from agpo_megatron.policy.stored_record import read_record

pytestmark = pytest.mark.processes

LEAD = 4099  # odd: values are not aligned, pages neither


def stored(folder: Path, content: Any) -> tuple[Path, int, int]:
    """(file, start, length) of a record amid other bytes."""
    record = io.BytesIO()
    torch.save(content, record)
    return raw(folder, record.getvalue())


def raw(folder: Path, record: bytes) -> tuple[Path, int, int]:
    path = folder / "file"
    path.write_bytes(b"x" * LEAD + record + b"y" * 100)
    return path, LEAD, len(record)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = a.dtype == b.dtype and a.shape == b.shape
    return kind and torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    values = (torch.arange(-30, 30) % 7).reshape(5, 12).to(dtype)
    assert same(read_record(*stored(tmp_path, values)), values)


BASE = torch.arange(60.0).reshape(3, 4, 5)
LARGE = torch.arange(5000.0)


@pytest.mark.parametrize(
    "values",
    [
        BASE.permute(2, 0, 1),
        BASE[1:, ::2, 3],
        BASE[0, 0, :1].expand(7, 1),
        torch.nn.Parameter(BASE),
        torch.tensor(3.5),
        torch.empty(0, 4),
    ],
    ids=["permuted", "slice", "expanded", "parameter", "scalar", "empty"],
)
def test_every_form(tmp_path: Path, values: torch.Tensor) -> None:
    assert same(read_record(*stored(tmp_path, values)), values.detach())


def test_writing_does_not_change_the_file(tmp_path: Path) -> None:
    place = stored(tmp_path, BASE)
    before = place[0].read_bytes()
    read_record(*place).zero_()
    assert place[0].read_bytes() == before
    assert same(read_record(*place), BASE)


def rewritten(change: Any) -> bytes:
    """A record of ``LARGE`` whose entries went through ``change``, (name, bytes) to bytes."""
    record, out = io.BytesIO(), io.BytesIO()
    torch.save(LARGE, record)
    with zipfile.ZipFile(record) as source, zipfile.ZipFile(out, "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, change(entry.filename, source.read(entry)))
    return out.getvalue()


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/evil"),))


def evil(name: str, content: bytes) -> bytes:
    return pickle.dumps(Evil(), protocol=2) if name.endswith("data.pkl") else content


def short(name: str, content: bytes) -> bytes:
    return content[:4] if name.endswith("data/0") else content


def no_tensor(name: str, content: bytes) -> bytes:
    return pickle.dumps({"a": 1}, protocol=2) if name.endswith("data.pkl") else content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (evil, "more than tensors"),
        (short, "reach beyond the record"),
        (no_tensor, "dict is no tensor"),
    ],
)
def test_hostile_and_damaged_records_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    assert same(read_record(*raw(tmp_path, rewritten(lambda _, content: content))), LARGE)
    with pytest.raises(Exception, match=message):
        read_record(*raw(tmp_path, rewritten(change)))


def test_a_record_cut_short_is_refused(tmp_path: Path) -> None:
    path, start, length = stored(tmp_path, BASE)
    with pytest.raises(RuntimeError, match="central directory"):
        read_record(path, start, length - 30)
