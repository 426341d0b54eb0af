"""Commands of the Slurm batch script, not meant for hands: ``python -m agpo_megatron.cluster {plan,node,conclude}``.

    plan CONFIG [--mode MODE] [--set a.b=c] [--run-dir DIR] [--dry-run]   roles of this job's nodes; start folder
    node START_FOLDER                                                     one node, one task of an srun step
    conclude START_FOLDER                                                 after the steps: how it ended

Exit codes: ``plan`` 0 go on, 2 bad input; ``conclude`` 0 finished, 75 requeue, 1 give up.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from agpo_megatron.cluster.attempts import conclude, failed_in_a_row
from agpo_megatron.cluster.claim import already_done, only_command_on, place, refuse_another_run
from agpo_megatron.cluster.node import PreflightFailed, run_node
from agpo_megatron.cluster.preflight import describe
from agpo_megatron.cluster.roles import LaunchError, Plan, cluster_plan, slurm_plan
from agpo_megatron.cluster.start_folder import StartFolder
from agpo_megatron.cluster.supervisor import STOPPED
from agpo_megatron.config import Config, ConfigError
from agpo_megatron.config.checks import check_config, check_inputs
from agpo_megatron.config.loading import resolve_config
from agpo_megatron.config.record import package_versions, resolved_yaml
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.files import write_durably
from agpo_megatron.journal import JournalError
from agpo_megatron.observe.best import check_keep_best
from agpo_megatron.observe.summary import render_summary


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m agpo_megatron.cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan")
    plan.add_argument("config")
    plan.add_argument("--set", action="append", default=[], dest="overrides")
    plan.add_argument("--run-dir")
    plan.add_argument("--mode", choices=("train", "sft", "eval"), default="train")
    plan.add_argument("--dry-run", action="store_true")
    for name in ("node", "conclude"):
        commands.add_parser(name).add_argument("start", type=Path)
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "plan":
            return make_plan(arguments)
        start = StartFolder(arguments.start)
        return node(start) if arguments.command == "node" else end(start)
    except (ConfigError, LaunchError, JournalError, PreflightFailed, OSError) as error:
        sys.stderr.write(f"agpo-megatron: {error}\n")
        return 2


def make_plan(arguments: argparse.Namespace) -> int:
    """Check everything that can be checked before a process starts; print what the batch script needs, for its eval."""
    run_dir = arguments.run_dir and os.path.abspath(arguments.run_dir)
    resolved = resolve_config(arguments.config, arguments.overrides, run_dir)
    mode = arguments.mode
    config, folder = place(resolved.config, mode)
    check_keep_best(config)
    for warning in check_config(config):
        sys.stderr.write(f"warning: {warning}\n")
    if arguments.dry_run and "SLURM_JOB_ID" not in os.environ:
        plan = cluster_plan(
            config,
            [f"trainer{i}" for i in range(config.cluster.trainer_nodes)],
            [f"rollout{i}" for i in range(config.cluster.rollout_nodes)],
            mode,
        )
    else:
        plan = slurm_plan(os.environ, config, mode)
    sys.stderr.write(table(plan, config))
    if arguments.dry_run:
        sys.stdout.write(shell_variables(plan, "START_FOLDER"))
        return 0
    check_inputs(config, mode)
    folder.path.mkdir(parents=True, exist_ok=True)
    with only_command_on(folder):
        if mode != "eval":
            refuse_another_run(config, folder, mode)
        if already_done(config, folder, mode):
            sys.stderr.write(f"{folder.path} is complete; nothing to do\n")
            sys.stdout.write("start=\n")
            return 0
        if (failed := failed_in_a_row(folder)) >= config.cluster.attempts:
            # Asked again by hand: the count begins anew with this start if it gets anywhere.
            sys.stderr.write(f"warning: the last {failed} starts of {folder.path} failed\n")
        write_durably(folder.config, resolved_yaml(config, resolved.provenance).encode())
        write_durably(folder.versions, json.dumps(package_versions(), indent=1).encode())
        label = f"{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        start = StartFolder.create(folder, label, plan, config)
    sys.stdout.write(shell_variables(plan, str(start.path)))
    return 0


def shell_variables(plan: Plan, start: str) -> str:
    """Format assignments for bash: the start folder, and the hosts of every srun step."""
    return (
        f"start={shlex.quote(start)}\n"
        f"trainer_hosts=({' '.join(plan.trainer_hosts)})\n"
        f"rollout_hosts=({' '.join(plan.rollout_hosts)})\n"
    )


def table(plan: Plan, config: Config) -> str:
    """Format one line per node, and the sums."""
    width = max(len(node.host) for node in plan.nodes)
    lines = [f"  {node.host:<{width}}  {describe(node)}" for node in plan.nodes]
    policy = config.policy
    lines.append(
        f"{plan.world_size} trainer ranks (TP {policy.tensor_parallel} x PP {policy.pipeline_parallel} x CP "
        f"{policy.context_parallel} x DP {policy.data_parallel}) on {len(plan.trainer_hosts)} node(s), "
        f"{plan.server_count} rollout server(s) of TP {config.rollout.tensor_parallel} on "
        f"{len(plan.rollout_hosts) or len(plan.trainer_hosts)} node(s); controller and torch.distributed master on "
        f"{plan.master}, ports chosen free there when it starts"
    )
    return "\n".join(lines) + "\n"


def node(start: StartFolder) -> int:
    """Run this node; exit code 0 unless its roles failed, which also ends the step on the others (kill-on-bad-exit)."""
    host = os.environ["SLURMD_NODENAME"]
    if start.plan().master != host:
        outcome = run_node(start, host)
    else:
        with only_command_on(RunFolder(start.path.parents[1])):
            outcome = run_node(start, host)
    return {"finished": 0, "stopped": STOPPED, "failed": 1}[outcome]


def end(start: StartFolder) -> int:
    run = RunFolder(start.path.parents[1])
    conclusion = conclude(run, start, start.config().cluster.attempts)
    sys.stdout.write(f"agpo-megatron: {conclusion.message}\n")
    if conclusion.outcome == "finished":
        render_summary(run.path)
        return 0
    return STOPPED if conclusion.again else 1


if __name__ == "__main__":
    sys.exit(main())
