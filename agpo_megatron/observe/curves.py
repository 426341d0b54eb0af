"""The picture of a run: six curves over the steps, as a PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _GREEN, _PURPLE, _INK = "#2f6fb3", "#d9822b", "#3a9a6b", "#7d5ba6", "#2b2f36"
_STYLE: Any = [
    "seaborn-v0_8-whitegrid",
    {"axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlesize": 10.5},
]
Steps = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Panel:
    """One metric over the steps. ``held_out``: the key of summary.json that belongs beside it."""

    title: str
    metric: str
    color: str
    held_out: str = ""


CURVES = (
    Panel("Accuracy", "reward/accuracy", _BLUE, "accuracy"),
    Panel(
        "Response tokens of right answers",
        "response/tokens_correct_mean",
        _GREEN,
        "tokens_correct_mean",
    ),
    Panel("Response tokens", "response/tokens_mean", _ORANGE, "tokens_mean"),
    Panel("Policy entropy (nats per token)", "policy/entropy", _PURPLE),
)


def draw_curves(
    metrics: Steps,
    path: str | Path,
    title: str,
    summary: Mapping[str, Any] | None = None,
) -> None:
    """Draw accuracy, tokens of right answers, response tokens, clip gate, entropy and log-prob difference.

    ``metrics``: rows of ``read_metrics``; a panel whose keys no row has says so. ``summary``: as in summary.json; its
    held-out numbers appear as diamonds at both ends. Raises ValueError when there is no row.
    """
    if not metrics:
        raise ValueError(f"no steps to draw for {path}")
    # The object interface with the Agg canvas: no display, no global state, any thread.
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context(_STYLE):
        figure = Figure(figsize=(12, 6.6), dpi=120, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold", color=_INK)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr, call-arg]
        panels = list(figure.subplots(2, 3).flat)
        for axes, panel in zip([*panels[:3], panels[4]], CURVES, strict=True):
            _curve(axes, metrics, panel, summary or {})
        _clip_gate(panels[3], metrics)
        _logprob_diff(panels[5], metrics)
        for axes in panels:
            axes.margins(x=0.02)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_xlabel("step", fontsize=9)
            if not axes.has_data():
                axes.text(
                    0.5, 0.5, "not recorded", ha="center", va="center", transform=axes.transAxes
                )
                axes.set_yticks([])
            elif axes.get_legend_handles_labels()[0]:
                axes.legend(loc="best")
        figure.savefig(path)


def _series(metrics: Steps, key: str) -> tuple[list[float], list[float]]:
    pairs = [(row["step"], row[key]) for row in metrics if key in row and math.isfinite(row[key])]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _curve(axes: Axes, metrics: Steps, panel: Panel, summary: Mapping[str, Any]) -> None:
    """Draw the value of each step, thin, its centred mean, bold, and held-out numbers as diamonds."""
    axes.set_title(panel.title)
    steps, values = _series(metrics, panel.metric)
    if values:
        marker = "o" if len(values) == 1 else None
        axes.plot(steps, values, color=panel.color, alpha=0.3, linewidth=1.0, marker=marker)
        axes.plot(steps, _running_mean(values), color=panel.color, label="training")
    ends = {metrics[0]["step"] - 1: "before", metrics[-1]["step"]: "after"}
    held_out = {step: summary.get(side, {}).get(panel.held_out) for step, side in ends.items()}
    points = {step: value for step, value in held_out.items() if value is not None}
    if points:
        look: Any = {"marker": "D", "s": 44, "color": _INK, "zorder": 4, "clip_on": False}
        axes.scatter(list(points), list(points.values()), label="held-out", **look)
    if panel.held_out == "accuracy":
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    elif values or points:
        axes.set_ylim(bottom=0)


def _running_mean(values: Sequence[float]) -> list[float]:
    """Average each value with its neighbours, about a tenth of the run: centred, so it lags behind nothing."""
    reach = len(values) // 20
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _clip_gate(axes: Axes, metrics: Steps) -> None:
    """Draw the loss before the clip, coloured by what the gate did with it; without a clip there is nothing to say."""
    steps, values = _series(metrics, "loss/unclipped")
    gates = {row["step"]: row["loss/clip_gate"] for row in metrics if "loss/clip_gate" in row}
    closed = [gates.get(step) == 0 for step in steps]
    share = f" and clip gate ({sum(closed) / len(closed):.0%} of steps closed)" if gates else ""
    axes.set_title(f"Loss{share}")
    for state, color, label in ((False, _BLUE, "gate open"), (True, _ORANGE, "gate closed")):
        points = [(s, v) for s, v, c in zip(steps, values, closed, strict=True) if c is state]
        if points:
            x, y = zip(*points, strict=True)
            axes.vlines(x, 0, y, color=color, alpha=0.45, linewidth=1.2)
            axes.scatter(x, y, s=16, color=color, label=label if gates else None, zorder=3)
    if values:
        axes.axhline(0, color="#8a909b", linewidth=1)
        axes.margins(y=0.2)  # room for the legend


def _logprob_diff(axes: Axes, metrics: Steps) -> None:
    axes.set_title("|Δ log-prob|, rollout server and trainer")
    drawn: list[float] = []
    for kind, color in (("max", _ORANGE), ("mean", _BLUE)):
        steps, values = _series(metrics, f"rollout/logprob_abs_diff_{kind}")
        if values:
            drawn += values
            axes.plot(steps, values, color=color, label=kind, linewidth=1.6)
    if drawn:
        axes.set_yscale("symlog" if min(drawn) <= 0 else "log")
