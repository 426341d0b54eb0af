"""Nothing outlives its role, whatever is killed: small trees of sleeping processes under a real supervisor."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from agpo_megatron.cluster.keeper import die_with_parent
from agpo_megatron.cluster.processes import Role
from agpo_megatron.cluster.roles import machine_plan
from agpo_megatron.cluster.start_folder import StartFolder
from agpo_megatron.cluster.supervisor import Supervisor
from agpo_megatron.config import Config
from agpo_megatron.config.run_folder import RunFolder

pytestmark = pytest.mark.processes

HOST = "localhost"
SECONDS = 10.0
SERVER = "rollout server 0"
TREE = """
# ROLE MARK PLACE: the role, a child, and one that is orphaned, in a session of its own and with a wiped environment.
import os, sys, time
role, mark, place = sys.argv[1:]
def run(place, env):
    if os.fork() == 0:
        os.execve(sys.executable, [sys.executable, "-I", "-S", __file__, role, mark, place], env)
if place == "role":
    run("child", os.environ)
    run("between", os.environ)
    os.wait()
if place == "between":
    os.setsid()
    run("orphan", {})
    os._exit(0)
time.sleep(120)
"""
PLACES = ("supervisor", "outer keeper", "inner keeper", "role", "child", "orphan")
KEEPING = ("supervisor", "outer keeper", "inner keeper", "role")


@pytest.fixture
def start(tmp_path: Path) -> StartFolder:
    config = Config.model_validate({"model": {"path": "m"}, "data": {"path": "d"}})
    plan = machine_plan(config, HOST, "train")
    return StartFolder.create(RunFolder(tmp_path / "run"), "now", plan, config)


def tree_role(name: str, folder: Path, mark: str) -> Role:
    program = folder / "tree.py"
    program.write_text(TREE)
    argv = [sys.executable, "-I", "-S", str(program), name, mark, "role"]
    return Role(name, argv, {"AGPO_START": str(folder)}, None)


def marked(mark: str) -> dict[tuple[str, str], psutil.Process]:
    """Every process of a tree, by role and place."""
    found = {}
    for process in psutil.process_iter():
        try:
            line = process.cmdline()  # of a zombie there is none
            if mark in line and line[-1] in PLACES:
                found[line[-3], line[-1]] = process
        except psutil.Error:
            continue
    return found


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def alive(processes: Iterable[psutil.Process]) -> list[str]:
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(str(process))
    return found


class Tree:
    """A supervisor, in a fork of this process, of a server and a controller with all that they start."""

    def __init__(self, start: StartFolder) -> None:
        self.mark = str(start.path)
        start.serving.touch()  # so that the server may be started again
        names = (SERVER, "controller")
        roles = [tree_role(name, start.path, self.mark) for name in names]
        self.pid = os.fork()
        if self.pid == 0:
            try:
                die_with_parent()
                if os.fork() == 0:  # a child of the supervisor's that is no role
                    die_with_parent()
                    time.sleep(120)
                Supervisor(start, HOST).supervise(roles)
            finally:  # this is a copy of pytest, and must not go on as one
                os._exit(0)
        until(lambda: len(marked(self.mark)) == 6 and start.processes(HOST).exists(), "it starts")
        until(lambda: all(map(self._adopted, names)), "orphans come to the keeper")
        self.supervisor = psutil.Process(self.pid)
        (self.bystander,) = [p for p in self.supervisor.children() if not p.children()]
        self.by_place = {name: self._places(name) for name in names}

    def _adopted(self, name: str) -> bool:
        found = marked(self.mark)
        return found[name, "orphan"].ppid() == found[name, "role"].ppid()

    def _places(self, name: str) -> dict[str, psutil.Process]:
        found = marked(self.mark)
        role = found[name, "role"]
        inner = role.parent()
        assert inner is not None
        outer = inner.parent()
        assert outer is not None and outer.ppid() == self.pid
        assert found[name, "orphan"].environ() == {}
        places = {"supervisor": self.supervisor, "outer keeper": outer, "inner keeper": inner}
        return places | {p: found[name, p] for p in ("role", "child", "orphan")}

    def members(self, name: str) -> list[psutil.Process]:
        return [p for place, p in self.by_place[name].items() if place != "supervisor"]

    def end(self) -> None:
        if self.supervisor.is_running():
            os.kill(self.pid, signal.SIGTERM)
        os.waitpid(self.pid, 0)


def check(start: StartFolder, *victims: tuple[str, str]) -> None:
    """Kill ``victims``, each a role and a place; what belongs to whoever cannot live on must be gone."""
    tree = Tree(start)
    processes = [tree.by_place[name][place] for name, place in victims]
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # the first may have taken the second with it
            process.kill()
    everything = [p for name in tree.by_place for p in tree.members(name)]
    if tree.supervisor in processes:
        os.waitpid(tree.pid, 0)
        until(lambda: not alive(everything), f"all to be gone, but there is {alive(everything)}")
        assert not marked(tree.mark)
        return
    ended = {name for name, place in victims if place in KEEPING}
    gone = processes + [p for name in ended for p in tree.members(name)]
    until(lambda: not alive(gone), f"these to be gone: {alive(gone)}")
    until(lambda: {(name, "role") for name in ended} <= marked(tree.mark).keys(), "a new start")
    stay = [p for name in set(tree.by_place) - ended for p in tree.members(name) if p not in gone]
    assert len(alive(stay)) == len(stay), "another role goes on"
    assert tree.bystander.is_running()
    assert {e["code"] for e in start.exits() if e["restarted"]} <= {-signal.SIGKILL}
    tree.end()
    everything += list(marked(tree.mark).values())
    until(lambda: not alive(everything), f"all to be gone, but there is {alive(everything)}")
    assert not marked(tree.mark)


@pytest.mark.parametrize("place", PLACES)
def test_one_process_is_killed(start: StartFolder, place: str) -> None:
    check(start, (SERVER, place))


@pytest.mark.parametrize("places", list(itertools.combinations(KEEPING, 2)), ids="+".join)
def test_two_of_those_above_the_orphans_are_killed(
    start: StartFolder, places: tuple[str, str]
) -> None:
    check(start, *((SERVER, place) for place in places))


EVERY_PLACE = [(name, place) for name in (SERVER, "controller") for place in PLACES[1:]]


@pytest.mark.full
@pytest.mark.parametrize("seed", range(25))
def test_a_random_pair_is_killed(start: StartFolder, seed: int) -> None:
    first, second = random.Random(seed).sample([(SERVER, "supervisor"), *EVERY_PLACE], 2)
    check(start, first, second)
