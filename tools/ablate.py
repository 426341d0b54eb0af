"""Compare values of one key on one task: ``python tools/ablate.py CONFIG --vary preset=grpo,agpo --seeds 1,2,3``.

Per seed ``prepare`` and ``sft`` run once; every value then trains from that cold start. Writes ``ablation.md`` (one
table) and ``ablation.png`` (one picture) into ``--out``. Started again it continues: finished runs are read, not
repeated. ``preset`` is short for ``algorithm.preset``; ``--set`` goes to every run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

from agpo_megatron.config import Config, load_config
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.observe.metrics import read_metrics

WINDOW = 10  # steps over which fluctuation is measured
CLOSED = "gate closed"


@dataclass(frozen=True)
class Finished:
    """One run. ``curves``: a row per step, of ``curves_of``. ``held_out``: a row per evaluation, by step: accuracy,
    tokens_mean, tokens_correct_mean; the last is that of the trained policy."""

    curves: pd.DataFrame
    held_out: pd.DataFrame


def curves_of(rows: Sequence[Mapping[str, float]], config: Config) -> pd.DataFrame:
    """Compute what is compared, step by step, from the metrics; NaN where it was not measured."""
    steps = pd.DataFrame(rows).set_index("step")
    if (
        config.train.updates_per_batch > 1
    ):  # what is known of a whole batch stands with its first step
        of_batch = ["reward", "response", "group", "mask", "sampling"]
        names = [name for name in steps if name.partition("/")[0] in of_batch]
        steps[names] = steps[names].ffill()

    def metric(key: str, absent: float) -> pd.Series:
        return steps[key].fillna(absent) if key in steps else pd.Series(absent, steps.index)

    closed = metric("loss/clip_gate", 1.0) == 0.0
    replaced = metric("sampling/discarded_groups", 0.0) / config.train.prompts_per_batch
    # Samples that cost a rollout and gave the policy loss nothing: zero-variance groups, replaced ones too, and
    # everything where the gate was closed.
    wasted = (steps["group/zero_variance_frac"] + replaced) / (1.0 + replaced)
    if config.algorithm.advantage.zero_variance == "constant":
        wasted *= 0.0
    entropy = metric("policy/entropy", float("nan"))
    return pd.DataFrame(
        {
            "training accuracy": steps["reward/accuracy"],
            "mean response tokens": steps["response/tokens_mean"],
            f"loss fluctuation (std over {WINDOW} steps)": steps["loss/unclipped"]
            .rolling(WINDOW, min_periods=1)
            .std()
            .fillna(0.0),
            "policy entropy (nats)": entropy.where(metric("tokens/trained", 0.0) > 0),
            "share of wasted samples": wasted.mask(closed, 1.0),
            CLOSED: closed.astype(float),
        }
    )


def agpo(command: str, config: Path, run_dir: Path, settings: Sequence[str]) -> None:
    """Run one command of the program; output goes to a file beside the run. Raises RuntimeError with its last lines."""
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
    """Make data and cold start of one seed, once; returns the settings that let other run folders use them."""
    done = folder / "ready"
    made = load_config(config, settings, str(folder))
    if not made.eval.sets:
        raise SystemExit(f"{config}: eval.sets is not set; held-out accuracy is what is compared")
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
        f"eval.sets={json.dumps([s.model_dump() for s in made.eval.sets])}",
        *([f"sft.base={made.sft.base}", f"sft.path={made.sft.path}"] if made.sft else []),
    ]


def finished(run_dir: Path, config: Config) -> Finished:
    rows, folder = read_metrics(run_dir), RunFolder(run_dir)
    files = {step: folder.evaluation(step) for step in range(len(rows) + 1)}
    scores = {s: json.loads(f.read_text())["scores"] for s, f in files.items() if f.exists()}
    return Finished(curves_of(rows, config), pd.DataFrame.from_dict(scores, orient="index"))


def spread(values: pd.Series) -> str:
    """Format the mean and, for several seeds, the standard deviation of what was measured."""
    values = values.dropna()
    if values.empty:
        return "not measured"
    return f"{values.mean():.3f}" + (f" ± {values.std():.3f}" if len(values) > 1 else "")


def table(results: Mapping[str, Sequence[Finished]], key: str) -> str:
    """Format a line per value, in Markdown: held-out scores after the run, training curves at their ends."""
    lines = []
    for value, runs in results.items():
        ends = [run.curves.tail(max(1, len(run.curves) // 5)).mean() for run in runs]
        columns = pd.DataFrame(
            [
                {
                    "held-out accuracy": run.held_out["accuracy"].iloc[-1],
                    "before": run.held_out["accuracy"].iloc[0],
                    "held-out tokens": run.held_out["tokens_mean"].iloc[-1],
                    **end,
                    CLOSED: run.curves[CLOSED].mean(),  # of all steps
                }
                for run, end in zip(runs, ends, strict=True)
            ]
        )
        lines.append(
            f"| `{value}` | " + " | ".join(spread(columns[name]) for name in columns) + " |"
        )
    head = [f"| {key} | " + " | ".join(columns) + " |", "|---" * (len(columns.columns) + 1) + "|"]
    note = (
        f"Mean ± standard deviation over {len(columns)} seed(s). Training columns: mean of the last fifth of steps. "
        "Wasted: zero-variance groups (replaced ones too), and all samples of a step whose gate was closed."
    )
    return "\n".join([*head, *lines, "", note]) + "\n"


def picture(results: Mapping[str, Sequence[Finished]], path: Path) -> None:
    """Draw held-out accuracy and the training curves over steps; bands are the spread over seeds."""
    figure, grid = plt.subplots(2, 3, figsize=(15, 8), constrained_layout=True)
    first, *others = grid.flat
    first.set_title("held-out accuracy")
    for number, (value, runs) in enumerate(results.items()):
        color = f"C{number}"
        seeds = pd.concat([run.held_out["accuracy"] for run in runs], axis=1).dropna()
        errors = seeds.std(axis=1).fillna(0.0)
        look = {"color": color, "marker": "o", "capsize": 3, "label": value}
        first.errorbar(seeds.index, seeds.mean(axis=1), errors, **look)
        for axes, name in zip(others, runs[0].curves.columns.drop(CLOSED), strict=True):
            seeds = pd.concat([run.curves[name] for run in runs], axis=1)
            middle, band = seeds.mean(axis=1), seeds.std(axis=1).fillna(0.0)
            axes.plot(seeds.index, middle, color=color, label=value)
            axes.fill_between(seeds.index, middle - band, middle + band, color=color, alpha=0.15)
            axes.set_title(name)
    for axes in grid.flat:
        axes.set_xlabel("step")
    first.legend()
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
