"""Rows of a data file, folder or hub dataset, each with the place that messages name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

LISTED = 20  # bad rows that an error lists
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
LINES = (".jsonl", ".json", ".ndjson")


class DataError(ValueError):
    """Data that cannot be used; the message names place and fix."""


class BadRow(ValueError):
    """One row that cannot be used, and why."""


class Rows(Protocol):
    """Random access to rows; ``row`` raises BadRow for one that is not a JSON object."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> Mapping[str, Any]: ...

    def place(self, index: int) -> str: ...


class WrittenFloat(float):
    """A number of a JSON file that knows how it was written: 4.50 is the answer "4.50"."""

    text: str

    def __new__(cls, text: str) -> WrittenFloat:
        number = super().__new__(cls, text)
        number.text = text
        return number


@dataclass(frozen=True)
class JsonLines:
    """Lines that are not blank, decoded one at a time by the standard library: a reader that guesses the types of
    columns turns texts that look like dates into dates, and one bad line into no file at all."""

    path: str
    lines: Sequence[tuple[int, str]]

    def __len__(self) -> int:
        return len(self.lines)

    def row(self, index: int) -> Mapping[str, Any]:
        try:
            row = json.loads(self.lines[index][1], parse_float=WrittenFloat)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"is not JSON ({error}); mend or remove the line") from error
        if not isinstance(row, dict):
            raise BadRow("is not a JSON object; mend or remove the line")
        return row

    def place(self, index: int) -> str:
        return f"{self.path}, line {self.lines[index][0]}"


@dataclass(frozen=True)
class TableRows:
    """Rows of a Parquet or Arrow file, or of a dataset; counted from 0."""

    path: str
    table: pa.Table | Dataset

    def __len__(self) -> int:
        return len(self.table)

    def row(self, index: int) -> Mapping[str, Any]:
        if isinstance(self.table, pa.Table):
            return dict(self.table.slice(index, 1).to_pylist()[0])
        return dict(self.table[index])

    def place(self, index: int) -> str:
        return f"{self.path}, row {index}"


def read_rows(path: str, subset: str = "", split: str = "train") -> Rows:
    """The rows of a JSONL, Parquet or Arrow file; of a folder that ``datasets`` saved or can read; of a hub dataset.

    ``subset``, ``split``: of folders and hub datasets. Raises DataError.
    """
    file = Path(path)
    if file.is_file():
        return _file(file)
    if not file.is_dir() and (
        file.suffix in (*LINES, ".parquet", ".arrow") or not HUB_NAME.fullmatch(path)
    ):
        raise DataError(f"data file {path} does not exist; correct its path, or prepare the data")
    try:
        if (file / "state.json").exists() or (file / "dataset_dict.json").exists():
            found = load_from_disk(path)
            found = found[split] if isinstance(found, DatasetDict) else found
        else:
            found = load_dataset(path, subset or None, split=split)
    except Exception as error:  # datasets raises what its many readers raise
        kind = "folder" if file.is_dir() else "no file or folder, and as a dataset of the hub"
        raise DataError(
            f"{path}: {kind}: {type(error).__name__}: {error} (subset {subset!r}, split {split!r}); set them to what "
            "it has, or correct the path"
        ) from error
    return _not_empty(TableRows(f"{path}[{split}]", found), path)


def _file(file: Path) -> Rows:
    if file.suffix == ".parquet":
        return _not_empty(
            TableRows(str(file), _readable(file, lambda: pq.read_table(file))), str(file)
        )
    if file.suffix == ".arrow":
        return _not_empty(
            TableRows(str(file), _readable(file, lambda: read_arrow(file))), str(file)
        )
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} cannot be read as UTF-8 text: {error}; convert it") from error
    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return _not_empty(JsonLines(str(file), lines), str(file))


def read_arrow(file: Path) -> pa.Table:
    """A table from an Arrow file or stream, mapped, not copied. Raises pa.ArrowInvalid."""
    source = pa.memory_map(str(file))
    try:
        return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source).read_all()


def _readable(file: Path, read: Any) -> pa.Table:
    try:
        return read()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file} cannot be read ({error}); write it again") from error


def _not_empty(rows: Rows, path: str) -> Rows:
    if not len(rows):
        raise DataError(f"data file {path} is empty; it needs one problem a row")
    return rows


def value_at(row: Mapping[str, Any], key: str) -> Any:
    """Return the value at a key with dots: ``reward_model.ground_truth``, ``messages.-1.content``. Raises BadRow.

    A field whose name has the dots itself comes first.
    """
    if row.get(key) is not None:
        return row[key]
    value: Any = row
    for part in key.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list) and re.fullmatch(r"-?\d+", part):
            value = value[int(part)] if -len(value) <= int(part) < len(value) else None
        else:
            value = None
        if value is None:
            there = sorted(name for name in row if row[name] is not None)
            raise BadRow(
                f"no field {key!r} (it has {there}); name the right fields with data.prompt_key, answer_key"
            )
    return value


def as_text(value: Any, key: str) -> str:
    """A text or number as it is written; a list of one as that; other lists and objects as JSON. Raises BadRow."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    match value:
        case str():
            return value
        case bool():
            return str(value).lower()
        case WrittenFloat():
            return value.text
        case int() | float():
            return str(value)
        case list() | dict():
            return json.dumps(value, default=str)
    raise BadRow(f"field {key!r} is a {type(value).__name__}, neither text nor number")


def refuse_bad_rows(bad: Sequence[str], allowed: int, of: int) -> str:
    """A warning about rows that are skipped ("" for none). Raises DataError for more than ``allowed``."""
    if not bad:
        return ""
    listed = "\n  ".join(bad[:LISTED])
    more = f"\n  and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
    text = f"{len(bad)} of {of} rows cannot be used:\n  {listed}{more}"
    if len(bad) > allowed:
        raise DataError(
            f"{text}\nMend them, or raise data.max_bad_rows (now {allowed}) to skip them."
        )
    return f"{text}\nThey are skipped (data.max_bad_rows {allowed})."
