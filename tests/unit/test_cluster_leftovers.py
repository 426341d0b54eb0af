"""A start ends, and names, what earlier starts of its run left on the node, and nobody else's processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from agpo_megatron.cluster import node
from agpo_megatron.cluster.leftovers import Leftover, end_leftovers
from agpo_megatron.cluster.node import MACHINE, PreflightFailed, make_room
from agpo_megatron.cluster.roles import machine_plan
from agpo_megatron.cluster.start_folder import StartFolder
from agpo_megatron.config import Config
from agpo_megatron.config.run_folder import RunFolder

pytestmark = pytest.mark.processes

SLEEP = "import time; time.sleep(120)"
TITLED = f"import setproctitle; setproctitle.setproctitle('sglang::scheduler'); {SLEEP}"
PARENT = f"""
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-I", "-S", "-c", {SLEEP!r}], env={{}}, stdout=subprocess.DEVNULL)
{SLEEP}
"""
CONFIG = Config.model_validate({"model": {"path": "m"}, "data": {"path": "d"}})
PLAN = machine_plan(CONFIG, MACHINE, "train")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture
def old(run: RunFolder) -> StartFolder:
    return StartFolder.create(run, "old", PLAN, CONFIG)


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def sleeper(
    started: list[subprocess.Popen[bytes]],
    code: str,
    start: Path | None,
    log: Path | None = None,
    mode: str = "ab",
) -> psutil.Process:
    """A process of the start in the folder ``start``, by its environment; with ``log``, opened so, as its output."""
    env = {k: v for k, v in os.environ.items() if k != "AGPO_START"}
    env |= {"AGPO_START": str(start)} if start else {}
    with open(log or os.devnull, mode) as output:
        command = [sys.executable, "-c", code]
        started.append(subprocess.Popen(command, env=env, stdout=output, stderr=output))
    return psutil.Process(started[-1].pid)


def has_title(process: psutil.Process) -> bool:
    return process.cmdline()[:1] == ["sglang::scheduler"]


def test_what_an_earlier_start_left_is_ended_and_named(
    run: RunFolder,
    old: StartFolder,
    started: list[subprocess.Popen[bytes]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "link").symlink_to(run.path)
    plain = sleeper(started, SLEEP, tmp_path / "link" / "logs" / "old")
    titled = sleeper(started, TITLED, old.path, old.log("rollout server 0"))
    parent = sleeper(started, PARENT, old.path)
    deadline = time.monotonic() + 20
    while not (has_title(titled) and parent.children()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert "AGPO_START" not in titled.environ(), "a title wipes the environment"
    (child,) = parent.children()
    start = StartFolder.create(run, "new", PLAN, CONFIG)
    make_room(start, PLAN, MACHINE, CONFIG)
    assert not [p for p in (plain, titled, parent, child) if Leftover(p, "", "", False).is_alive()]
    said = capsys.readouterr().err
    assert said.count("agpo-megatron: ended what was left: ") == 4
    assert f"sglang::scheduler (pid {titled.pid}) of start old\n" in said
    make_room(start, PLAN, MACHINE, CONFIG)
    assert capsys.readouterr().err == ""


def test_a_stranger_is_left_alone(
    run: RunFolder, old: StartFolder, started: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """Of this start itself, of another run, of a run inside this one, a reader of a log, a writer of another file."""
    other = StartFolder.create(RunFolder(tmp_path / "run2"), "old", PLAN, CONFIG)
    inside = StartFolder.create(RunFolder(run.path / "eval"), "old", PLAN, CONFIG)
    log = old.log("rollout server 0")
    log.touch()
    strangers = [
        sleeper(started, SLEEP, run.logs / "new"),
        sleeper(started, SLEEP, other.path, log),
        sleeper(started, SLEEP, inside.path),
        sleeper(started, SLEEP, run.logs),
        sleeper(started, SLEEP, None, old.path / "notes.log"),
        sleeper(started, SLEEP, None, log, "rb"),
    ]
    time.sleep(0.3)
    assert end_leftovers(run, "new") == ([], [])
    assert all(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in strangers)


def test_a_process_of_another_user_is_left_alone(
    run: RunFolder, old: StartFolder, started: list[subprocess.Popen[bytes]]
) -> None:
    if os.getuid():
        pytest.skip("becoming another user needs root")
    stranger = sleeper(started, f"import os; os.setuid(65534); {SLEEP}", old.path)
    deadline = time.monotonic() + 20
    while stranger.uids().real == 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert end_leftovers(run, "new") == ([], [])
    assert stranger.is_running()


def test_a_start_does_not_begin_beside_what_does_not_end(
    run: RunFolder, old: StartFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = Leftover(psutil.Process(), "sglang::scheduler", "old", False)
    monkeypatch.setattr(node, "end_leftovers", lambda *_: ([stuck], [stuck]))
    start = StartFolder.create(run, "new", PLAN, CONFIG)
    with pytest.raises(PreflightFailed, match="does not end: sglang::scheduler .pid .* start old"):
        make_room(start, PLAN, MACHINE, CONFIG)
    ended = start.ended()
    assert ended is not None and ended["outcome"] == "failed"
