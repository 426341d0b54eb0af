"""``agpo-megatron {prepare,sft,train,eval,export,check,parity,status,timeline,report}``; also
``python -m agpo_megatron``."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from agpo_megatron.cluster.claim import already_done, only_command_on, place, refuse_another_run
from agpo_megatron.cluster.pass_through import check_pass_through_here
from agpo_megatron.cluster.status import describe_run
from agpo_megatron.config import Config, ConfigError
from agpo_megatron.config.checks import check_config, check_inputs, notes
from agpo_megatron.config.loading import Resolved, resolve_config
from agpo_megatron.config.record import package_versions, resolved_yaml
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.files import write_durably
from agpo_megatron.journal import JournalError, JournalReader
from agpo_megatron.observe.best import check_keep_best
from agpo_megatron.observe.metrics import read_metrics
from agpo_megatron.observe.summary import render_summary


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="agpo-megatron", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    about = {
        "prepare": "write the data and the base checkpoint of a demonstration config",
        "sft": "cold start: supervised tuning of sft.base into model.path",
        "train": "AGPO; a run that finds its run folder continues it",
        "eval": "evaluate eval.sets with the trained policy, or with model.path before training",
        "check": "validate, print the resolved config and where each value comes from",
        "parity": "loss and gradients of this layout, scaled down, against a reference without any (on the CPU)",
    }
    for name, text in about.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("config", help="YAML file")
        command.add_argument(
            "--set", action="append", default=[], metavar="a.b=c", dest="overrides"
        )
        command.add_argument("--run-dir", help="run folder (overrides run.dir)")
        if name == "parity":
            command.add_argument(
                "--ranks",
                type=int,
                default=8,
                metavar="N",
                help="processes at most (default 8; each takes about half a gigabyte)",
            )
        if name == "train":
            command.add_argument(
                "--replay",
                metavar="RUN_DIR",
                type=Path,
                help="train on the recorded batches of an earlier run; no rollout servers",
            )
        if name == "eval":
            which = command.add_mutually_exclusive_group()
            which.add_argument(
                "--model", metavar="PATH", help="Hugging Face checkpoint to evaluate"
            )
            which.add_argument(
                "--step", type=int, metavar="N", help="checkpoint of the run after step N"
            )
            command.add_argument(
                "--rescore",
                action="store_true",
                help="score the stored samples again with today's reward and data; nothing is generated",
            )
    text = "who is doing what, for how long, in the newest start of a run"
    status = commands.add_parser("status", help=text, description=text)
    status.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    text = "write a checkpoint of a run as a Hugging Face checkpoint, without servers and ranks"
    export = commands.add_parser("export", help=text, description=text)
    export.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    export.add_argument("--step", type=int, metavar="N", required=True)
    export.add_argument(
        "--out", type=Path, metavar="DIR", help="default: exports/step-N of RUN_DIR"
    )
    text = "draw where the time of runs went, above each other: the trainer's phases, the servers' slots"
    timeline = commands.add_parser("timeline", help=text, description=text)
    timeline.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    timeline.add_argument(
        "--out", type=Path, metavar="PNG", help="default: timeline.png in the first RUN_DIR"
    )
    text = "one HTML file: curves, time, faults and samples of a run, also while it runs"
    report = commands.add_parser("report", help=text, description=text)
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    report.add_argument(
        "--out", type=Path, metavar="HTML", help="default: report.html in the RUN_DIR"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    arguments = parse_arguments(argv)
    try:
        if arguments.command == "status":
            sys.stdout.write(describe_run(RunFolder(arguments.run_dir)))
            return 0
        if arguments.command == "export":
            sys.stdout.write(f"{export(arguments.run_dir, arguments.step, arguments.out)}\n")
            return 0
        if arguments.command == "timeline":
            sys.stdout.write(f"{timeline(arguments.run_dirs, arguments.out)}\n")
            return 0
        if arguments.command == "report":
            sys.stdout.write(f"{report(RunFolder(arguments.run_dir), arguments.out)}\n")
            return 0
        # Make the path absolute, so that every spelling means the same folder.
        run_dir = arguments.run_dir and os.path.abspath(arguments.run_dir)
        resolved = resolve_config(arguments.config, arguments.overrides, run_dir)
        for warning in check_config(resolved.config):
            sys.stderr.write(f"warning: {warning}\n")
        check_keep_best(resolved.config)
        if arguments.command == "check":
            for note in (*check_pass_through_here(resolved.config), *notes(resolved.config)):
                sys.stderr.write(f"note: {note}\n")
            sys.stdout.write(resolved_yaml(resolved.config, resolved.provenance))
            return 0
        if arguments.command == "parity":
            return parity(resolved.config, arguments.ranks)
        if arguments.command == "prepare":
            from agpo_megatron.data.recipes import prepare

            prepare(resolved.config)
            return 0
        return run(arguments, resolved)
    except (ConfigError, JournalError, OSError, ValueError) as error:
        sys.stderr.write(f"agpo-megatron: {error}\n")
        return 2


def run(arguments: argparse.Namespace, resolved: Resolved) -> int:
    """Run sft, train, replay or eval on this machine, under the local supervisor."""
    from agpo_megatron.cluster.node import run_locally

    mode, extra = arguments.command, []
    if mode == "train" and arguments.replay:
        mode, extra = "replay", ["--replay", str(arguments.replay)]
        JournalReader(RunFolder(arguments.replay).journal)  # refuses a folder that is not a run
    config, folder = place(resolved.config, mode)
    if mode == "eval":
        config, folder = evaluated(config, folder, arguments.model, arguments.step)
        if arguments.rescore:
            from agpo_megatron.controller.assembly import rescore_evaluations

            asyncio.run(rescore_evaluations(config, folder))
            return 0
    check_inputs(config, mode)
    folder.path.mkdir(parents=True, exist_ok=True)
    with only_command_on(folder):
        if mode != "eval":
            refuse_another_run(config, folder, mode)
        if already_done(config, folder, mode):
            sys.stdout.write(f"{mode}: {folder.path} is complete; nothing to do\n")
        else:
            write_durably(folder.config, resolved_yaml(config, resolved.provenance).encode())
            write_durably(folder.versions, json.dumps(package_versions(), indent=1).encode())
            code = run_locally(config, folder, mode, extra)
            if code != 0:
                return code
    if mode == "train":
        render_summary(folder.path)
    elif mode == "sft" and (line := cold_start_line(config, folder)):
        sys.stdout.write(f"{line}\n")
    return 0


def cold_start_line(config: Config, folder: RunFolder) -> str:
    """Say in one line what a cold start came to; "" without a recorded step."""
    rows = read_metrics(folder.path)
    if not rows:
        return ""
    first, last = rows[0]["loss/policy"], rows[-1]["loss/policy"]
    return (
        f"sft: {len(rows)} steps, loss {first:.4f} to {last:.4f}; the model is in {config.model.path}, metrics and "
        f"curves are in {folder.path}"
    )


def evaluated(
    config: Config, folder: RunFolder, model: str | None, step: int | None
) -> tuple[Config, RunFolder]:
    """The config and folder of an evaluation of ``model`` or of the checkpoint of ``step``, if one of them is given.

    Raises ConfigError for a step without a checkpoint.
    """
    if model is None and step is None:
        return config, folder
    if step is not None:
        run, folder = RunFolder(folder.path.parent), RunFolder(folder.path / f"step-{step}")
        model = str(converted(run, step, folder.path / "hf", config.model.path))
    else:
        folder = RunFolder(folder.path / Path(str(model)).resolve().name)
    changes = {
        "model": config.model.model_copy(update={"path": model}),
        "run": config.run.model_copy(update={"dir": str(folder.path)}),
    }
    return config.model_copy(update=changes), folder


def converted(run: RunFolder, step: int, out: Path, like: str) -> Path:
    """The checkpoint of ``step`` as the Hugging Face folder ``out``, converted once; config and tokenizer are those of
    ``like``. Raises ConfigError."""
    if (out / "config.json").exists():
        return out
    checkpoints = dict(run.complete_checkpoints())
    if step not in checkpoints:
        there = ", ".join(path.name for path in checkpoints.values()) or "none"
        raise ConfigError(
            f"--step {step}: {run.path} has no checkpoint of that step; there are {there}"
        )
    checkpoint = checkpoints[step]
    tool = Path(__file__).parents[1] / "tools" / "convert_hf_checkpoint.py"
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(tool), "to-hf", str(checkpoint), str(out), "--like", like]
    if subprocess.run(command, check=False).returncode:
        raise ConfigError(
            f"--step {step}: {checkpoint} could not be converted; the lines above say why"
        )
    return out


def export(run_dir: Path, step: int, out: Path | None) -> Path:
    """Export a checkpoint of a run, as ``run.export_every`` would have. Raises ConfigError."""
    run = RunFolder(run_dir.absolute())
    if not run.config.exists():
        raise ConfigError(f"{run.path} is not a run folder: it has no {run.config.name}")
    mode = json.loads(run.inputs.read_text())["mode"]
    config = resolve_config(run.config).config
    like = config.sft.base if mode == "sft" and config.sft else config.model.path
    return converted(run, step, (out or run.export(step)).absolute(), like)


def timeline(run_dirs: Sequence[Path], out: Path | None) -> Path:
    """Draw the timelines of runs, finished or not. Raises ValueError for a run without a step."""
    from agpo_megatron.observe.timeline import draw_timeline

    path = out or run_dirs[0] / "timeline.png"
    draw_timeline({str(run_dir): read_metrics(run_dir) for run_dir in run_dirs}, path)
    return path


def report(run: RunFolder, out: Path | None) -> Path:
    """Write the report of a run, finished or not. Raises ConfigError for a folder that holds none."""
    from agpo_megatron.cluster.history import history
    from agpo_megatron.observe.report import make_report

    return make_report(run, history(run), out)


def parity(config: Config, ranks: int) -> int:
    """Print the report; return 0 if all of it passes."""
    from agpo_megatron.parity.command import check
    from agpo_megatron.parity.ranks import RankFailed

    line = ""
    try:
        for line in check(config, ranks):
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
    except RankFailed as error:
        sys.stderr.write(f"agpo-megatron: parity: {error}\n")
        return 1
    return 0 if line == "pass" else 1


if __name__ == "__main__":
    sys.exit(main())
