"""Compare values of one key on one task: ``python tools/ablate.py CONFIG --vary preset=grpo,agpo --seeds 1,2,3``.

Per seed ``prepare`` and ``sft`` run once; every value then trains from that cold start. Writes ``ablation.md`` (one
table) and ``ablation.png`` (one picture) into ``--out``. Started again it continues: finished runs are read, not
repeated. ``preset`` is short for ``algorithm.preset``; ``--set`` goes to every run.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from agpo_megatron.config import Config, load_config
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.controller.run import Evaluation
from agpo_megatron.observe.metrics import read_metrics

Row = dict[str, float]
WINDOW = 10  # steps over which fluctuation is measured


@dataclass(frozen=True)
class Finished:
    """One run: its metrics, and its held-out scores by step; the last is that of the trained policy."""

    rows: list[Row]
    held_out: dict[int, Row]

    @property
    def before(self) -> Row:
        return self.held_out[0]

    @property
    def after(self) -> Row:
        return self.held_out[max(self.held_out)]


def wasted(row: Row) -> float:
    """Share of samples that cost a rollout and gave the policy loss nothing: silent groups, replaced ones too, and
    everything where the gate was closed."""
    if row.get("loss/clip_gate", 1.0) == 0.0:
        return 1.0
    generated = row.get("sampling/discarded_groups", 0.0) / row["groups"]
    if row.get("constants"):
        return 0.0
    return (row["group/zero_variance_frac"] + generated) / (1.0 + generated)


def fluctuation(rows: Sequence[Row]) -> list[float]:
    """Standard deviation of the unclipped loss over the last ``WINDOW`` steps, at each step."""
    losses = [row["loss/unclipped"] for row in rows]
    windows = [losses[max(0, i + 1 - WINDOW) : i + 1] for i in range(len(losses))]
    return [stdev(w) if len(w) > 1 else 0.0 for w in windows]


def entropy(row: Row) -> float:
    """NaN where nothing was trained on, and entropy therefore not measured."""
    return row.get("policy/entropy", math.nan) if row.get("tokens/trained") else math.nan


CURVES: dict[str, Callable[[Sequence[Row]], list[float]]] = {
    "training accuracy": lambda rows: [r["reward/accuracy"] for r in rows],
    "mean response tokens": lambda rows: [r["response/tokens_mean"] for r in rows],
    f"loss fluctuation (std over {WINDOW} steps)": fluctuation,
    "policy entropy (nats)": lambda rows: [entropy(r) for r in rows],
    "share of wasted samples": lambda rows: [wasted(r) for r in rows],
}


def agpo(command: str, config: Path, run_dir: Path, settings: Sequence[str]) -> None:
    """One command of the program; its output goes to a file beside the run. Raises RuntimeError with its last lines."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    log = run_dir.with_name(f"{run_dir.name}-{command}.log")
    line = [sys.executable, "-m", "agpo_megatron", command, str(config), "--run-dir", str(run_dir)]
    for setting in settings:
        line += ["--set", setting]
    with log.open("wb") as output:
        code = subprocess.run(line, stdout=output, stderr=subprocess.STDOUT).returncode
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise RuntimeError(f"{' '.join(line)} ended with {code}; see {log}\n{tail}")


def cold_start(config: Path, folder: Path, settings: Sequence[str]) -> list[str]:
    """Data and cold start of one seed, made once; returns the settings that let other run folders use them."""
    done = folder / "ready"
    made = load_config(config, settings, str(folder))
    if not made.eval.path:
        raise SystemExit(f"{config}: eval.path is not set; held-out accuracy is what is compared")
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if made.prepare.recipe != "none":
            agpo("prepare", config, folder, settings)
        if made.sft:
            agpo("sft", config, folder, settings)
        done.touch()
    return [
        f"model.path={made.model.path}",
        f"data.path={made.data.path}",
        f"eval.path={made.eval.path}",
        *([f"sft.base={made.sft.base}", f"sft.path={made.sft.path}"] if made.sft else []),
    ]


def finished(run_dir: Path, config: Config) -> Finished:
    rows = read_metrics(run_dir)
    for row in rows:
        row["groups"] = float(config.train.prompts_per_batch)
        row["constants"] = float(config.algorithm.advantage.zero_variance == "constant")
    folder = RunFolder(run_dir)
    measured = [step for step in range(len(rows) + 1) if folder.evaluation(step).exists()]
    return Finished(rows, {s: Evaluation.read(folder.evaluation(s)).scores for s in measured})


def spread(values: Sequence[float]) -> str:
    """Mean and, for several seeds, standard deviation."""
    known = [v for v in values if not math.isnan(v)]
    if not known:
        return "not measured"
    return f"{fmean(known):.3f}" + (f" ± {stdev(known):.3f}" if len(known) > 1 else "")


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation of what was measured; 0 for one value."""
    known = [v for v in values if not math.isnan(v)]
    return stdev(known) if len(known) > 1 else 0.0


def mean_known(values: Sequence[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return fmean(known) if known else math.nan


def table(results: dict[str, list[Finished]], key: str) -> str:
    """Markdown: one line per value; last-fifth means of the training curves, held-out scores after the run."""
    lines = [
        f"| {key} | held-out accuracy | before | held-out tokens | "
        + " | ".join(CURVES)
        + " | gate closed |",
        "|---" * (len(CURVES) + 5) + "|",
    ]
    for value, runs in results.items():
        cells = [
            spread([run.after["accuracy"] for run in runs]),
            spread([run.before["accuracy"] for run in runs]),
            spread([run.after["tokens_mean"] for run in runs]),
        ]
        for curve in CURVES.values():
            ends = [curve(run.rows)[-max(1, len(run.rows) // 5) :] for run in runs]
            cells.append(spread([mean_known(end) for end in ends]))
        closed = [fmean(r.get("loss/clip_gate", 1.0) == 0.0 for r in run.rows) for run in runs]
        lines.append(f"| `{value}` | " + " | ".join([*cells, spread(closed)]) + " |")
    seeds = len(next(iter(results.values())))
    note = (
        f"Mean ± standard deviation over {seeds} seed(s). Training columns: mean of the last fifth of the steps. "
        "Wasted: silent groups (replaced ones too), and all samples of a step whose gate was closed."
    )
    return "\n".join([*lines, "", note]) + "\n"


def picture(results: dict[str, list[Finished]], path: Path) -> None:
    """Held-out accuracy and the training curves over steps; bands are the spread over seeds."""
    figure, grid = plt.subplots(2, 3, figsize=(15, 8), constrained_layout=True)
    for number, (value, runs) in enumerate(results.items()):
        color = f"C{number}"
        panels = list(grid.flat)
        steps = sorted(set.intersection(*(set(run.held_out) for run in runs)))
        held_out = [[run.held_out[step]["accuracy"] for run in runs] for step in steps]
        means = [fmean(scores) for scores in held_out]
        errors = [deviation(scores) for scores in held_out]
        panels[0].errorbar(steps, means, errors, color=color, marker="o", capsize=3, label=value)
        panels[0].set_title("held-out accuracy")
        for axes, (name, curve) in zip(panels[1:], CURVES.items(), strict=True):
            series = list(zip(*(curve(run.rows) for run in runs), strict=False))
            x = range(1, len(series) + 1)
            middle = [mean_known(values) for values in series]
            band = [deviation(values) for values in series]
            axes.plot(x, middle, color=color, label=value)
            low, high = (
                [m + sign * b for m, b in zip(middle, band, strict=True)] for sign in (-1, 1)
            )
            axes.fill_between(x, low, high, color=color, alpha=0.15)
            axes.set_title(name)
    for axes in grid.flat:
        axes.set_xlabel("step")
    grid.flat[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--vary", required=True, metavar="KEY=a,b", help="preset=grpo,agpo_v3")
    parser.add_argument("--seeds", default="1", help="1,2,3")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="settings")
    arguments = parser.parse_args()
    key, _, listed = arguments.vary.partition("=")
    key = "algorithm.preset" if key == "preset" else key
    values = [v for v in listed.split(",") if v]
    if not values:
        parser.error(f"--vary {arguments.vary}: give KEY=value,value")
    results: dict[str, list[Finished]] = {value: [] for value in values}
    for seed in arguments.seeds.split(","):
        settings = [*arguments.settings, f"seed={int(seed)}"]
        folder = arguments.out.absolute() / f"seed-{seed}"
        shared = cold_start(arguments.config, folder / "task", settings)
        for value in values:
            run_dir, here = folder / value, [*settings, *shared, f"{key}={value}"]
            print(f"seed {seed}: {key}={value}", flush=True)
            agpo("train", arguments.config, run_dir, here)
            run = finished(run_dir, load_config(arguments.config, here, str(run_dir)))
            results[value].append(run)
    text = table(results, key)
    (arguments.out / "ablation.md").write_text(text, encoding="utf-8")
    picture(results, arguments.out / "ablation.png")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
