"""Writes what an ablation has found so far: results.json, results.md, frontier.png and one page, results.html."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from ablation.comparison import Compared, Estimate, Results, compare, decide
from ablation.plan import Plan
from matplotlib.figure import Figure

from agpo_megatron.files import write_durably

NOTES = (
    "Held-out numbers are those after the last step. ±: standard deviation over seeds. [ ]: 95 % interval of the "
    "paired difference to the base arm, by Student's t over seeds; with one seed it is over problems and says nothing "
    "of other seeds. Right tokens: of right answers, on problems that both arms solve (one right sample of each).",
    "Late: mean of the last fifth of the steps. Wasted: samples that cost a rollout and gave the policy loss nothing. "
    "Fluctuation: standard deviation within ten steps, of the gradient norm as a share of their mean. "
    "Spikes: steps whose gradient norm exceeds three times the run's median. Entropy floor: the lowest of any step. "
    "KL: weighted as the loss, over the tokens that it trains. Equal tokens: difference of training accuracy, points, "
    "when arm and base arm had generated as many tokens as the thriftier of them in all. Gap: tokens of right minus "
    "wrong samples of a problem before training.",
)
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1500px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0;font-size:13px;display:block;overflow-x:auto}"
    "td,th{border:1px solid #ccc;padding:.25em .6em;text-align:left;white-space:nowrap}th{background:#f3f3f3}"
    "img{max-width:100%}code{font-size:12px}"
)


@dataclass(frozen=True)
class Table:
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [
            f"| {' | '.join(row)} |" for row in (self.head, ["---"] * len(self.head), *self.rows)
        ]
        return "\n".join([f"## {self.title}", "", *lines, ""])

    def html(self) -> str:
        def row(cells: Sequence[str], kind: str) -> str:
            return "<tr>" + "".join(f"<{kind}>{marked(c)}</{kind}>" for c in cells) + "</tr>"

        body = "".join(row(cells, "td") for cells in self.rows)
        return f"<h2>{marked(self.title)}</h2><table>{row(self.head, 'th')}{body}</table>"


def marked(text: str) -> str:
    """Escape a text; `code` as in Markdown."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))


def write_report(plan: Plan, results: Results, seconds: dict[str, float]) -> str:
    """Write all files to ``plan.out`` from the finished cells; return the Markdown. ``seconds``: by cell."""
    compared = compare(plan, results)
    decision = decide(plan, compared)
    tables = [decision_table(plan, decision), overview(plan, compared)]
    for task in seen_tasks(plan, compared):
        mine = [c for c in compared if c.task == task]
        tables += [endpoints(task, mine), course(task, mine)]
    tables.append(cell_table(plan, results, seconds))
    done, all_cells = len(results), len(plan.cells())
    title = f"Ablation: {plan.path.name}, {done} of {all_cells} cells, base arm {plan.file.base}"
    picture = png(frontier(plan, compared))
    write_durably(plan.out / "frontier.png", picture)
    content = {
        "file": plan.file.model_dump(),
        "compared": [asdict(c) for c in compared],
        "decision": decision,
        "cells": [
            {
                "cell": str(cell),
                "seconds": seconds.get(str(cell)),
                "command": plan.command(cell),
                **m.summary(),
            }
            for cell, m in results.items()
        ],
    }
    write_durably(plan.out / "results.json", json.dumps(without_nan(content), indent=1).encode())
    text = "\n".join(
        [f"# {title}", "", *(f"{note}\n" for note in NOTES), *(t.markdown() for t in tables)]
    )
    write_durably(
        plan.out / "results.md", (text + "\n![Accuracy over tokens](frontier.png)\n").encode()
    )
    image = base64.b64encode(picture).decode()
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{''.join(f'<p>{n}</p>' for n in NOTES)}"
        f'{tables[0].html()}<img alt="accuracy over tokens" src="data:image/png;base64,{image}">'
        f"{''.join(t.html() for t in tables[1:])}"
    )
    write_durably(plan.out / "results.html", page.encode())
    return text


def decision_table(plan: Plan, decision: Sequence[dict[str, Any]]) -> Table:
    within = 100 * plan.file.decision.within
    rows = [
        [
            f"`{d['arm']}`",
            f"{100 * d['worst']:+.1f} ({d['task']})",
            "yes" if d["passes"] else "no",
            percent(d["saved"]),
            "control" if d["control"] else "" if d["complete"] else "not all cells yet",
        ]
        for d in decision
    ]
    title = f"Decision: at most {within:g} points below the base arm on every task, then most tokens saved"
    return Table(
        title, ["arm", "worst difference, points", "passes", "right tokens saved", ""], rows
    )


def overview(plan: Plan, compared: Sequence[Compared]) -> Table:
    """The table of all arms on all tasks, and how many seeds stand behind a row at least."""
    tasks = seen_tasks(plan, compared)
    found = {(c.arm, c.task): c for c in compared}
    rows = []
    for arm in dict.fromkeys(c.arm for c in compared):
        mine = [found.get((arm, task)) for task in tasks]
        cells = [f"{100 * c.accuracy.mean:+.1f}, {percent(c.saved)}" if c else "" for c in mine]
        rows.append([f"`{arm}`", *cells, str(min(len(c.seeds) if c else 0 for c in mine))])
    title = "Tasks at a glance: difference in points, right tokens saved"
    return Table(title, ["arm", *tasks, "seeds"], rows)


def seen_tasks(plan: Plan, compared: Sequence[Compared]) -> list[str]:
    """Return the tasks on which a cell has ended, in the file's order."""
    return [task for task in plan.file.tasks if any(c.task == task for c in compared)]


def endpoints(task: str, compared: Sequence[Compared]) -> Table:
    head = [
        "arm",
        "pass@1 %",
        "difference, points",
        "tokens",
        "right tokens, difference",
        "saved",
        "both solve",
        "seeds",
    ]
    rows = [
        [
            f"`{c.arm}`",
            spread(c, "accuracy", 100, 1),
            interval(c.accuracy, 100, 1),
            spread(c, "tokens", 1, 1),
            interval(c.tokens, 1, 2),
            percent(c.saved),
            str(c.solved),
            str(len(c.seeds)),
        ]
        for c in compared
    ]
    before, gap = compared[0].means["accuracy before"], compared[0].means["gap before"]
    tokens = compared[0].means["tokens before"]
    title = (
        f"{task}: before training {100 * before:.1f} %, {tokens:.1f} tokens, gap {gap:+.1f} tokens"
    )
    return Table(title, head, rows)


def course(task: str, compared: Sequence[Compared]) -> Table:
    """The table of what happened on the way."""
    columns = {
        "training accuracy, late": 3,
        "wasted samples, late": 3,
        "loss fluctuation, late": 4,
        "gradient fluctuation, late": 3,
        "closed gates": 3,
        "entropy floor": 3,
        "gradient spikes": 3,
        "truncated": 3,
        "KL": 4,
        "generated tokens": 0,
    }
    rows = [
        [
            f"`{c.arm}`",
            *(spread(c, name, 1, digits) for name, digits in columns.items()),
            interval(c.at_tokens, 100, 1),
        ]
        for c in compared
    ]
    return Table(f"{task}: training", ["arm", *columns, "equal tokens"], rows)


def cell_table(plan: Plan, results: Results, seconds: dict[str, float]) -> Table:
    rows = [
        [
            str(cell),
            f"{100 * m.summary()['accuracy']:.2f}",
            f"{m.summary()['tokens']:.2f}",
            f"{seconds.get(str(cell), math.nan):.0f}",
            f"`{plan.command(cell)}`",
        ]
        for cell, m in results.items()
    ]
    return Table("Cells", ["cell", "pass@1 %", "tokens", "seconds", "to repeat it"], rows)


def spread(of: Compared, name: str, factor: float, digits: int) -> str:
    mean, deviation = factor * of.means[name], factor * of.deviations[name]
    if math.isnan(mean):
        return "–"
    return f"{mean:.{digits}f}" + ("" if math.isnan(deviation) else f" ± {deviation:.{digits}f}")


def interval(of: Estimate, factor: float, digits: int) -> str:
    if math.isnan(of.mean):
        return "–"
    mean, *ends = (f"{factor * x:+.{digits}f}" for x in (of.mean, of.low, of.high))
    return mean if math.isnan(of.low) else f"{mean} [{', '.join(ends)}]"


def percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share + 0.0:+.1f} %"


def frontier(plan: Plan, compared: Sequence[Compared]) -> Figure:
    """Draw both endpoints against the base arm, a panel per task: points of pass@1 over tokens of right answers, with
    their intervals. Paired like the tables, so that arms with other seeds can be in one picture."""
    tasks = seen_tasks(plan, compared)
    size = (5 * max(1, len(tasks)), 5)
    figure, grid = plt.subplots(1, max(1, len(tasks)), figsize=size, squeeze=False)
    colors = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    look = {arm: (colors[i % 20], "osD^v"[i % 5]) for i, arm in enumerate(plan.arms)}
    for axes, task in zip(grid.flat, tasks, strict=False):
        axes.axhline(0, color="0.8", linewidth=1, zorder=0)
        axes.axvline(0, color="0.8", linewidth=1, zorder=0)
        for c in (c for c in compared if c.task == task):
            color, marker = look[c.arm]
            axes.errorbar(
                c.tokens.mean,
                100 * c.accuracy.mean,
                xerr=bar(c.tokens),
                yerr=bar(c.accuracy, 100),
                color=color,
                marker=marker,
                capsize=2,
                linestyle="none",
                label=c.arm,
            )
        axes.set_title(task)
        axes.set_xlabel("tokens of a right answer, difference")
    grid[0][0].set_ylabel("held-out pass@1, difference in points")
    figure.tight_layout(rect=(0, 0.16, 1, 1))
    named = {
        label: handle
        for axes in grid.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(named.values()), list(named), loc="lower center", ncol=6, fontsize=8)
    return figure


def bar(of: Estimate, factor: float = 1.0) -> list[list[float]]:
    """Return the interval as matplotlib wants it: how far it reaches below and above the mean."""
    return [[factor * max(0.0, of.mean - of.low)], [factor * max(0.0, of.high - of.mean)]]


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def without_nan(value: Any) -> Any:
    """Replace NaN by None, which is JSON."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
