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

from agpo_megatron.cluster import supervisor
from agpo_megatron.cluster.processes import Role, free_port
from agpo_megatron.cluster.roles import machine_plan
from agpo_megatron.cluster.start_folder import StartFolder
from agpo_megatron.cluster.supervisor import STOPPED, Culprit, Supervisor, first_culprit
from agpo_megatron.config import Config
from agpo_megatron.config.run_folder import RunFolder

pytestmark = pytest.mark.processes

HOST = "localhost"


def role(name: str, code: str, log: Path | None = None) -> Role:
    return Role(name, [sys.executable, "-c", code], {}, log)


@pytest.fixture
def start(tmp_path: Path) -> StartFolder:
    config = Config.model_validate({"model": {"path": "m"}, "data": {"path": "d"}})
    return StartFolder.create(
        RunFolder(tmp_path), "now", machine_plan(config, HOST, "train"), config
    )


def supervise(roles: list[Role], start: StartFolder, other_servers: int = 0) -> Culprit | None:
    outcome = Supervisor(start, HOST, other_servers=other_servers).supervise(roles)
    culprit = first_culprit(start)
    assert (culprit is not None) == (outcome == "failed")
    return culprit


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


def test_the_run_ends_well_with_the_controller_and_leaves_nobody(start: StartFolder) -> None:
    roles = [role("trainer rank 0", CHILDREN), role("controller", "import time; time.sleep(0.5)")]
    assert supervise(roles, start) is None
    assert alive_children() == []
    assert not start.processes(HOST).exists()


def test_host_memory_of_roles_is_that_of_all_their_processes(
    start: StartFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "WEIGH_SECONDS", 0.1)
    controller = "import time; time.sleep(3)"
    assert (
        supervise([role("trainer rank 0", CHILDREN), role("controller", controller)], start) is None
    )
    memory = start.memory()
    assert memory.keys() == {"trainer rank 0", "controller"}
    assert 4e6 < memory["controller"] < 1e9
    assert memory["trainer rank 0"] > 1.5 * memory["controller"], "it has a child of its size"


def test_host_memory_of_a_role_that_has_ended_is_what_it_last_had(
    start: StartFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def ended_after_the_first_look(pid: int) -> int:
        seen.append(pid)
        return 5_000_000 if len(seen) == 1 else 0

    monkeypatch.setattr(supervisor, "WEIGH_SECONDS", 0.1)
    monkeypatch.setattr(supervisor, "resident", ended_after_the_first_look)
    assert supervise([role("controller", "import time; time.sleep(1)")], start) is None
    assert len(seen) > 1
    assert start.memory() == {"controller": 5_000_000}


def test_a_dead_trainer_ends_the_run_and_is_named_with_its_log(start: StartFolder) -> None:
    log = start.log("trainer rank 1")
    roles = [
        role("trainer rank 1", "import time; time.sleep(.3); raise SystemExit('bad layout')", log),
        role("controller", SLEEP),
    ]
    culprit = supervise(roles, start)
    assert culprit is not None and (culprit.name, culprit.exit_code) == ("trainer rank 1", 1)
    assert "bad layout" in culprit.message()
    assert alive_children() == []


def test_a_controller_that_fails_because_of_a_trainer_names_the_trainer(start: StartFolder) -> None:
    failing = start.path / "failing"  # the trainer says so, then ends just after the controller
    wait = f"import pathlib, time\nwhile not pathlib.Path({str(failing)!r}).exists(): time.sleep(.001)\n"
    touch = f"import pathlib, time; pathlib.Path({str(failing)!r}).touch(); time.sleep(.02)\n"
    roles = [
        role("controller", wait + "raise SystemExit(1)"),
        role("trainer rank 0", touch + "raise SystemExit(9)"),
    ]
    culprit = supervise(roles, start)
    assert culprit is not None and (culprit.name, culprit.exit_code) == ("trainer rank 0", 9)


def test_the_rank_that_was_killed_is_named_not_the_one_that_failed_with_it(
    start: StartFolder,
) -> None:
    pid = start.path / "pid"  # of the one that is killed; the other fails when that one has ended
    wait = (
        f"import pathlib, psutil, time\npid = pathlib.Path({str(pid)!r})\n"
        "while not pid.exists(): time.sleep(.001)\n"
        "while psutil.Process(int(pid.read_text())).status() != 'zombie': time.sleep(.001)\n"
    )
    killed = (
        f"import os, pathlib; new = pathlib.Path({str(pid) + '.new'!r}); new.write_text(str(os.getpid()))\n"
        f"new.rename({str(pid)!r}); os.kill(os.getpid(), 9)"
    )
    roles = [
        role("trainer rank 0", wait + "raise SystemExit(1)"),
        role("trainer rank 1", killed),
        role("controller", SLEEP),
    ]
    culprit = supervise(roles, start)
    assert culprit is not None and (culprit.name, culprit.exit_code) == ("trainer rank 1", -9)


def test_a_server_that_ends_without_an_error_ends_the_run_too(start: StartFolder) -> None:
    culprit = supervise([role("rollout server 0", "pass"), role("controller", SLEEP)], start)
    assert culprit is not None and (culprit.name, culprit.exit_code) == ("rollout server 0", 0)


def test_what_has_started_is_stopped_when_the_next_role_cannot_start(start: StartFolder) -> None:
    before = signal.getsignal(signal.SIGINT)
    missing = Role("controller", ["/no/such/program"], {}, None)
    with pytest.raises(FileNotFoundError):
        supervise([role("trainer rank 0", SLEEP), missing], start)
    assert alive_children() == []
    assert signal.getsignal(signal.SIGINT) is before


def test_a_port_is_free_and_below_those_that_connections_take() -> None:
    lowest_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = {free_port() for _ in range(20)}
    assert len(ports) > 10
    assert max(ports) < lowest_ephemeral
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", ports.pop()))


def test_a_server_that_cannot_start_ends_the_run(start: StartFolder) -> None:
    roles = [role("rollout server 0", "raise SystemExit(4)"), role("controller", SLEEP)]
    culprit = supervise(roles, start)
    assert culprit is not None and (culprit.name, culprit.exit_code) == ("rollout server 0", 4)


def test_a_server_that_dies_after_serving_is_restarted_a_few_times(start: StartFolder) -> None:
    start.serving.touch()
    starts = start.path / "starts"
    code = f"open({str(starts)!r}, 'a').write('x'); raise SystemExit(5)"
    culprit = supervise([role("rollout server 0", code), role("controller", SLEEP)], start)
    assert culprit is not None and culprit.name == "rollout server 0"
    assert starts.read_text() == "xxxx"  # one start, three restarts


def test_a_server_given_up_ends_nothing_while_there_is_another(start: StartFolder) -> None:
    start.serving.touch()
    last = start.path / "exits" / "rollout-0.3.json"
    wait = f"import pathlib, time\nwhile not pathlib.Path({str(last)!r}).exists(): time.sleep(.05)\ntime.sleep(.5)"
    roles = [role("rollout server 0", "raise SystemExit(5)"), role("controller", wait)]
    assert Supervisor(start, HOST, other_servers=1).supervise(roles) == "finished"
    assert [(e["role"], e["code"], e["restarted"]) for e in start.exits()] == [
        ("rollout server 0", 5, True)
    ] * 3 + [("rollout server 0", 5, False)]


def test_a_killed_controller_is_started_again_and_its_own_error_is_not(start: StartFolder) -> None:
    marker = start.path / "killed once"
    code = f"""
import os, pathlib, time
marker = pathlib.Path({str(marker)!r})
if not marker.exists():
    marker.touch()
    os.kill(os.getpid(), 9)
raise SystemExit(6)
"""
    culprit = supervise([role("controller", code), role("trainer rank 0", SLEEP)], start)
    assert culprit is not None and (culprit.name, culprit.exit_code) == ("controller", 6)
    assert [e["code"] for e in start.exits()] == [-9, 6]


def test_a_controller_that_stopped_on_request_is_no_failure(start: StartFolder) -> None:
    roles = [role("controller", f"raise SystemExit({STOPPED})"), role("trainer rank 0", SLEEP)]
    assert Supervisor(start, HOST).supervise(roles) == "stopped"
    assert first_culprit(start) is None
    assert alive_children() == []


def test_the_end_of_a_start_on_another_node_ends_the_roles_here(start: StartFolder) -> None:
    code = "import time; time.sleep(0.3)"
    announce = f"""
import time
from pathlib import Path
from agpo_megatron.cluster.start_folder import StartFolder
time.sleep(0.3)
StartFolder(Path({str(start.path)!r})).end("failed", "a rank died elsewhere")
time.sleep(60)
"""
    roles = [role("trainer rank 0", SLEEP), role("trainer rank 1", announce)]
    assert Supervisor(start, HOST).supervise([*roles, role("trainer rank 2", code)]) == "failed"
    assert start.ended()["reason"] == "a rank died elsewhere"
    assert first_culprit(start) is None
    assert alive_children() == []


def test_among_several_nodes_sigterm_asks_for_a_checkpoint(start: StartFolder) -> None:
    code = f"""
import os, signal, time
from pathlib import Path
os.kill({os.getpid()}, signal.SIGTERM)
while not Path({str(start.stop_requested)!r}).exists():
    time.sleep(0.05)
raise SystemExit({STOPPED})
"""
    assert Supervisor(start, HOST, several=True).supervise([role("controller", code)]) == "stopped"


def test_among_several_nodes_roles_are_deaf_to_what_slurm_sends_to_all(start: StartFolder) -> None:
    """Slurm signals every process of a step; a role may even have a handler of its own, as SGLang has."""
    heard = start.path / "heard"
    code = f"""
import os, signal, subprocess, sys, time
from pathlib import Path
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda *_: Path({str(heard)!r}).touch())
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.5)"])
for pid in (os.getpid(), child.pid):
    os.kill(pid, signal.SIGUSR1)
    os.kill(pid, signal.SIGTERM)
assert child.wait() == 0
"""
    assert Supervisor(start, HOST, several=True).supervise([role("controller", code)]) == "finished"
    assert not heard.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_killed_supervisor(start: StartFolder, number: int) -> None:
    program = f"""
import sys
from pathlib import Path
from agpo_megatron.cluster.processes import Role
from agpo_megatron.cluster.start_folder import StartFolder
from agpo_megatron.cluster.supervisor import Supervisor
roles = [Role(name, [sys.executable, "-c", {SLEEP!r}], {{}}, None) for name in ("controller", "trainer rank 0")]
Supervisor(StartFolder(Path({str(start.path)!r})), {HOST!r}).supervise(roles)
"""
    owner = subprocess.Popen([sys.executable, "-c", program])
    table = start.processes(HOST)
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


def test_a_server_that_is_reported_to_hang_is_ended_and_started_again(
    start: StartFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: the report is not of the process that follows, nor of another server."""
    monkeypatch.setattr(supervisor, "MAX_SKEW", 0.0)
    monkeypatch.setattr(supervisor, "LOOK_SECONDS", 0.1)
    start.serving.touch()
    starts = [start.path / f"starts-{i}" for i in range(2)]
    servers = [
        role(f"rollout server {i}", f"open({str(path)!r}, 'a').write('x'); {SLEEP}")
        for i, path in enumerate(starts)
    ]
    report = f"""
import time
from pathlib import Path
from agpo_megatron.cluster.start_folder import StartFolder
time.sleep(1.0)
StartFolder(Path({str(start.path)!r})).report_hung("rollout server 1")
time.sleep(2.0)
"""
    assert supervise([*servers, role("controller", report)], start) is None
    assert [path.read_text() for path in starts] == ["x", "xx"]
    assert [(e["role"], e["code"], e["restarted"]) for e in start.exits()] == [
        ("rollout server 1", -9, True)
    ]


def test_an_old_report_is_of_an_old_process(start: StartFolder) -> None:
    start.report_hung("rollout server 0")
    roles = [role("rollout server 0", SLEEP), role("controller", "import time; time.sleep(1.5)")]
    assert supervise(roles, start) is None and start.exits() == []
    assert start.hung_since("rollout server 0") > 0 == start.hung_since("rollout server 1")
