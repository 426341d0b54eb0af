"""Ends what earlier starts of a run have left on this node: only where all who keep a role were killed at once.

A process is known by its start: by AGPO_START in its environment, or, where it has wiped that (SGLang's processes do
when they take a title), by an output that is the log of a role in the start's folder. What descends from such a
process belongs to it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from agpo_megatron.cluster.keeper import PATIENCE
from agpo_megatron.cluster.processes import KEEPER
from agpo_megatron.config.run_folder import RunFolder

OUTPUTS = (1, 2)
ROLE_LOG = re.compile(r"(trainer|rollout)-\d+\.log")
WRITABLE = 0o200


@dataclass(frozen=True)
class Leftover:
    """A process of the start ``label``."""

    process: psutil.Process
    name: str
    label: str
    is_keeper: bool

    def is_alive(self) -> bool:
        """Say whether it still runs. One that nobody waits for (a container's first process may not) has ended."""
        try:
            return self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def __str__(self) -> str:
        return f"{self.name} (pid {self.process.pid}) of start {self.label}"


def end_leftovers(run: RunFolder, label: str) -> tuple[list[Leftover], list[Leftover]]:
    """Kill every process of this user that belongs to a start of ``run`` other than ``label``. Returns them, and those
    of them that do not end. Only for who knows that no other start of the run goes on."""
    ended: set[Leftover] = set()
    while found := set(leftovers(run, label)) - ended:  # again, for what was forked meanwhile
        for leftover in found:
            with suppress(psutil.Error):
                if not leftover.is_keeper:  # which ends with its role, and not before
                    leftover.process.kill()  # psutil refuses where the pid is another process's by now
        ended |= found
        deadline = time.monotonic() + PATIENCE
        while alive := [leftover for leftover in found if leftover.is_alive()]:
            if time.monotonic() > deadline:
                return _sorted(ended), _sorted(alive)
            time.sleep(0.05)
    return _sorted(ended), []


def _sorted(found: Iterable[Leftover]) -> list[Leftover]:
    return sorted(found, key=lambda leftover: leftover.process.pid)


def _name(process: psutil.Process) -> str:
    """Name a process by its command, or its title; ``python`` says little."""
    return " ".join(process.cmdline()[:4]).strip()[:80] or process.name()


def leftovers(run: RunFolder, label: str) -> Iterator[Leftover]:
    """Find the processes of starts of ``run`` other than ``label``."""
    logs = run.logs.resolve()
    spared = {os.getpid(), *(p.pid for p in psutil.Process().parents())}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            start = start_of(process, logs)
            if start is None or start.name == label:
                continue
            for one in (process, *process.children(recursive=True)):
                if one.pid not in spared and one.uids().real == os.getuid():
                    yield Leftover(one, _name(one), start.name, str(KEEPER) in one.cmdline())


def start_of(process: psutil.Process, logs: Path) -> Path | None:
    """Find the folder in ``logs`` of the start that a process belongs to; None if there is none."""
    if start := process.environ().get("AGPO_START"):
        path = Path(start).resolve()
        return path if path.parent == logs else None
    for number in OUTPUTS:
        link = Path(f"/proc/{process.pid}/fd/{number}")
        with suppress(OSError):
            target, written = link.readlink(), link.lstat().st_mode & WRITABLE
            if written and target.parent.parent == logs and ROLE_LOG.fullmatch(target.name):
                return target.parent
    return None
