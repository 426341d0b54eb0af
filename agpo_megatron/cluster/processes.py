"""Roles as child processes, of which nothing outlives its owner: behind keepers (keeper.py)."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from agpo_megatron.cluster.keeper import UNHEARD

KEEPER = Path(__file__).with_name("keeper.py")
FIRST_PORT = 12000
EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
KILL_SECONDS = 60.0  # for two keepers, of whom each waits for a while


def free_port(address: str = "127.0.0.1", taken: Collection[int] = ()) -> int:
    """Find a free port of ``address`` that the kernel gives to nobody who asks for any port.

    A server binds its port a minute after it was chosen. Meanwhile every outgoing connection takes one from the
    ephemeral range, so the choice is made below that range. ``taken``: chosen for something else, and perhaps not bound
    yet. Raises OSError when nothing is free there.
    """
    lowest_ephemeral = int(EPHEMERAL_RANGE.read_text().split()[0])
    for _ in range(200):
        port = random.randrange(FIRST_PORT, lowest_ephemeral)
        if port in taken:
            continue
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                sock.bind((address, port))
                return port
    raise OSError(f"no free port between {FIRST_PORT} and {lowest_ephemeral}; set rollout.port")


@dataclass(frozen=True)
class Role:
    """One process to start. ``log``: file that takes stdout and stderr; None inherits the terminal."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    log: Path | None


@dataclass
class RunningRole:
    """A role and its keepers. ``process``: the outer keeper, which ends as the role does, once none of its
    descendants is left. ``tie``: closed, it has the keepers end them all."""

    role: Role
    process: subprocess.Popen[bytes]
    tie: socket.socket
    restarts: int = 0
    since: float = field(default_factory=time.monotonic)
    started: float = field(default_factory=time.time)
    """By the clock, in seconds since the epoch: comparable with other nodes' up to their skew."""

    @cached_property
    def pids(self) -> tuple[int, int] | None:
        """Pids of the inner keeper and of the role; None if the keepers did not get to start it."""
        with contextlib.suppress(ConnectionResetError, TimeoutError):
            # Left where it is, for the next look if a signal interrupts this one.
            if said := self.tie.recv(64, socket.MSG_PEEK).split():
                return int(said[0]), int(said[1])
        return None

    @property
    def pid(self) -> int | None:
        """Pid of the role, which is that of its process group."""
        return self.pids[1] if self.pids else None

    def send_signal(self, number: signal.Signals, group: bool = False) -> None:
        """Signal the role, or all its process group, unless it has ended."""
        if self.process.poll() is None and self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(self.pid, number)


def start(role: Role, deaf: bool = False) -> RunningRole:
    """Start a role behind its keepers, which tie it to this process's life.

    ``deaf``: SIGUSR1 and SIGTERM do not reach it or its children: Slurm sends them to every process of a step, and they
    are meant for the supervisor. Raises FileNotFoundError where there is no such program.
    """
    env = {**os.environ, **role.env}
    if shutil.which(role.argv[0], path=env.get("PATH")) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), role.argv[0])
    hearing = "deaf" if deaf else "hearing"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(KILL_SECONDS)
    with (
        theirs,
        open(role.log, "ab") if role.log else contextlib.nullcontext() as output,
    ):
        ours.send(b"\0".join(os.fsencode(argument) for argument in role.argv))
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(KEEPER), role.name, hearing],
            env=env,
            stdin=theirs.fileno(),
            stdout=output,
            stderr=output,
            preexec_fn=become_keeper,
        )
    return RunningRole(role, process, ours)


def become_keeper() -> None:
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, UNHEARD)


def stop_all(running: Sequence[RunningRole], grace: float = 5.0) -> None:
    """Send SIGTERM to every process group, and have the keepers end what is left after ``grace`` seconds; returns when
    all are gone."""
    for role in running:
        role.send_signal(signal.SIGTERM, group=True)
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and any(r.process.poll() is None for r in running):
        time.sleep(0.05)
    for role in running:
        role.tie.close()
    for role in running:
        role.process.wait(KILL_SECONDS)


def log_tail(path: Path | None, lines: int = 15) -> str:
    """Read the last lines of a log, for the message that names the culprit."""
    if path is None or not path.exists():
        return ""
    text = path.read_bytes()[-16384:].decode(errors="replace")
    return "\n".join(text.splitlines()[-lines:])


def python_module(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]
