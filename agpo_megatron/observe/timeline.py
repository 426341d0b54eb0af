"""The picture of where the time of a run went: what the trainer did, and how full the servers were, on one clock.

The clock is that of the steps, one after the other: saves, evaluations between steps and the time between two starts
are not on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agpo_megatron.observe.curves import Steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK = "#2b2f36"
PHASES = {
    "publishes": ("time/publish", "#d9822b"),
    "waits for groups": ("time/rollout", "#c9ced6"),
    "scores": ("time/score", "#7d5ba6"),
    "decides, commits": ("", "#8a6d3b"),
    "trains": ("time/update", "#2f6fb3"),
}
"""Phases of a step in their order: the metric with their seconds, and their colour. The one without a metric is what is
left of the step."""
_SLOTS = "#3a9a6b"
SHOWN = 40
"""Steps in a picture, the last ones: more are no longer told apart."""


@dataclass(frozen=True)
class Span:
    """``start`` and ``seconds`` on the clock of the steps."""

    step: int
    phase: str
    start: float
    seconds: float


@dataclass(frozen=True)
class Usage:
    """Share of the servers' slots in use, mean over a time: between the moments at which two batches were complete."""

    start: float
    seconds: float
    share: float


def spans(metrics: Steps) -> list[Span]:
    """The trainer's work, one span after the other. Phases without a recorded time are left out."""
    found: list[Span] = []
    clock = 0.0
    for row in metrics:
        for phase, seconds in _phases(row).items():
            if seconds:
                found.append(Span(int(row["step"]), phase, clock, seconds))
            clock += seconds
    return found


def usage(metrics: Steps) -> list[Usage]:
    """The load of the servers, as far as it was recorded."""
    found: list[Usage] = []
    clock, before = 0.0, None
    for row in metrics:
        phases = _phases(row)
        begun = clock + phases["publishes"]
        clock += sum(phases.values())
        if "time/rollout" not in row:  # a later update of the batch
            continue
        complete = begun + phases["waits for groups"]
        start = begun if before is None else before  # a run counts from its first wait on
        share = row.get("rollout/slots_used_frac", math.nan)
        if math.isfinite(share):
            found.append(Usage(start, complete - start, share))
        before = complete
    return found


def _phases(row: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each phase of a step, in order."""
    seconds = {phase: _seconds(row, key) if key else 0.0 for phase, (key, _) in PHASES.items()}
    rest = _seconds(row, "time/step") - sum(seconds.values())
    return seconds | {"decides, commits": max(0.0, rest)}


def share_of(found: Sequence[Span], phase: str) -> float:
    """Part of all the time that a phase took."""
    whole = sum(span.seconds for span in found)
    return sum(span.seconds for span in found if span.phase == phase) / whole if whole else 0.0


def draw_timeline(runs: Mapping[str, Steps], path: str | Path) -> None:
    """Draw runs, by title, above each other on one scale: rows of ``read_metrics``, of which the last ``SHOWN`` count.

    Raises ValueError for a run without the time of any step.
    """
    shown = {title: rows[-SHOWN:] for title, rows in runs.items()}
    if empty := [title for title, rows in shown.items() if not spans(rows)]:
        raise ValueError(f"no steps to draw for {path}: {empty[0]} has recorded the time of none")
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    look: Any = ["seaborn-v0_8-whitegrid", {"axes.grid.axis": "x"}]
    with style.context(look):
        size = (12, 0.9 + 2.5 * len(shown))
        figure = Figure(figsize=size, dpi=110, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        panels = figure.subplots(
            2 * len(shown), 1, sharex=True, squeeze=False, height_ratios=[2, 1.6] * len(shown)
        )[:, 0]
        for i, (title, rows) in enumerate(shown.items()):
            _trainer(panels[2 * i], title, rows)
            _servers(panels[2 * i + 1], rows)
        panels[-1].set_xlabel("seconds of the steps (saves and evaluations between them left out)")
        panels[-1].set_xlim(left=0)
        drawn = {span.phase for rows in shown.values() for span in spans(rows)}
        handles = [Patch(color=c, label=p) for p, (_, c) in PHASES.items() if p in drawn]
        handles.append(Patch(color=_SLOTS, alpha=0.55, label="slots of the servers in use"))
        figure.legend(handles=handles, loc="outside upper left", ncols=6, frameon=False)
        figure.savefig(path)


def _trainer(axes: Axes, title: str, rows: Steps) -> None:
    found = spans(rows)
    for phase, (_, color) in PHASES.items():
        bars = [(span.start, span.seconds) for span in found if span.phase == phase]
        axes.broken_barh(bars, (0, 1), color=color, linewidth=0)
    ends = {span.step: span.start + span.seconds for span in found}
    whole = max(ends.values())
    start = 0.0
    for step, end in ends.items():
        axes.axvline(end, color="white", linewidth=1.5)
        if end - start > whole / 60:
            middle = (start + end) / 2
            axes.text(middle, 1.04, str(step), ha="center", va="bottom", fontsize=8, color=_INK)
        start = end
    busy = share_of(found, "trains") + share_of(found, "scores")
    axes.set_title(
        f"{title}: {whole / len(ends):.1f} s a step, the trainer is busy {busy:.0%} of the time",
        loc="left",
        fontsize=11,
        fontweight="bold",
        color=_INK,
        pad=18,
    )
    axes.set_ylim(0, 1)
    axes.set_yticks([0.5], ["trainer"])
    axes.set_xmargin(0.01)


def _servers(axes: Axes, rows: Steps) -> None:
    found = usage(rows)
    for used in found:
        axes.fill_between(
            [used.start, used.start + used.seconds],
            used.share,
            color=_SLOTS,
            alpha=0.55,
            linewidth=0,
        )
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    axes.set_ylabel("slots", fontsize=9)
    if not found:
        axes.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=axes.transAxes)


def _seconds(row: Mapping[str, float], key: str) -> float:
    value = row.get(key, 0.0)
    return value if math.isfinite(value) else 0.0
