"""``agpo-megatron {prepare,sft,train,eval,check}``: also ``python -m agpo_megatron``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from agpo_megatron.config import Config, ConfigError
from agpo_megatron.config.checks import check_config, check_inputs
from agpo_megatron.config.loading import Resolved, leaves, resolve_config
from agpo_megatron.config.record import package_versions, resolved_yaml
from agpo_megatron.config.run_folder import RunFolder

# A run that has begun cannot go on with another value of these: its journal and its prompts depend on them.
IDENTITY = (
    "seed",
    "model.path",
    "data.",
    "train.prompts_per_step",
    "rollout.group_size",
    "rollout.temperature",
    "sft.base",
    "sft.path",
    "sft.batch_size",
)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="agpo-megatron", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    about = {
        "prepare": "write the data and the base checkpoint of a demonstration config",
        "sft": "cold start: supervised tuning of sft.base into model.path",
        "train": "AGPO; a run that finds its run folder continues it",
        "eval": "greedy accuracy on eval.path of the trained policy, or of model.path before training",
        "check": "validate, print the resolved config and where each value comes from",
    }
    for name, text in about.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("config", help="YAML file")
        command.add_argument(
            "--set", action="append", default=[], metavar="a.b=c", dest="overrides"
        )
        command.add_argument("--run-dir", help="run folder (overrides run.dir)")
        if name == "train":
            command.add_argument(
                "--replay",
                metavar="RUN_DIR",
                type=Path,
                help="train on the recorded batches of an earlier run; no rollout servers",
            )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    arguments = parse_arguments(argv)
    try:
        resolved = resolve_config(arguments.config, arguments.overrides, arguments.run_dir)
        for warning in check_config(resolved.config):
            sys.stderr.write(f"warning: {warning}\n")
        if arguments.command == "check":
            sys.stdout.write(resolved_yaml(resolved.config, resolved.provenance))
            return 0
        if arguments.command == "prepare":
            from agpo_megatron.data.recipes import prepare

            prepare(resolved.config)
            return 0
        return run(arguments, resolved)
    except (ConfigError, OSError, ValueError) as error:
        sys.stderr.write(f"agpo-megatron: {error}\n")
        return 2


def run(arguments: argparse.Namespace, resolved: Resolved) -> int:
    """sft, train or eval on this machine, under the local supervisor."""
    from agpo_megatron.cluster.supervisor import run_locally

    config, mode, extra = resolved.config, arguments.command, []
    folder = RunFolder(Path(config.run.dir))
    if mode == "sft":
        folder = folder.sft()
        config = config.model_copy(
            update={"run": config.run.model_copy(update={"dir": str(folder.path)})}
        )
    if mode == "train" and arguments.replay:
        mode, extra = "replay", ["--replay", str(arguments.replay)]
    check_inputs(config, mode)
    if already_done(config, folder, mode):
        sys.stdout.write(f"{mode}: {folder.path} is complete; nothing to do\n")
        show_summary(folder)
        return 0
    claim_folder(config, folder, resolved)
    code = run_locally(config, folder, mode, extra)
    if code == 0:
        show_summary(folder)
    return code


def already_done(config: Config, folder: RunFolder, mode: str) -> bool:
    """A finished cold start has written its output; a finished training run has exported its policy."""
    if mode == "sft":
        return (Path(config.model.path) / "config.json").exists()
    if mode in ("train", "replay"):
        done = folder.path / "done.json"
        return done.exists() and json.loads(done.read_text())["steps"] >= config.train.steps
    return False


def claim_folder(config: Config, folder: RunFolder, resolved: Resolved) -> None:
    """Write config and versions into the run folder; refuse to continue a run as another run.

    Raises ConfigError naming the keys that differ from the run that is in the folder.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    if folder.config.exists():
        before = leaves(resolve_config(folder.config).config)
        now = leaves(config)
        changed = [
            f"{key}: {before.get(key)!r} in the run folder, {value!r} now"
            for key, value in now.items()
            if key.startswith(IDENTITY) and before.get(key) != value
        ]
        if changed:
            raise ConfigError(
                f"{folder.path} holds another run; give this one its own --run-dir, or take these back:\n  "
                + "\n  ".join(changed)
            )
    replace_file(folder.config, resolved_yaml(config, resolved.provenance))
    replace_file(folder.versions, json.dumps(package_versions(), indent=1))


def replace_file(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def show_summary(folder: RunFolder) -> None:
    """Held-out accuracy and tokens before and after, if the run measured them."""
    from agpo_megatron.observe.summary import render_summary

    render_summary(folder.path)


if __name__ == "__main__":
    sys.exit(main())
