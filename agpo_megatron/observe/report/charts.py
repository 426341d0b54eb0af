"""The charts of a report, as plotly figures over the optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from agpo_megatron.observe.curves import Steps
from agpo_megatron.observe.report.faults import Attempt, Event
from agpo_megatron.observe.report.sweep import SweptBatch
from agpo_megatron.observe.timeline import PHASES, spans
from agpo_megatron.samples import Array

BLUE, ORANGE, GREEN, PURPLE, RED, GREY, INK = (
    "#2f6fb3",
    "#d9822b",
    "#3a9a6b",
    "#7d5ba6",
    "#c0453d",
    "#8a909b",
    "#2b2f36",
)
COLUMNS_SHOWN, BINS = 300, 40
"""Columns of a heat map and bars of the time chart, at most: a longer run has several steps in each."""
EVENT_COLORS = {
    "start": BLUE,
    "end": GREY,
    "killed": RED,
    "exited": ORANGE,
    "hung": ORANGE,
    "server lost": RED,
    "server quarantined": PURPLE,
}
LAYOUT: dict[str, Any] = {
    "template": "none",
    "font": {"family": "Inter, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif", "size": 12},
    "margin": {"l": 54, "r": 14, "t": 8, "b": 34},
    "height": 230,
    "hovermode": "x unified",
    "hoverlabel": {"font": {"size": 11}},
    "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 11}},
    "xaxis": {"title": {"text": "step", "font": {"size": 11}, "standoff": 4}, "zeroline": False},
    "yaxis": {"zeroline": False, "automargin": True},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
}
GRID = {"gridcolor": "#e6e9ee", "linecolor": "#c9ced6", "tickcolor": "#c9ced6", "ticks": "outside"}


@dataclass(frozen=True, eq=False)
class Chart:
    """A figure with its place on the page. ``name``: its key; ``note``: what to know to read it."""

    name: str
    title: str
    note: str
    figure: go.Figure


@dataclass(frozen=True)
class Curve:
    """Metrics in one chart: (metric, name in the legend, colour)."""

    name: str
    title: str
    note: str
    metrics: tuple[tuple[str, str, str], ...]
    log: bool = False
    percent: bool = False


CURVES = (
    Curve(
        "reward",
        "Reward",
        "Mean of the batch, length reward included; bands: 10th to 90th percentile over samples, and over the means of "
        "groups.",
        (("reward/mean", "mean", BLUE),),
    ),
    Curve(
        "accuracy",
        "Accuracy",
        "Share of samples that are right; diamonds: evaluations, with their 95 % interval.",
        (("reward/accuracy", "training", BLUE),),
        percent=True,
    ),
    Curve(
        "tokens",
        "Response tokens",
        "Bands: 10th to 90th and 25th to 75th percentile over samples; diamonds: evaluations.",
        (
            ("response/tokens_mean", "mean", ORANGE),
            ("response/tokens_correct_mean", "mean of right answers", GREEN),
        ),
    ),
    Curve(
        "entropy",
        "Policy entropy",
        "Nats, mean over trained tokens.",
        (("policy/entropy", "entropy", PURPLE),),
    ),
    Curve(
        "groups",
        "Groups without a signal",
        "Share of groups whose rewards are all equal, whose answers are all right, all wrong.",
        (
            ("group/zero_variance_frac", "no variance", BLUE),
            ("group/all_correct_frac", "all right", GREEN),
            ("group/all_wrong_frac", "all wrong", RED),
        ),
        percent=True,
    ),
    Curve(
        "loss",
        "Loss",
        "Before and after the adaptive clip.",
        (("loss/unclipped", "before the clip", GREY), ("loss/policy", "policy loss", BLUE)),
    ),
    Curve(
        "grad_norm",
        "Gradient norm",
        "Before clipping; 0 where the gate was closed.",
        (("grad_norm", "gradient norm", BLUE),),
    ),
    Curve("kl", "KL", "Against the initial policy, in nats.", (("loss/kl", "KL", PURPLE),)),
    Curve(
        "gap",
        "Log-prob, server against trainer",
        "|difference| over trained tokens, in nats, on a log scale.",
        (
            ("rollout/logprob_abs_diff_max", "largest", ORANGE),
            ("rollout/logprob_abs_diff_mean", "mean", BLUE),
        ),
        log=True,
    ),
    Curve(
        "gate",
        "Clip gate",
        "Gain of the adaptive part: 1 is open, 0 is closed.",
        (("loss/clip_gate", "gate", BLUE),),
    ),
    Curve(
        "covariance",
        "Cov(length, advantage)",
        "Above 0 longer responses are rewarded, below 0 shorter ones.",
        (("group/cov_length_advantage", "covariance", BLUE),),
    ),
    Curve(
        "staleness",
        "Staleness",
        "Optimizer steps between the weights that generated a token and those that the batch starts from.",
        (
            ("rollout/staleness_max", "largest", ORANGE),
            ("rollout/staleness_mean", "mean", BLUE),
        ),
    ),
    Curve(
        "throughput",
        "Throughput",
        "Prompt and response tokens of the batch by second of all its steps.",
        (("throughput/tokens_per_s", "tokens/s", GREEN),),
    ),
)


def curves(
    metrics: Steps, batches: Sequence[SweptBatch], evaluations: Mapping[int, Mapping[str, Any]]
) -> tuple[list[Chart], list[str]]:
    """Draw every curve that has a value; return the charts and the titles of those that have none.

    ``evaluations``: the sets' scores by step.
    """
    found: list[Chart] = []
    missing: list[str] = []
    for curve in CURVES:
        figure = go.Figure(layout=LAYOUT)
        if curve.name == "reward":
            band(figure, batches, "reward", (10, 90), BLUE, 0.13, "samples, p10 to p90")
            band(figure, batches, "reward", (10, 90), BLUE, 0.22, "groups, p10 to p90", groups=True)
        if curve.name == "tokens":
            band(figure, batches, "length", (10, 90), ORANGE, 0.13, "p10 to p90")
            band(figure, batches, "length", (25, 75), ORANGE, 0.22, "p25 to p75")
        for metric, name, color in curve.metrics:
            line(figure, metrics, metric, name, color, steps=curve.name == "gate")
        if curve.name == "accuracy":
            evaluated(figure, evaluations, "accuracy")
        if curve.name == "tokens":
            evaluated(figure, evaluations, "tokens_mean")
        if not figure.data:
            missing.append(curve.title)
            continue
        figure.update_xaxes(**GRID)
        figure.update_yaxes(**GRID)
        if curve.log:
            figure.update_yaxes(type="log", exponentformat="power")
        if curve.percent:
            figure.update_yaxes(tickformat=".0%", range=[-0.02, 1.04])
        if curve.name == "gate":
            figure.update_yaxes(range=[-0.08, 1.12])
        if curve.name in ("staleness", "grad_norm", "throughput"):
            figure.update_yaxes(rangemode="tozero")
        if curve.name == "covariance":
            figure.add_hline(y=0, line={"color": GREY, "width": 1})
        if len(figure.data) == 1:
            figure.update_layout(showlegend=False)
        found.append(Chart(curve.name, curve.title, curve.note, figure))
    return found, missing


def series(metrics: Steps, key: str) -> tuple[list[int], list[float | None]]:
    """Return steps and values of a metric; a value that is not finite is None, a gap in the line."""
    rows = [row for row in metrics if key in row]
    values = [row[key] if math.isfinite(row[key]) else None for row in rows]
    return [int(row["step"]) for row in rows], values


def line(
    figure: go.Figure, metrics: Steps, key: str, name: str, color: str, steps: bool = False
) -> None:
    x, y = series(metrics, key)
    if any(value is not None for value in y):
        figure.add_scatter(
            x=x,
            y=y,
            name=name,
            mode="lines+markers" if len(x) <= 3 else "lines",
            line={"color": color, "width": 2, "shape": "hvh" if steps else "linear"},
            hovertemplate="%{y:.4g}",
        )


def band(
    figure: go.Figure,
    batches: Sequence[SweptBatch],
    number: str,
    percentiles: tuple[int, int],
    color: str,
    opacity: float,
    name: str,
    groups: bool = False,
) -> None:
    """Fill the area between two percentiles of a number over the samples (or the groups' means) of each batch."""
    x: list[int] = []
    bounds: list[list[float]] = []
    for batch in batches:
        values = batch.group_means(number) if groups else batch.numbers[number]
        known = values[np.isfinite(values)]
        if len(known):
            x.append(batch.first_step)
            bounds.append(np.percentile(known, percentiles).tolist())
    if not x:
        return
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    edge: dict[str, Any] = {"x": x, "mode": "lines", "line": {"width": 0}, "legendgroup": name}
    low, high = ([pair[i] for pair in bounds] for i in (0, 1))
    figure.add_scatter(
        **edge, y=high, showlegend=False, name=f"p{percentiles[1]}", hoverinfo="skip"
    )
    figure.add_scatter(
        **edge,
        y=low,
        name=name,
        fill="tonexty",
        fillcolor=f"rgba({red},{green},{blue},{opacity})",
        customdata=high,
        hovertemplate="%{y:.4g} to %{customdata:.4g}",
    )


def evaluated(figure: go.Figure, evaluations: Mapping[int, Mapping[str, Any]], score: str) -> None:
    """Mark a score of each evaluated set, with its interval where it has one."""
    names = sorted({name for sets in evaluations.values() for name in sets})
    for name, color in zip(names, [INK, PURPLE, RED, GREY, BLUE] * len(names), strict=False):
        points = [(step, sets[name]) for step, sets in sorted(evaluations.items()) if name in sets]
        bounds = [
            (s.get(f"{score}_low", s[score]), s[score], s.get(f"{score}_high", s[score]))
            for _, s in points
        ]
        figure.add_scatter(
            x=[step for step, _ in points],
            y=[value for _, value, _ in bounds],
            name=escaped(name),
            mode="markers",
            marker={"symbol": "diamond", "size": 9, "color": color},
            error_y={
                "array": [high - value for _, value, high in bounds],
                "arrayminus": [value - low for low, value, _ in bounds],
                "thickness": 1.2,
                "color": color,
            },
            hovertemplate="%{y:.4g}",
        )


def time_split(metrics: Steps) -> Chart | None:
    """Stack the seconds of each phase, a bar a step, or the mean of several steps."""
    found = spans(metrics)
    if not found:
        return None
    steps = [int(row["step"]) for row in metrics]
    width = -(-len(steps) // COLUMNS_SHOWN)
    place = {step: i // width for i, step in enumerate(steps)}
    x = [steps[i] for i in range(0, len(steps), width)]
    counts = np.bincount(list(place.values()))
    figure = go.Figure(layout={**LAYOUT, "barmode": "stack", "bargap": 0.12, "height": 300})
    for phase, (_, color) in PHASES.items():
        seconds = np.zeros(len(x))
        for span in found:
            if span.phase == phase:
                seconds[place[span.step]] += span.seconds
        if seconds.any():
            values = (seconds / counts).tolist()
            figure.add_bar(
                x=x, y=values, name=phase, marker_color=color, hovertemplate="%{y:.3g} s"
            )
    figure.update_xaxes(**GRID)
    figure.update_yaxes(**GRID, title={"text": "seconds", "font": {"size": 11}})
    note = "What the trainer and the controller did in each step."
    if width > 1:
        note += f" A bar is the mean of {width} steps."
    return Chart("time", "Time of a step", note, figure)


def idle(metrics: Steps) -> Chart | None:
    """Draw the idle share of each role, and how full the servers were."""
    figure = go.Figure(layout={**LAYOUT, "height": 300})
    for key, name, color in (
        ("idle/trainer_frac", "trainer waits for groups", BLUE),
        ("idle/servers_frac", "servers without a request", ORANGE),
        ("idle/publish_frac", "servers held by a publish", PURPLE),
        ("rollout/slots_used_frac", "slots in use", GREEN),
    ):
        line(figure, metrics, key, name, color)
    if not figure.data:
        return None
    figure.update_xaxes(**GRID)
    figure.update_yaxes(**GRID, tickformat=".0%", rangemode="tozero")
    figure.update_traces(hovertemplate="%{y:.1%}")
    note = "Of the time of a batch; the share of the servers' slots in use beside it."
    return Chart("idle", "Idle share of the roles", note, figure)


def distribution(batches: Sequence[SweptBatch], number: str, title: str, unit: str) -> Chart | None:
    """Map how a number is distributed over the samples of each batch: the share of its samples in each bin."""
    known = [batch.numbers[number][np.isfinite(batch.numbers[number])] for batch in batches]
    if not any(len(values) for values in known):
        return None
    edges = bin_edges(np.concatenate(known), whole=number == "length")
    width = -(-len(batches) // COLUMNS_SHOWN)
    x, columns = [], []
    for start in range(0, len(batches), width):
        values = np.concatenate(known[start : start + width])
        counts, _ = np.histogram(values, edges)
        x.append(batches[start].first_step)
        columns.append(counts / max(1, len(values)))
    middles = (edges[:-1] + edges[1:]) / 2
    figure = go.Figure(layout={**LAYOUT, "height": 280, "hovermode": "closest"})
    figure.add_heatmap(
        x=x,
        y=middles.tolist(),
        z=np.array(columns).T.tolist(),
        colorscale=[
            [0, "#ffffff"],
            [0.02, "#e3eef8"],
            [0.25, "#8db9e0"],
            [0.6, BLUE],
            [1, "#12365e"],
        ],
        zmin=0,
        colorbar={"tickformat": ".0%", "thickness": 10, "len": 0.9, "outlinewidth": 0},
        hovertemplate=f"step %{{x}}<br>{unit} about %{{y:.4g}}<br>%{{z:.1%}} of samples<extra></extra>",
    )
    figure.update_xaxes(**GRID)
    figure.update_yaxes(**GRID, title={"text": unit, "font": {"size": 11}})
    note = "Share of the samples of a batch in each bin."
    if width > 1:
        note += f" A column is {width} batches."
    return Chart(f"distribution_{number}", title, note, figure)


def bin_edges(values: Array, whole: bool) -> Array:
    """Return the edges of at most about ``BINS`` equal bins over all values; ``whole``: of whole numbers, so that each
    bin has as many of them."""
    low, high = float(values.min()), float(values.max())
    if whole:
        width = max(1, math.ceil((high - low + 1) / BINS))
        edges: Array = np.arange(low, high + width + 0.5, width) - 0.5
        return edges
    if high == low:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, BINS + 1)


def events_chart(events: Sequence[Event], attempts: Sequence[Attempt]) -> Chart | None:
    """Mark what happened on the axis of the steps, a row for each kind."""
    figure = go.Figure(layout={**LAYOUT, "height": 210, "hovermode": "closest"})
    if attempts:
        figure.add_scatter(
            x=[a.after_step for a in attempts],
            y=["attempt"] * len(attempts),
            name="attempt",
            mode="markers",
            marker={"symbol": "line-ns", "size": 18, "line": {"width": 3, "color": BLUE}},
            text=[
                escaped(f"attempt {a.number} after step {a.after_step}: {a.reason}")
                for a in attempts
            ],
            hovertemplate="%{text}<extra></extra>",
        )
    for kind, color in EVENT_COLORS.items():
        mine = [e for e in events if e.kind == kind and e.step is not None]
        if mine:
            figure.add_scatter(
                x=[e.step for e in mine],
                y=[kind] * len(mine),
                name=kind,
                mode="markers",
                marker={"size": 11, "color": color, "opacity": 0.75},
                text=[escaped(f"{e.who}: {e.what}") for e in mine],
                hovertemplate="step %{x}: %{text}<extra></extra>",
            )
    if not figure.data:
        return None
    figure.update_layout(showlegend=False, margin={"l": 130})
    figure.update_xaxes(**GRID, rangemode="tozero")
    figure.update_yaxes(**{**GRID, "ticks": ""}, autorange="reversed", type="category")
    note = "By the step that was last begun; an attempt by the last step committed before it."
    return Chart("events", "Attempts and faults", note, figure)


def mark_attempts(charts: Sequence[Chart], attempts: Sequence[Attempt]) -> None:
    """Draw a dotted line into each chart where a new attempt began; the first one began the run."""
    for attempt in attempts[1:]:
        for chart in charts:
            chart.figure.add_vline(
                x=attempt.after_step + 0.5,
                line={"color": RED, "width": 1, "dash": "dot"},
                opacity=0.7,
            )


def escaped(text: str) -> str:
    """Escape the marks that plotly takes for its own small HTML; long reasons are cut."""
    cut = text if len(text) <= 160 else text[:160] + " …"
    return cut.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
