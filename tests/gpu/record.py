"""What a stage leaves: checks that hold or do not, and figures, written as they come, so that a stage that is stopped
by its time limit has told what it knew."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Entry:
    """``kind`` "check": ``ok`` says whether it held. "figure": a ``value`` in ``unit``; ``ok``: whether it meets its
    target, None without one. "part": something of the stage that was left out or chosen, and why."""

    kind: str
    name: str
    value: float | None = None
    unit: str = ""
    ok: bool | None = None
    detail: str = ""


@dataclass
class Record:
    """Entries of one stage; ``path`` takes them as JSON after each."""

    path: Path
    entries: list[Entry] = field(default_factory=list)

    def check(self, name: str, ok: bool, detail: str = "") -> None:
        self._add(Entry("check", name, ok=bool(ok), detail=detail))

    def close(self, name: str, found: float, limit: float) -> None:
        """A check that an error stays within ``limit`` (false for NaN)."""
        self.check(name, found <= limit, f"{found:.2e}, allowed {limit:.0e}")

    def figure(self, name: str, value: float, unit: str = "", *, most: float | None = None) -> None:
        """A measured number; ``most``: the target that it must not exceed."""
        ok = None if most is None else value <= most
        detail = "" if most is None else f"target: at most {most:g}"
        self._add(Entry("figure", name, value, unit, ok, detail))

    def at_least(self, name: str, value: float, least: float, unit: str = "") -> None:
        self._add(Entry("figure", name, value, unit, value >= least, f"target: at least {least:g}"))

    def skip(self, name: str, why: str) -> None:
        self._add(Entry("part", name, detail=why))

    def _add(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.path.write_text(json.dumps([asdict(e) for e in self.entries], indent=1))


def load(path: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return entries


def median_seconds(work: Callable[[], Any], wait: Callable[[], Any], repeats: int = 5) -> float:
    """Of ``work``, after one run that does not count; ``wait`` returns when the device has finished."""
    work(), wait()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work(), wait()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
