"""``kill -9`` of every process of a real run, one at a time and two at once: nothing of it is left."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from kills import command
from tiny_run import write_run

from agpo_megatron.cluster.keeper import be_subreaper, die_with_parent

SECONDS = 15.0
PAIRS = 4
TITLES = ("sglang::scheduler #0", "sglang::detokenizer #0")


@pytest.fixture
def adopting() -> Iterator[None]:
    """Whatever outlives a run becomes a child of this process, marked or not."""
    be_subreaper()
    yield
    be_subreaper(False)


def kind(process: psutil.Process) -> str:
    """What a process is, whatever its run: its command or title, without the folders in it."""
    parts = [Path(part).name for part in process.cmdline()[:5] if part]
    return " ".join(part for part in parts if not part.isdigit())  # numbers of pipes differ


def tree(run: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    """Every process of a run, by what it is; equal ones numbered by age."""
    found: dict[str, psutil.Process] = {}
    top = psutil.Process(run.pid)
    processes = [top, *top.children(recursive=True)]
    for process in sorted(processes, key=lambda p: (p.create_time(), p.pid)):
        with suppress(psutil.Error):
            name = kind(process)
            number = sum(other.rpartition(" ")[0] == name for other in found)
            found[f"{name} #{number}"] = process
    return found


def alive(processes: set[psutil.Process]) -> list[str]:
    found = []
    for process in processes:
        with suppress(psutil.Error):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{kind(process)} (pid {process.pid}, parent {process.ppid()})")
    return found


def children_of_this() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def start_run(
    config: Path, run_dir: Path, names: list[str]
) -> tuple[subprocess.Popen[str], dict[str, psutil.Process]]:
    """Start the run; return it and its processes once those called ``names`` are among them."""
    argv = command(config, run_dir)
    run = subprocess.Popen(
        argv,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,
    )
    deadline = time.monotonic() + 400
    while not set(names) <= (found := tree(run)).keys():
        if run.poll() is not None or time.monotonic() > deadline:
            run.kill()
            pytest.fail(f"{names} are not all in {list(found)}\n{run.communicate()[1]}")
        time.sleep(0.1)
    return run, found


def kill_and_look(
    config: Path, run_dir: Path, names: list[str], before: set[psutil.Process]
) -> str:
    """Kill these processes of a run at once, end the run a little later, and look for what is left of it."""
    with_servers = any(re.search("train config|rollout server|sglang", name) for name in names)
    run, found = start_run(config, run_dir, [*names, *(TITLES if with_servers else ())])
    for name in names:
        with suppress(psutil.NoSuchProcess):  # the first may have taken the second with it
            found[name].kill()
    seen = set(found.values())
    deadline = time.monotonic() + 8  # in which it ends, or restarts what was killed
    while run.poll() is None and time.monotonic() < deadline:
        seen |= set(psutil.Process(run.pid).children(recursive=True))
        time.sleep(0.1)
    how = "ended by itself" if run.poll() is not None else "went on"
    if run.poll() is None:
        os.kill(run.pid, signal.SIGTERM)
    run.communicate(timeout=60)
    ended = time.monotonic()
    while (
        left := alive(seen | (children_of_this() - before))
    ) and time.monotonic() < ended + SECONDS:
        time.sleep(0.05)
    assert not left, f"after kill -9 of {names} {SECONDS:g} s later there is {left}"
    return f"{how}, code {run.returncode}, all gone {time.monotonic() - ended:.1f} s after it"


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_nothing_is_left_whichever_processes_are_killed(
    tmp_path: Path, adopting: None, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"train.steps": 100, "run.checkpoint_every": 100, "guards.reward_drop": None}
    config = write_run(tmp_path, **changes)
    before = children_of_this()
    run, found = start_run(config, tmp_path / "look", list(TITLES))
    names = list(found)
    wiped = [name for name, process in found.items() if "AGPO_START" not in process.environ()]
    os.kill(run.pid, signal.SIGTERM)
    run.communicate(timeout=60)
    assert sum("keeper.py" in name for name in names) >= 8 and len(names) >= 15, names
    chance = random.Random(7)
    server = [name for name in names if "rollout server" in name]
    pairs = [[names[0], keeper] for keeper in server]  # the supervisor and either keeper
    pairs += [chance.sample(names, 2) for _ in range(PAIRS)]
    for number, victims in enumerate([*([n] for n in names), *pairs]):
        said = kill_and_look(config, tmp_path / f"run-{number}", victims, before)
        with capsys.disabled():
            sys.stdout.write(f"\n{' + '.join(victims)}: {said}")
    with capsys.disabled():
        sys.stdout.write(f"\nwithout AGPO_START in their environment: {wiped}\n")
