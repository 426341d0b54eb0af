"""Child processes that never outlive their owner."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PR_SET_PDEATHSIG = 1
FIRST_PORT = 12000
EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
KILL_SECONDS = 60.0  # a process in uninterruptible I/O ends late even after SIGKILL


def die_with_parent() -> None:
    """Ask the kernel to SIGKILL this process when its parent dies, however the parent dies (Linux prctl)."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def free_port(address: str = "127.0.0.1") -> int:
    """Find a free port of ``address`` that the kernel gives to nobody who asks for any port.

    A server binds its port a minute after it was chosen. Meanwhile every outgoing connection takes one from the
    ephemeral range, so the choice is made below that range. Raises OSError when nothing is free there.
    """
    lowest_ephemeral = int(EPHEMERAL_RANGE.read_text().split()[0])
    for _ in range(200):
        port = random.randrange(FIRST_PORT, lowest_ephemeral)
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
    role: Role
    process: subprocess.Popen[bytes]
    restarts: int = 0
    since: float = field(default_factory=time.monotonic)
    started: float = field(default_factory=time.time)
    """By the clock, in seconds since the epoch: comparable with other nodes' up to their skew."""


def start(role: Role, deaf: bool = False) -> RunningRole:
    """Start a role in a process group of its own, tied to this process's life.

    ``deaf``: SIGUSR1 and SIGTERM do not reach it or its children: Slurm sends them to every process of a step, and they
    are meant for the supervisor.
    """
    with open(role.log, "ab") if role.log else contextlib.nullcontext() as output:
        process = subprocess.Popen(
            list(role.argv),
            env={**os.environ, **role.env},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=become_deaf if deaf else become_own_group,
        )
    return RunningRole(role, process)


def become_own_group() -> None:
    os.setpgid(0, 0)
    die_with_parent()


def become_deaf() -> None:
    become_own_group()
    # Blocked, not ignored: SGLang installs handlers, which would undo the latter.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGTERM))


def stop_all(running: Sequence[RunningRole], grace: float = 5.0) -> None:
    """Send SIGTERM to every process group, SIGKILL after ``grace`` seconds; returns when all are gone."""
    for role in running:
        signal_group(role, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and any(r.process.poll() is None for r in running):
        time.sleep(0.05)
    for role in running:
        signal_group(role, signal.SIGKILL)  # also what a dead leader left behind in its group
        role.process.wait(KILL_SECONDS)


def signal_group(role: RunningRole, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(role.process.pid, number)


def log_tail(path: Path | None, lines: int = 15) -> str:
    """Read the last lines of a log, for the message that names the culprit."""
    if path is None or not path.exists():
        return ""
    text = path.read_bytes()[-16384:].decode(errors="replace")
    return "\n".join(text.splitlines()[-lines:])


def python_module(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]
