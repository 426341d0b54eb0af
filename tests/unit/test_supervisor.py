"""The local supervisor with real processes: nobody outlives the owner, the culprit is named."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from agpo_megatron.cluster.processes import Role, free_port
from agpo_megatron.cluster.supervisor import serving_marker, supervise
from agpo_megatron.config.run_folder import RunFolder


def role(name: str, code: str, log: Path | None = None) -> Role:
    return Role(name, [sys.executable, "-c", code], {"AGPO_STARTED": "now"}, log)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "logs").mkdir()
    return RunFolder(tmp_path)


SLEEP = "import time; time.sleep(60)"
CHILDREN = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', '{SLEEP}']); time.sleep(60)"


OTHERS: set[int] = set()


@pytest.fixture(autouse=True)
def only_our_own_children() -> None:
    OTHERS.update(p.pid for p in psutil.Process().children(recursive=True))


def alive_children() -> list[psutil.Process]:
    """Of the test that is running; pools of other tests in this process may live on."""
    children = psutil.Process().children(recursive=True)
    return [p for p in children if p.pid not in OTHERS and p.status() != psutil.STATUS_ZOMBIE]


def test_the_run_ends_well_with_the_controller_and_leaves_nobody(folder: RunFolder) -> None:
    roles = [role("trainer rank 0", CHILDREN), role("controller", "import time; time.sleep(0.5)")]
    assert supervise(roles, folder) is None
    assert alive_children() == []
    assert not folder.processes.exists()


def test_a_dead_trainer_ends_the_run_and_is_named_with_its_log(folder: RunFolder) -> None:
    log = folder.logs / "trainer-1"
    roles = [
        role("trainer rank 1", "import time; time.sleep(.3); raise SystemExit('bad layout')", log),
        role("controller", SLEEP),
    ]
    culprit = supervise(roles, folder)
    assert culprit is not None and (culprit.name, culprit.exit_code) == ("trainer rank 1", 1)
    assert "bad layout" in culprit.message()
    assert alive_children() == []


def test_a_controller_that_fails_because_of_a_trainer_names_the_trainer(folder: RunFolder) -> None:
    roles = [
        role("controller", "import time; time.sleep(.3); raise SystemExit(1)"),
        role("trainer rank 0", "import time; time.sleep(.35); raise SystemExit(9)"),
    ]
    culprit = supervise(roles, folder)
    assert culprit is not None and (culprit.name, culprit.exit_code) == ("trainer rank 0", 9)


def test_the_rank_that_was_killed_is_named_not_the_one_that_failed_with_it(
    folder: RunFolder,
) -> None:
    roles = [
        role("trainer rank 0", "import time; time.sleep(.32); raise SystemExit(1)"),
        role("trainer rank 1", "import os, time; time.sleep(.3); os.kill(os.getpid(), 9)"),
        role("controller", SLEEP),
    ]
    culprit = supervise(roles, folder)
    assert culprit is not None and (culprit.name, culprit.exit_code) == ("trainer rank 1", -9)


def test_a_server_that_ends_without_an_error_ends_the_run_too(folder: RunFolder) -> None:
    culprit = supervise([role("rollout server 0", "pass"), role("controller", SLEEP)], folder)
    assert culprit is not None and (culprit.name, culprit.exit_code) == ("rollout server 0", 0)


def test_what_has_started_is_stopped_when_the_next_role_cannot_start(folder: RunFolder) -> None:
    before = signal.getsignal(signal.SIGINT)
    missing = Role("controller", ["/no/such/program"], {}, None)
    with pytest.raises(FileNotFoundError):
        supervise([role("trainer rank 0", SLEEP), missing], folder)
    assert alive_children() == []
    assert signal.getsignal(signal.SIGINT) is before


def test_a_port_is_free_and_below_those_that_connections_take() -> None:
    lowest_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = {free_port() for _ in range(20)}
    assert len(ports) > 10
    assert max(ports) < lowest_ephemeral
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", ports.pop()))


def test_a_server_that_cannot_start_ends_the_run(folder: RunFolder) -> None:
    roles = [role("rollout server 0", "raise SystemExit(4)"), role("controller", SLEEP)]
    culprit = supervise(roles, folder)
    assert culprit is not None and (culprit.name, culprit.exit_code) == ("rollout server 0", 4)


def test_a_server_that_dies_after_serving_is_restarted_a_few_times(folder: RunFolder) -> None:
    serving_marker(folder, "now").touch()
    starts = folder.path / "starts"
    code = f"open({str(starts)!r}, 'a').write('x'); raise SystemExit(5)"
    culprit = supervise([role("rollout server 0", code), role("controller", SLEEP)], folder)
    assert culprit is not None and culprit.name == "rollout server 0"
    assert starts.read_text() == "xxxx"  # one start, three restarts


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_killed_supervisor(tmp_path: Path, number: int) -> None:
    (tmp_path / "logs").mkdir()
    program = f"""
import sys
from pathlib import Path
from agpo_megatron.cluster.processes import Role, free_port
from agpo_megatron.cluster.supervisor import supervise
from agpo_megatron.config.run_folder import RunFolder
roles = [Role(name, [sys.executable, "-c", {SLEEP!r}], {{}}, None) for name in ("controller", "trainer rank 0")]
supervise(roles, RunFolder(Path({str(tmp_path)!r})))
"""
    owner = subprocess.Popen([sys.executable, "-c", program])
    table = tmp_path / "processes.json"
    deadline = time.monotonic() + 20
    while not table.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    pids = list(json.loads(table.read_text()).values())
    assert len(pids) == 3
    os.kill(owner.pid, number)
    owner.wait(timeout=20)
    deadline = time.monotonic() + 10
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(psutil.pid_exists, pids))
