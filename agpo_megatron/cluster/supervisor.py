"""Local supervisor: the roles of one run as subprocesses of one machine.

The same three roles that Slurm starts on a cluster. It holds no state of the run: it starts the roles, restarts a
rollout server that dies after it has served, and ends everything as soon as the controller or a trainer rank ends.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from agpo_megatron.cluster.processes import (
    Role,
    RunningRole,
    free_port,
    log_tail,
    python_module,
    signal_group,
    start,
    stop_all,
)
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.config.schema import Config
from agpo_megatron.rollout.server import refuse_port_in_use, server_command

log = logging.getLogger(__name__)
SERVER_RESTARTS = 3
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Culprit:
    """The role whose end ended the run."""

    name: str
    exit_code: int
    log: Path | None

    def message(self) -> str:
        how = (
            f"was killed by signal {-self.exit_code}"
            if self.exit_code < 0
            else f"exited with code {self.exit_code}"
        )
        text = f"{self.name} {how}; the other processes have been stopped. The same command continues the run."
        tail = log_tail(self.log)
        return f"{text}\n--- end of {self.log} ---\n{tail}" if tail else text


class Interrupted(Exception):
    """SIGTERM or SIGINT reached the supervisor."""


def local_roles(config: Config, folder: RunFolder, mode: str, extra: Sequence[str]) -> list[Role]:
    """Controller, trainer ranks and rollout servers for ``mode`` (train, sft, eval, replay)."""
    controller_port, master_port = free_port(), free_port()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    shared = {
        "AGPO_CONTROLLER_URL": f"http://127.0.0.1:{controller_port}",
        "AGPO_TOKEN": secrets.token_hex(16),
        "AGPO_STARTED": stamp,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    roles, urls = [], []
    if mode in ("train", "eval"):
        for index in range(config.rollout.servers):
            port = config.rollout.port + index if config.rollout.port else free_port()
            refuse_port_in_use("127.0.0.1", port)
            launch = server_command(config, config.model.path, port=port, index=index)
            path = folder.logs / f"rollout-{index}.{stamp}"
            roles.append(
                Role(f"rollout server {index}", launch.argv, {**shared, **launch.env}, path)
            )
            urls.append(f"http://127.0.0.1:{port}")
    if mode != "eval":
        world = config.policy.world_size
        for rank in range(world):
            env = {
                **shared,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(master_port),
            }
            argv = python_module("agpo_megatron.trainer", str(folder.config), mode)
            roles.append(
                Role(f"trainer rank {rank}", argv, env, folder.logs / f"trainer-{rank}.{stamp}")
            )
    argv = python_module("agpo_megatron.controller", str(folder.config), mode, *extra)
    env = {**shared, "AGPO_SERVERS": json.dumps(urls)}
    roles.append(Role("controller", argv, env, None))
    return roles


def supervise(roles: Sequence[Role], folder: RunFolder) -> Culprit | None:
    """Run the roles to the end. None when the controller finished its work, else who ended the run.

    Every process has ended when this returns or raises.
    """
    running: list[RunningRole] = []

    def interrupt(number: int, _frame: object) -> None:
        raise Interrupted(signal.Signals(number).name)

    before = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        for role in roles:  # one by one: what has started is stopped if the next one cannot start
            running.append(start(role))
        write_processes(running, folder)
        return watch(running, folder)
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        stop_all(running)
        folder.processes.unlink(missing_ok=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def watch(running: list[RunningRole], folder: RunFolder) -> Culprit | None:
    """Wait for the end of the run; restarts servers meanwhile."""
    while True:
        time.sleep(POLL_SECONDS)
        for index, role in enumerate(running):
            code = role.process.poll()
            if code is None or (code == 0 and is_trainer(role)):
                continue  # a trainer leaves with 0 when the controller has told it to
            if code == 0 and role.role.name == "controller":
                return None
            if not may_restart(role, folder):
                return first_culprit(running)
            log.warning("%s ended with code %d; starting it again", role.role.name, code)
            signal_group(role, signal.SIGKILL)  # what the dead server left in its process group
            running[index] = replace(start(role.role), restarts=role.restarts + 1)
            write_processes(running, folder)


def is_trainer(role: RunningRole) -> bool:
    return role.role.name.startswith("trainer")


def may_restart(role: RunningRole, folder: RunFolder) -> bool:
    """A rollout server that dies once serving is restarted a few times; one that cannot start is a bad set-up."""
    return (
        role.role.name.startswith("rollout server")
        and role.restarts < SERVER_RESTARTS
        and serving_marker(folder, role.role.env["AGPO_STARTED"]).exists()
    )


def serving_marker(folder: RunFolder, started: str) -> Path:
    """Touched by the controller once every server has generated for the first time in this start of the run."""
    return folder.logs / f"serving.{started}"


def first_culprit(running: Sequence[RunningRole]) -> Culprit:
    """Who began it, of all that have ended: a signal is a cause, an exit code mostly a consequence, and the controller
    fails because of another role."""
    time.sleep(2 * POLL_SECONDS)
    ended = [(role, code) for role in running if (code := role.process.poll()) is not None]
    guilty = [(role, code) for role, code in ended if code != 0 or not is_trainer(role)]
    role, code = min(guilty, key=lambda g: (g[1] >= 0, g[0].role.name == "controller"))
    return Culprit(role.role.name, code, role.role.log)


def write_processes(running: Sequence[RunningRole], folder: RunFolder) -> None:
    """processes.json: role -> pid, for py-spy, kill and curiosity."""
    table = {role.role.name: role.process.pid for role in running}
    folder.processes.write_text(json.dumps({"supervisor": os.getpid(), **table}, indent=1))


def run_locally(config: Config, folder: RunFolder, mode: str, extra: Sequence[str] = ()) -> int:
    """Start and supervise a whole run on this machine; returns the exit code for the shell."""
    folder.logs.mkdir(parents=True, exist_ok=True)
    roles = local_roles(config, folder, mode, extra)
    try:
        culprit = supervise(roles, folder)
    except Interrupted as signal_name:
        sys.stderr.write(f"stopped by {signal_name}; the same command continues the run\n")
        return 130
    if culprit is None:
        return 0
    sys.stderr.write(culprit.message() + "\n")
    return 1
