"""The picture of a run: six curves over the steps, as a PNG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _GREEN, _PURPLE, _INK, _GRID = (
    "#2f6fb3",
    "#d9822b",
    "#3a9a6b",
    "#7d5ba6",
    "#2b2f36",
    "#e6e8ec",
)
_STYLE: Any = {
    "font.size": 10,
    "axes.edgecolor": "#b8bdc6",
    "axes.labelcolor": _INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "xtick.color": "#5b616c",
    "ytick.color": "#5b616c",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
}
Rows = Sequence[Mapping[str, float]]


def draw_curves(
    metrics: Rows,
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
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(12, 6.6), dpi=120, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold", color=_INK)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr, call-arg]
        panels: list[Callable[[Axes, Rows], None]] = [
            _accuracy,
            _tokens_correct,
            _tokens,
            _clip_gate,
            _entropy,
            _logprob_diff,
        ]
        for axes, draw in zip(figure.subplots(2, 3).flat, panels, strict=True):
            draw(axes, metrics)
            axes.margins(x=0.02)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_xlabel("step", fontsize=9)
        _held_out(figure.axes, metrics, summary or {})
        figure.savefig(path)


def _series(metrics: Rows, key: str) -> tuple[list[float], list[float]]:
    pairs = [(row["step"], row[key]) for row in metrics if key in row and math.isfinite(row[key])]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _curve(axes: Axes, metrics: Rows, key: str, color: str, label: str) -> bool:
    """The value of each step, thin, and its centred mean, bold. False when there is none."""
    steps, values = _series(metrics, key)
    if not values:
        return False
    smooth = _running_mean(values)
    marker = "o" if len(values) == 1 else None
    axes.plot(steps, values, color=color, alpha=0.3, linewidth=1.0, marker=marker)
    axes.plot(steps, smooth, color=color, label=label)
    return True


def _running_mean(values: Sequence[float]) -> list[float]:
    """Centred mean over about a tenth of the run: it lags behind nothing."""
    reach = len(values) // 20
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _empty(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=axes.transAxes)
    axes.set_yticks([])


def _accuracy(axes: Axes, metrics: Rows) -> None:
    axes.set_title("Accuracy")
    if not _curve(axes, metrics, "reward/accuracy", _BLUE, "training samples"):
        return _empty(axes)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    axes.legend(loc="lower right")
    return None


def _tokens_correct(axes: Axes, metrics: Rows) -> None:
    axes.set_title("Response tokens of right answers")
    if not _curve(axes, metrics, "response/tokens_correct_mean", _GREEN, "training samples"):
        return _empty(axes)
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower left")
    return None


def _tokens(axes: Axes, metrics: Rows) -> None:
    axes.set_title("Response tokens")
    if not _curve(axes, metrics, "response/tokens_mean", _ORANGE, "training samples"):
        return _empty(axes)
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower left")
    return None


def _clip_gate(axes: Axes, metrics: Rows) -> None:
    """The loss before the clip, coloured by what the gate did with it."""
    steps, values = _series(metrics, "loss/unclipped")
    gates = {row["step"]: row.get("loss/clip_gate", 1.0) for row in metrics}
    closed = [gates[step] == 0 for step in steps]
    share = f" ({sum(closed) / len(closed):.0%} of steps closed)" if closed else ""
    axes.set_title(f"Loss and clip gate{share}")
    if not values:
        return _empty(axes)
    for state, color, label in ((False, _BLUE, "gate open"), (True, _ORANGE, "gate closed")):
        points = [(s, v) for s, v, c in zip(steps, values, closed, strict=True) if c is state]
        if points:
            x, y = zip(*points, strict=True)
            axes.vlines(x, 0, y, color=color, alpha=0.45, linewidth=1.2)
            axes.scatter(x, y, s=16, color=color, label=label, zorder=3)
    axes.axhline(0, color="#8a909b", linewidth=1)
    axes.margins(y=0.2)  # room for the legend
    axes.legend(loc="best", ncols=2)
    return None


def _entropy(axes: Axes, metrics: Rows) -> None:
    axes.set_title("Policy entropy (nats per token)")
    if not _curve(axes, metrics, "policy/entropy", _PURPLE, "entropy"):
        return _empty(axes)
    axes.set_ylim(bottom=0)
    return None


def _logprob_diff(axes: Axes, metrics: Rows) -> None:
    axes.set_title("|Δ log-prob|, rollout server and trainer")
    drawn: list[float] = []
    for key, color, label in (
        ("rollout/logprob_abs_diff_max", _ORANGE, "max"),
        ("rollout/logprob_abs_diff_mean", _BLUE, "mean"),
    ):
        steps, values = _series(metrics, key)
        if values:
            drawn += values
            axes.plot(steps, values, color=color, label=label, linewidth=1.6)
    if not drawn:
        return _empty(axes)
    axes.set_yscale("symlog" if min(drawn) <= 0 else "log")
    axes.legend(loc="best", ncols=2)
    return None


def _held_out(panels: Sequence[Axes], metrics: Rows, summary: Mapping[str, Any]) -> None:
    first, last = metrics[0]["step"] - 1, metrics[-1]["step"]
    keys = ("accuracy", "tokens_correct_mean", "tokens_mean")
    for axes, key in zip(panels, keys, strict=False):
        points = [
            (step, value)
            for step, side in ((first, "before"), (last, "after"))
            if (value := summary.get(side, {}).get(key)) is not None
        ]
        if points:
            x, y = zip(*points, strict=True)
            if key != "accuracy":
                axes.set_ylim(0, max(axes.get_ylim()[1], 1.08 * max(y)))
            axes.scatter(
                x,
                y,
                marker="D",
                s=44,
                color=_INK,
                zorder=4,
                label="held-out, greedy",
                clip_on=False,
            )
            axes.legend(loc="best")
