"""summary.json: held-out accuracy and response tokens before and after training, and its table for the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from agpo_megatron.files import write_durably

HELD_OUT_KEYS = ("accuracy", "tokens_mean", "tokens_correct_mean")


def summary_path(run_dir: str | Path) -> Path:
    return Path(run_dir) / "summary.json"


def write_summary(
    run_dir: str | Path,
    before: Mapping[str, float] | None,
    after: Mapping[str, float] | None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``{"before": {accuracy, tokens_mean, tokens_correct_mean}, "after": {...}, **extra}`` atomically.

    ``accuracy`` is a fraction, ``tokens_*`` are mean response tokens per held-out problem; a value that is not finite
    (no right answer has no length) becomes null. A side that was not evaluated is left out. Raises ValueError when
    the keys of a side are not exactly those three, or ``extra`` would replace a side.
    """
    summary: dict[str, Any] = {}
    for side, values in (("before", before), ("after", after)):
        if values is None:
            continue
        if set(values) != set(HELD_OUT_KEYS):
            raise ValueError(f"summary: {side} needs {HELD_OUT_KEYS}, not {tuple(values)}")
        summary[side] = {key: _jsonable(float(values[key])) for key in HELD_OUT_KEYS}
    for key, value in (extra or {}).items():
        if key in ("before", "after"):
            raise ValueError(f"summary: extra must not hold {key!r}")
        summary[key] = _jsonable(value)
    path = summary_path(run_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(summary, indent=2, allow_nan=False, default=str) + "\n"
    write_durably(path, text.encode())
    return path


def read_summary(run_dir: str | Path) -> dict[str, Any]:
    """Read the summary as it was written. Raises FileNotFoundError when the run has none yet."""
    summary: dict[str, Any] = json.loads(summary_path(run_dir).read_text(encoding="utf-8"))
    return summary


def summary_table(summary: Mapping[str, Any], title: str = "held-out") -> Table:
    """Build the table of before, after and change; accuracy in points, tokens in percent."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for head in ("before", "after", "change"):
        table.add_column(head, justify="right")
    before, after = summary.get("before", {}), summary.get("after", {})
    for key, label in zip(
        HELD_OUT_KEYS, ("accuracy", "response tokens", "tokens of right answers"), strict=True
    ):
        a, b = before.get(key), after.get(key)
        if key == "accuracy":
            change = f"{100 * (b - a):+.1f} points" if None not in (a, b) else "-"
            table.add_row(label, _cell(a, ".1%"), _cell(b, ".1%"), change)
        else:
            change = f"{100 * (b / a - 1):+.1f} %" if a and b is not None else "-"
            table.add_row(label, _cell(a, ".1f"), _cell(b, ".1f"), change)
    return table


def render_summary(run_dir: str | Path, console: Console | None = None) -> None:
    """Show the table of a run's summary, if it has one."""
    if summary_path(run_dir).exists():
        console = console or Console()
        console.print(summary_table(read_summary(run_dir)))
        console.print(f"run folder: {run_dir}", highlight=False, markup=False, soft_wrap=True)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _jsonable(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not know, by null, at any depth."""
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
