"""Which stages have run on which GPU: the table in README.md and docs/gpu.md, from docs/gpu_report.json.

    bash tests/gpu/run.sh --out gpu_report && cp gpu_report/gpu_report.json docs/ && python3 tests/gpu/status.py

Without that file none has. A test compares the pages with it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from kit import STAGES

REPO = Path(__file__).parents[2]
REPORT = REPO / "docs" / "gpu_report.json"
PAGES = (REPO / "README.md", REPO / "docs" / "gpu.md")
BEGIN, END = "<!-- from tests/gpu/status.py -->", "<!-- end -->"


def table(report: dict[str, Any] | None) -> str:
    """One row per stage. What was not run on a GPU has not run: a report of a CPU counts for nothing."""
    ran: dict[str, str] = {}
    if report is not None and report["device"] == "cuda":
        gpus = report["machine"]["gpus"]
        where = f"{len(gpus)} x {gpus[0][0]}, {report['date']}" if gpus else ""
        for s in report["stages"]:
            if s["status"] != "skipped":
                why = f" ({s['reason']})" if s["reason"] else ""
                ran[s["stage"]] = f"{s['status']}{why}: {where}"
    lines = [BEGIN, "| GPU stage (`tests/gpu/run.sh`) | run |", "|---|---|"]
    lines += [f"| {s.key}: {s.title} | {ran.get(s.key, 'never')} |" for s in STAGES]
    return "\n".join([*lines, END])


def with_table(page: str, content: str) -> str:
    """``page`` with the block between the markers replaced. Raises ValueError where there are none."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no block between {BEGIN} and {END}")
    return before + content + after


def committed() -> dict[str, Any] | None:
    report: dict[str, Any] | None = json.loads(REPORT.read_text()) if REPORT.exists() else None
    return report


def main() -> None:
    for page in PAGES:
        page.write_text(with_table(page.read_text(), table(committed())))


if __name__ == "__main__":
    main()
