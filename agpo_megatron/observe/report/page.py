"""Puts a report together: one HTML file that needs no network, in which no text of a run is ever markup.

What comes from the run is JSON in the page, and the page's own script writes it as text. The page forbids itself to
load anything (Content-Security-Policy).
"""

from __future__ import annotations

import html
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.data.tokenizer import load_tokenizer
from agpo_megatron.files import write_durably
from agpo_megatron.journal import JournalReader
from agpo_megatron.observe.curves import Steps
from agpo_megatron.observe.metrics import read_metrics
from agpo_megatron.observe.report.charts import (
    Chart,
    curves,
    distribution,
    events_chart,
    idle,
    mark_attempts,
    time_split,
)
from agpo_megatron.observe.report.facts import Facts, evaluations, facts
from agpo_megatron.observe.report.faults import Attempt, Event, Launch, attempts
from agpo_megatron.observe.report.selection import Pieces, choose, show, token_pieces
from agpo_megatron.observe.report.sweep import Swept, sweep
from agpo_megatron.observe.timeline import share_of, spans, usage

EVENTS_SHOWN = 300
"""Rows in the table of events, the newest."""
_HERE = Path(__file__).parent


def make_report(run: RunFolder, launches: Sequence[Launch], out: Path | None = None) -> Path:
    """Write the report of a run, finished or not, to ``out`` (default: report.html in its folder); return the path.

    ``launches``: of ``cluster.history``. Raises ConfigError for a folder that holds no run, ValueError for a damaged
    line of metrics.
    """
    metrics = read_metrics(run.path)
    head = facts(run, launches, max((int(row["step"]) for row in metrics), default=0))
    reader = JournalReader(run.journal) if run.journal.is_dir() else None
    swept = sweep(reader) if reader else Swept()
    began = attempts(reader, launches) if reader else []
    events = sorted((e for launch in launches for e in launch.events), key=lambda e: e.time)
    groups, missing = _charts(run, metrics, swept, began, events)
    chosen = choose(swept)
    pieces = _pieces(run, head) if chosen else None
    samples = list(show(reader, swept, chosen, pieces)) if reader else []
    data = {
        "facts": asdict(head),
        "made": time.strftime("%Y-%m-%d %H:%M:%S"),
        "cards": _cards(metrics, swept, began, events),
        "charts": {c.name: json.loads(c.figure.to_json()) for g in groups.values() for c in g},
        "attempts": [asdict(attempt) for attempt in began],
        "events": [asdict(event) for event in events[-EVENTS_SHOWN:]],
        "events_left_out": max(0, len(events) - EVENTS_SHOWN),
        "samples": samples,
        "selection": _selection(swept, samples, pieces),
    }
    path = out or run.path / "report.html"
    write_durably(path, _page(head, data, groups, missing).encode())
    return path


def _charts(
    run: RunFolder,
    metrics: Steps,
    swept: Swept,
    began: Sequence[Attempt],
    events: Sequence[Event],
) -> tuple[dict[str, list[Chart]], list[str]]:
    """Return the charts of each section of the page, and the titles of the curves that the run has not recorded."""
    drawn, missing = curves(metrics, swept.batches, evaluations(run))
    times = [c for c in (time_split(metrics), idle(metrics)) if c]
    shapes = [
        distribution(swept.batches, "length", "Response lengths", "tokens"),
        distribution(swept.batches, "reward", "Rewards", "reward"),
    ]
    groups = {"curves": drawn, "time": times, "distributions": [c for c in shapes if c]}
    mark_attempts([chart for charts in groups.values() for chart in charts], began)
    faults = events_chart(events, began)
    return {**groups, "faults": [faults] if faults else []}, missing


def _cards(
    metrics: Steps, swept: Swept, began: Sequence[Attempt], events: Sequence[Event]
) -> list[dict[str, str]]:
    """Return the large numbers at the top of the page: label and value."""
    last = {key: value for row in metrics for key, value in row.items()}
    found = spans(metrics)
    slots = usage(metrics)
    seconds = sum(used.seconds for used in slots)
    cards: list[tuple[str, float | None, str]] = [
        ("accuracy, last step", last.get("reward/accuracy"), ".1%"),
        ("reward, last step", last.get("reward/mean"), ".3f"),
        ("response tokens, last step", last.get("response/tokens_mean"), ".1f"),
        ("seconds a step", sum(s.seconds for s in found) / len(metrics) if found else None, ".1f"),
        (
            "trainer busy",
            share_of(found, "trains") + share_of(found, "scores") if found else None,
            ".0%",
        ),
        (
            "slots of servers used",
            sum(used.seconds * used.share for used in slots) / seconds if seconds else None,
            ".0%",
        ),
        ("samples in the journal", float(swept.samples) if swept.samples else None, ",.0f"),
        ("attempts", float(len(began)) if began else None, ".0f"),
        (
            "roles that ended early",
            float(sum(e.kind in ("killed", "exited") for e in events)),
            ".0f",
        ),
    ]
    return [
        {"label": label, "value": format(value, form)}
        for label, value, form in cards
        if value is not None and value == value
    ]


def _pieces(run: RunFolder, head: Facts) -> Pieces | None:
    """Find the model's tokenizer: in the exported model, or where the run began; None without one."""
    for folder in filter(None, (str(run.exported_model), head.model)):
        try:
            return token_pieces(load_tokenizer(folder))
        except (OSError, ValueError):  # no such folder, or no tokenizer that this machine can load
            continue
    return None


def _selection(swept: Swept, samples: Sequence[Mapping[str, Any]], pieces: Pieces | None) -> str:
    """Say in a sentence or three what the viewer shows and what it lacks."""
    if not samples:
        return "The journal of this folder has no sample of a committed batch."
    scored = any(sample["scored"] for sample in samples)
    text = (
        f"{len(samples)} of {swept.samples:,} samples: groups of the newest batch, and groups of batches evenly over "
        "the run"
    )
    if scored:
        text += "; and those with the largest differences of a token's log-prob between server and trainer."
    else:
        text += (
            ". The journal has no log-probs of the trainer for them, because nothing that the loss needed was scored "
            "before the update: differences by token are not known (the metrics have their mean and maximum)."
        )
    if pieces is None:
        text += " There is no tokenizer in hf/ or model.path: tokens are shown as numbers."
    if swept.unreadable:
        text += f" {swept.unreadable} records could not be read ({swept.reason})"
    return text


def _page(
    head: Facts,
    data: Mapping[str, Any],
    groups: Mapping[str, Sequence[Chart]],
    missing: Sequence[str],
) -> str:
    parts = {
        "TITLE": html.escape(f"{head.name}: report"),
        "STYLE": (_HERE / "page.css").read_text(),
        "PLOTLY": get_plotlyjs(),
        "SCRIPT": (_HERE / "page.js").read_text(),
        "DATA": script_json(data),
        "MISSING": html.escape(f"Not recorded by this run: {', '.join(missing)}." * bool(missing)),
        **{name.upper(): _figures(charts) for name, charts in groups.items()},
    }
    template = (_HERE / "page.html").read_text()
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _figures(charts: Sequence[Chart]) -> str:
    return "\n".join(
        f'<figure class="card"><h3>{html.escape(chart.title)}</h3>'
        f"<p>{html.escape(chart.note)}</p>"
        f'<div class="chart" data-chart="{html.escape(chart.name)}"></div></figure>'
        for chart in charts
    )


def script_json(value: Any) -> str:
    """Encode a value as JSON that may stand in a script element: no text in it can end the element or open another."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text
