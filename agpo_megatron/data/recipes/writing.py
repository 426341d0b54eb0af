"""Files that appear complete or not at all, and a note beside them of what they were made from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from agpo_megatron.config.schema import Config
from agpo_megatron.data.problems import DataError
from agpo_megatron.files import write_durably

NOTE = "prepared.json"


def needs_data(config: Config, made_from: Mapping[str, Any]) -> bool:
    """Return whether the recipe's data files are still to be written.

    ``made_from``: what the content depends on. Raises DataError when the folder of ``data.path`` was prepared from
    something else: training on a stale task would not be noticed.
    """
    note = Path(config.data.path).parent / NOTE
    if not note.exists():
        return True
    before = json.loads(note.read_text())
    changed = [k for k in {**before, **made_from} if before.get(k) != made_from.get(k)]
    if changed:
        was = ", ".join(f"{k} {before.get(k)!r} (now {made_from.get(k)!r})" for k in changed)
        raise DataError(
            f"{note.parent} was prepared with {was}; use another --run-dir, or remove that folder"
        )
    return False


def data_is_complete(config: Config, made_from: Mapping[str, Any]) -> None:
    """Leave the note that ``needs_data`` reads. Call it after every file is written."""
    write_text(Path(config.data.path).parent / NOTE, json.dumps(made_from, indent=1) + "\n")


def write_jsonl(path: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    write_text(Path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, text.encode())
