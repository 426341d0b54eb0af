"""Describes who is doing what, for how long, in the newest start of a run, from its files: ``agpo-megatron status``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

from agpo_megatron.cluster.preflight import describe
from agpo_megatron.cluster.start_folder import StartFolder, latest_start, starts
from agpo_megatron.cluster.supervisor import first_culprit
from agpo_megatron.config import ConfigError
from agpo_megatron.config.run_folder import RunFolder


def describe_run(run: RunFolder) -> str:
    """Describe a run for the terminal. Raises ConfigError when there has been no start."""
    start = latest_start(run)
    if start is None:
        raise ConfigError(f"{run.path} holds no start of a run; nothing has been launched with it")
    number = len(list(starts(run)))
    began = json.loads((start.path / "began.json").read_text())["time"]
    lines = [f"start {number} ({start.label}), began {ago(began)}, {_outcome(start)}"]
    lines += [f"  {node.host}: {describe(node)}" for node in start.plan().nodes]
    lines += [
        f"{e['role']} on {e['host'] or 'this machine'} ended {ago(e['time'])} with code {e['code']}"
        + (", was started again" if e["restarted"] else "")
        for e in start.exits()
    ]
    return "\n".join([*lines, *describe_roles(start)]) + "\n"


def write_report(run: RunFolder, start: StartFolder, cause: str) -> None:
    """Write ``report.txt`` of a start that failed: the first culprit, then what every role was doing. Stacks are at the
    end of the roles' logs."""
    text = f"{cause}\n\n{describe_run(run)}"
    (start.path / "report.txt").write_text(text)


def _outcome(start: StartFolder) -> str:
    ended = start.ended()
    if ended is None:
        return "running" + (", asked to stop" if start.stop_requested.exists() else "")
    culprit = first_culprit(start)
    because = f"{culprit.name}, code {culprit.exit_code}" if culprit else ended["reason"]
    return f"{ended['outcome']} {ago(ended['time'])} ({because})"


def describe_roles(start: StartFolder) -> Iterator[str]:
    """Yield a line per role, as the controller knew it when it last wrote; nothing while it has not written."""
    if not start.status.exists():
        return
    status = json.loads(start.status.read_text())
    now = status["time"]
    yield f"as of {ago(now)}:"
    for phase in status["phases"]:
        limit = (
            f" of at most {phase['deadline'] - phase['since']:.0f} s" if phase["deadline"] else ""
        )
        yield f"  controller: {phase['name']} for {now - phase['since']:.0f} s{limit}"
    if status["command"]:
        yield f"  command under way: {status['command']}"
    for rank, state in status["ranks"].items():
        last = f", after {state['last']}" if state["last"] else ""
        yield (
            f"  trainer rank {rank}: {state['phase']} for {now - state['since']:.0f} s{last} "
            f"(heard {now - state['heard']:.0f} s before)"
        )
    for number, server in enumerate(status["servers"]):
        why = f", {server['reason']}" if server["reason"] else ""
        yield (
            f"  rollout server {number}: {server['state']} for {now - server['since']:.0f} s, "
            f"{server['in_flight']} samples in flight{why}"
        )


def ago(moment: float) -> str:
    return f"{time.time() - moment:.0f} s ago"
