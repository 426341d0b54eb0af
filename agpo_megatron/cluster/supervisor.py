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
    start,
    stop_all,
)
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.config.schema import Config
from agpo_megatron.rollout.server import refuse_port_in_use, server_command

log = logging.getLogger(__name__)
SERVER_RESTARTS = 3
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
            launch = server_command(
                config, served_model(config, folder, mode), port=port, index=index
            )
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


def served_model(config: Config, folder: RunFolder, mode: str) -> str:
    """What the servers load: the checkpoint training starts from, or for eval the trained policy if there is one."""
    if mode == "eval" and (folder.exported_model / "config.json").exists():
        return str(folder.exported_model)
    return config.model.path


def supervise(roles: Sequence[Role], folder: RunFolder) -> Culprit | None:
    """Run the roles to the end. None when the controller finished its work, else who ended the run.

    Every process has ended when this returns or raises.
    """
    running: list[RunningRole] = []

    def interrupt(number: int, _frame: object) -> None:
        raise Interrupted(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        running += [start(role) for role in roles]
        write_processes(running, folder)
        while True:
            time.sleep(POLL_SECONDS)
            for index, role in enumerate(running):
                code = role.process.poll()
                is_controller = role.role.name == "controller"
                if code is None or (code == 0 and not is_controller):
                    continue  # a trainer leaves with 0 when the controller has told it to
                if code == 0:
                    return None
                if not may_restart(role, folder):
                    return first_culprit(running, role, code)
                log.warning("%s ended with code %d; starting it again", role.role.name, code)
                running[index] = replace(start(role.role), restarts=role.restarts + 1)
                write_processes(running, folder)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        stop_all(running)
        folder.processes.unlink(missing_ok=True)


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


def first_culprit(running: Sequence[RunningRole], ended: RunningRole, code: int) -> Culprit:
    """A controller that fails usually fails because of another role: name that one if it has ended too."""
    if ended.role.name == "controller":
        time.sleep(2 * POLL_SECONDS)
        for role in running:
            other = role.process.poll()
            if other not in (None, 0) and role is not ended:
                return Culprit(role.role.name, other, role.role.log)
    return Culprit(ended.role.name, code, ended.role.log)


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
