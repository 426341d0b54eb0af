"""Rows of every kind of file, nested keys, values as texts, and all that is wrong in one error."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from agpo_megatron.data.rows import BadRow, DataError, as_text, read_rows, refuse_bad_rows, value_at

ROWS = [{"q": "1+1", "a": {"gold": "2"}, "n": 1}, {"q": "2+2", "a": {"gold": "4"}, "n": 2}]


def lines(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "a.parquet")
    for name, writer in (("file", pa.ipc.new_file), ("stream", pa.ipc.new_stream)):
        with writer(str(tmp_path / f"{name}.arrow"), table.schema) as sink:
            sink.write_table(table)
    dataset = Dataset.from_list(ROWS)
    dataset.save_to_disk(str(tmp_path / "saved"))
    DatasetDict({"train": dataset.select([0]), "test": dataset}).save_to_disk(
        str(tmp_path / "splits")
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    pq.write_table(table.slice(0, 1), folder / "train-00000-of-00001.parquet")
    pq.write_table(table, folder / "test-00000-of-00001.parquet")
    found = [
        read_rows(lines(tmp_path / "a.jsonl", [ROWS[0], "", ROWS[1]])),
        read_rows(str(tmp_path / "a.parquet")),
        read_rows(str(tmp_path / "file.arrow")),
        read_rows(str(tmp_path / "stream.arrow")),
        read_rows(str(tmp_path / "saved")),
        read_rows(str(tmp_path / "splits"), split="test"),
        read_rows(str(folder), split="test"),
    ]
    assert [[rows.row(i) for i in range(len(rows))] for rows in found] == [ROWS] * len(found)
    assert found[0].place(1).endswith("a.jsonl, line 3")
    assert found[1].place(1).endswith("a.parquet, row 1")
    assert len(read_rows(str(folder))) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jsonl", "none.jsonl does not exist"),
        ("none.parquet", "none.parquet does not exist"),
        ("a b/c", "does not exist"),
        ("empty.jsonl", "is empty; it needs one problem a row"),
        ("broken.parquet", "cannot be read"),
        ("broken.arrow", "cannot be read"),
        ("latin.jsonl", "not be read as UTF-8|cannot be read as UTF-8"),
        ("emptyfolder", r"emptyfolder: folder: .*split 'train'"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    for broken in ("broken.parquet", "broken.arrow"):
        (tmp_path / broken).write_bytes(b"PAR1 nothing")
    (tmp_path / "latin.jsonl").write_bytes(b'{"q": "\xe9"}\n')
    (tmp_path / "emptyfolder").mkdir()
    with pytest.raises(DataError, match=message):
        read_rows(str(tmp_path / name))


def test_a_name_that_is_neither_file_nor_dataset_says_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError,
        match=r"nobody/nothing: no file or folder, and as a dataset of the hub: .*subset ''",
    ):
        read_rows("nobody/nothing")


def test_nested_keys() -> None:
    row = {"a": {"b": [{"c": 1}, {"c": 2}]}, "x.y": 3, "x": {"y": 4}, "none": None}
    assert value_at(row, "a.b.0.c") == 1
    assert value_at(row, "a.b.-1.c") == 2
    assert value_at(row, "x.y") == 3
    for missing in ("a.b.2.c", "a.c", "none", "z", "a.b.c"):
        with pytest.raises(BadRow, match=rf"no field '{missing}' \(it has \['a', 'x', 'x.y'\]\)"):
            value_at(row, missing)


def test_values_are_texts_as_they_were_written(tmp_path: Path) -> None:
    text = '{"a": 4.50, "b": 12345678901234567890, "c": true, "d": ["2"], "e": ["2", "3"], "f": {"g": 1.0},'
    text += ' "h": "2020-01-02"}'
    row = read_rows(lines(tmp_path / "a.jsonl", [text])).row(0)
    assert {key: as_text(row[key], key) for key in row} == {
        "a": "4.50",
        "b": "12345678901234567890",
        "c": "true",
        "d": "2",
        "e": '["2", "3"]',
        "f": '{"g": 1.0}',
        "h": "2020-01-02",
    }
    assert row["a"] == 4.5
    with pytest.raises(BadRow, match="field 'x' is a bytes, neither text nor number"):
        as_text(b"2", "x")


def test_bad_lines_are_bad_rows(tmp_path: Path) -> None:
    rows = read_rows(lines(tmp_path / "a.jsonl", ["oops", "[1]", "[" * 100000]))
    for index, message in enumerate(("is not JSON", "not a JSON object", "is not JSON")):
        with pytest.raises(BadRow, match=message):
            rows.row(index)


def test_all_bad_rows_stand_in_one_error_or_are_skipped_under_a_limit() -> None:
    bad = [f"line {i}: wrong" for i in range(25)]
    with pytest.raises(DataError) as refused:
        refuse_bad_rows(bad, 24, 100)
    text = str(refused.value)
    assert text.startswith("25 of 100 rows cannot be used:\n  line 0: wrong")
    assert "line 19: wrong\n  and 5 more\n" in text and "line 20" not in text
    assert "max_bad_rows (now 24)" in text
    assert "They are skipped (data.max_bad_rows 25)" in refuse_bad_rows(bad, 25, 100)
    assert refuse_bad_rows([], 0, 100) == ""
