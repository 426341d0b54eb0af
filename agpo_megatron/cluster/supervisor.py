"""Supervises the roles of one node: on one machine that is the whole run, under Slurm one of several.

It holds no state of the run. A rollout server that dies after it has served, and a controller that is killed, are
started again a few times; anything else that ends ends the start: the node says so in the start folder, and the
supervisors of all nodes, who look there, stop their roles.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from agpo_megatron.cluster import keeper
from agpo_megatron.cluster.processes import (
    Role,
    RunningRole,
    log_tail,
    start,
    stop_all,
)
from agpo_megatron.cluster.start_folder import Outcome, StartFolder, write_json

log = logging.getLogger(__name__)
RESTARTS = 3
RESTARTS_FORGOTTEN = 3600.0
"""A role that ran this many seconds before it died starts counting anew: bounded attempts are for what cannot run."""
STOPPED = 75
"""Exit code of a controller that ended because it was asked to, after a checkpoint (sysexits: EX_TEMPFAIL)."""
INTERRUPTS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STOP_REQUESTS = (signal.SIGUSR1, signal.SIGTERM)
MAX_SKEW = 5.0
"""Seconds that the clocks of two nodes may differ (the preflight sees to it)."""
POLL_SECONDS = 0.1
LOOK_SECONDS = 0.5
"""Between looks into the start folder, which other nodes of a shared file system write to."""
STACKS_SECONDS = 0.5
WEIGH_SECONDS = 10.0


@dataclass(frozen=True)
class Culprit:
    """The role whose end ended the start. ``host``: "" on a single machine."""

    name: str
    exit_code: int
    log: Path | None
    host: str = ""

    def message(self) -> str:
        how = (
            f"was killed by signal {-self.exit_code}"
            if self.exit_code < 0
            else f"exited with code {self.exit_code}"
        )
        where = f" on {self.host}" if self.host else ""
        text = f"{self.name}{where} {how}; the other processes have been stopped. The same command continues the run."
        tail = log_tail(self.log)
        return f"{text}\n--- end of {self.log} ---\n{tail}" if tail else text


class Interrupted(Exception):
    """SIGTERM or SIGINT reached the supervisor of a single machine."""


class Supervisor:
    """Supervises the roles of one node. ``several``: one of several nodes under Slurm, where SIGTERM, like SIGUSR1
    everywhere, asks for a checkpoint and the end; on a single machine SIGTERM, SIGINT and SIGHUP end at once.
    ``other_servers``: number of servers on other nodes.
    """

    def __init__(
        self, folder: StartFolder, host: str, *, several: bool = False, other_servers: int = 0
    ) -> None:
        self._start, self._host, self._several = folder, host, several
        self._other_servers = other_servers
        self._running: list[RunningRole] = []
        self._gone: set[int] = set()  # indices of roles that ended, as they may
        self._looked = self._weighed = 0.0
        self._memory: dict[str, int] = {}  # of each role when last seen alive
        self._before: set[int] = set()  # children that are not the roles'

    def supervise(self, roles: Sequence[Role]) -> Outcome:
        """Run ``roles`` until the start ends; every process has ended when this returns or raises."""
        self._before = keeper.children()
        keeper.be_subreaper()
        before = {n: signal.getsignal(n) for n in {*INTERRUPTS, *STOP_REQUESTS}}
        self._handle_signals()
        outcome: Outcome = "failed"
        try:
            for role in roles:  # one by one: what has started is stopped if the next cannot start
                self._running.append(start(role, deaf=self._several))
            self._write_processes()
            outcome = self._watch()
            return outcome
        finally:
            for number in before:
                signal.signal(number, signal.SIG_IGN)
            if outcome == "failed":
                self._ask_for_stacks()
            stop_all(
                self._running, grace=0.0 if self._several else 5.0
            )  # the deaf hear only SIGKILL
            self._sweep()
            keeper.be_subreaper(False)
            self._start.processes(self._host).unlink(missing_ok=True)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle_signals(self) -> None:
        def interrupt(number: int, _frame: object) -> None:
            raise Interrupted(signal.Signals(number).name)

        def request_stop(_number: int, _frame: object) -> None:
            self._start.stop_requested.touch()

        for number in INTERRUPTS:
            signal.signal(number, signal.SIG_IGN if self._several else interrupt)
        for number in STOP_REQUESTS if self._several else (signal.SIGUSR1,):
            signal.signal(number, request_stop)

    def _watch(self) -> Outcome:
        while True:
            time.sleep(POLL_SECONDS)
            if outcome := self._look():
                return outcome
            for index, role in enumerate(self._running):
                code = role.process.poll()
                if code is None or index in self._gone:
                    continue
                self._sweep()
                if outcome := self._judge(index, code):
                    self._start.end(outcome, f"{role.role.name} on {self._host}: code {code}")
                    return outcome
            if len(self._gone) == len(self._running):
                return "finished"  # trainers that were told to stop, servers given up

    def _sweep(self) -> None:
        """End what came to this process because an outer keeper was killed: an inner one, if it lives, sees to its role
        first; then all children that are no keepers."""
        keepers = {r.process.pid for r in self._running if r.process.returncode is None}
        inner = {r.pids[0] for r in self._running if r.pids} - keepers
        keeper.wait_for(inner & keeper.children(), 2 * keeper.PATIENCE)
        if left := keeper.sweep(self._before | keepers):
            log.error("killed, but not ended in %g s: %s", keeper.PATIENCE, left)

    def _look(self) -> Outcome | None:
        """Obey the start folder: the end of the start, or that of servers that hang."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return None
        self._looked = time.monotonic()
        ended = self._start.ended()
        if ended is not None:
            outcome: Outcome = ended["outcome"]
            return outcome
        for role in self._running:
            # The report must be of this process, not of the one before it.
            since = self._start.hung_since(role.role.name) if is_server(role) else 0.0
            if since > role.started + MAX_SKEW and role.process.poll() is None:
                log.warning("%s hangs; ending it", role.role.name)
                role.send_signal(signal.SIGKILL, group=True)
        self._weigh()
        return None

    def _weigh(self) -> None:
        """Tell the start folder now and then how much host memory each role has, with its children."""
        if time.monotonic() - self._weighed >= WEIGH_SECONDS:
            self._weighed = time.monotonic()
            sizes = {r.role.name: resident(r.pid) for r in self._running if r.pid}
            # A role that has just ended has none; what it last had is worth more to a reader.
            self._memory |= {name: size for name, size in sizes.items() if size}
            with suppress(OSError):  # a full disk is the journal's to report
                self._start.write_memory(self._host, self._memory)

    def _judge(self, index: int, code: int) -> Outcome | None:
        """Decide what the end of a role means; None when the start goes on."""
        role = self._running[index]
        if role.role.name == "controller" and code in (0, STOPPED):
            return "finished" if code == 0 else "stopped"
        if code == 0 and is_trainer(role):
            self._gone.add(index)  # the controller has told it to
            return None
        if self._may_restart(role, code):
            log.warning("%s ended with code %d; starting it again", role.role.name, code)
            self._record(role, code, restarted=True)
            role.tie.close()
            lived = time.monotonic() - role.since
            restarts = 0 if lived > RESTARTS_FORGOTTEN else role.restarts + 1
            self._running[index] = replace(start(role.role, deaf=self._several), restarts=restarts)
            self._write_processes()
            return None
        if is_server(role) and self._start.serving.exists() and self._servers_left(index):
            log.error("%s ended with code %d too often; going on without it", role.role.name, code)
            self._record(role, code, restarted=False)
            self._gone.add(index)
            return None
        time.sleep(2 * POLL_SECONDS)  # for what caused it, or what it causes, to end too
        for index, other in enumerate(self._running):
            ended = other.process.poll()
            if (
                ended is not None
                and index not in self._gone
                and not (ended == 0 and is_trainer(other))
            ):
                self._record(other, ended, restarted=False)
        return "failed"

    def _may_restart(self, role: RunningRole, code: int) -> bool:
        """Allow it to a server that dies once serving, and to a controller that is killed. One that cannot start is a
        bad set-up, and an error of the controller's own would only happen again."""
        if role.restarts >= RESTARTS or self._start.stop_requested.exists():
            return False
        if role.role.name == "controller":
            return code < 0
        return is_server(role) and self._start.serving.exists()

    def _servers_left(self, index: int) -> int:
        here = [i for i, r in enumerate(self._running) if is_server(r) and i not in self._gone]
        return self._other_servers + len([i for i in here if i != index])

    def _record(self, role: RunningRole, code: int, restarted: bool) -> None:
        self._start.record_exit(
            {
                "role": role.role.name,
                "host": self._host if self._several else "",
                "code": code,
                "log": str(self._start.log(role.role.name)),
                "restarts": role.restarts,
                "restarted": restarted,
                "time": time.time(),
            }
        )

    def _ask_for_stacks(self) -> None:
        """Have the stacks of all threads written to the logs: by our own roles on SIGUSR2, by py-spy for servers."""
        for role in self._running:
            if role.process.poll() is not None:
                continue
            if not is_server(role):
                role.send_signal(signal.SIGUSR2)
            elif role.role.log and (spy := shutil.which("py-spy")):
                with role.role.log.open("ab") as output, suppress(subprocess.SubprocessError):
                    dump = [spy, "dump", "--subprocesses", "--pid", str(role.pid)]
                    subprocess.run(
                        dump,
                        stdout=output,
                        stderr=output,
                        timeout=10,
                        preexec_fn=keeper.die_with_parent,
                    )
        time.sleep(STACKS_SECONDS)

    def _write_processes(self) -> None:
        """Write the pids by role, for py-spy, kill and curiosity."""
        table = {role.role.name: role.pid for role in self._running}
        write_json(self._start.processes(self._host), {"supervisor": os.getpid(), **table})


def resident(pid: int) -> int:
    """Resident memory of a process and its descendants, in bytes; shared pages count for each. 0 if it has ended."""
    total = 0
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                total += each.memory_info().rss
    return total


def is_trainer(role: RunningRole) -> bool:
    return role.role.name.startswith("trainer")


def is_server(role: RunningRole) -> bool:
    return role.role.name.startswith("rollout server")


def first_culprit(folder: StartFolder) -> Culprit | None:
    """Find the role that began it, among those whose end was not planned: a signal is a cause, an exit code mostly a
    consequence, and the controller fails because of another role. None when no role failed."""
    guilty = [e for e in folder.exits() if not e["restarted"]]
    if not guilty:
        return None
    first = min(guilty, key=lambda e: (e["code"] >= 0, e["role"] == "controller", e["time"]))
    return Culprit(first["role"], first["code"], Path(first["log"]), first["host"])
