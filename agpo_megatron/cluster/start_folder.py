"""The folder of one start of a run, ``logs/LABEL/``: where its nodes meet, and what they leave behind.

Everything is written under a temporary name and renamed, so that who reads on another node of a shared file system
finds all of a file or none. ``logs/latest`` points to the newest start.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agpo_megatron.cluster.roles import Plan
from agpo_megatron.config import Config
from agpo_megatron.config.loading import resolve_config
from agpo_megatron.config.record import resolved_yaml
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.files import write_durably
from agpo_megatron.journal import JournalError, JournalReader
from agpo_megatron.wait import WaitExpired, waiting

POLL_SECONDS = 0.2
Outcome = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class StartFolder:
    """The folder ``path`` of one start. Its name is the start's label: a time, or Slurm's job id and restart count."""

    path: Path

    @staticmethod
    def create(run: RunFolder, label: str, plan: Plan, config: Config) -> StartFolder:
        """Make a fresh folder with all that the nodes need to know; ``latest`` points to it.

        A label that exists already (the same second, say) gets a number.
        """
        run.logs.mkdir(parents=True, exist_ok=True)
        path, number = run.logs / label, 1
        while True:
            try:
                path.mkdir()
                break
            except FileExistsError:
                path, number = run.logs / f"{label}.{number}", number + 1
        start = StartFolder(path)
        for name in ("nodes", "exits", "hung", "memory"):
            (path / name).mkdir()
        write_durably(start.config_file, resolved_yaml(config).encode())
        start.token_file.touch(mode=0o600)
        start.token_file.write_text(secrets.token_hex(16))
        write_json(path / "began.json", {"committed": committed_steps(run), "time": time.time()})
        write_json(path / "plan.json", plan.as_dict())  # last: with it the folder is complete
        link = run.logs / f".latest.{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        link.replace(run.logs / "latest")
        return start

    @property
    def label(self) -> str:
        return self.path.name

    @property
    def config_file(self) -> Path:
        """The resolved config: every role of this start reads this one."""
        return self.path / "config.yaml"

    @property
    def token_file(self) -> Path:
        return self.path / "token"

    @property
    def serving(self) -> Path:
        """Touched by the controller once every server has generated for the first time in this start."""
        return self.path / "serving"

    @property
    def stop_requested(self) -> Path:
        """Asks the controller to save a checkpoint after the step under way and to end."""
        return self.path / "stop-requested"

    @property
    def preflight(self) -> Path:
        """The table of the preflight; the roles start once it is there."""
        return self.path / "preflight.txt"

    @property
    def status(self) -> Path:
        """The controller's view of a moment ago: what it and every role it knows of was doing."""
        return self.path / "status.json"

    def plan(self) -> Plan:
        return Plan.from_dict(json.loads((self.path / "plan.json").read_text()))

    def config(self) -> Config:
        return resolve_config(self.config_file).config

    def began_with(self) -> int:
        """The newest committed step when this start began."""
        return int(json.loads((self.path / "began.json").read_text())["committed"])

    def log(self, role: str) -> Path:
        """The log file of a role: ``trainer rank 3`` writes trainer-3.log."""
        return self.path / f"{file_name(role)}.log"

    def processes(self, host: str) -> Path:
        """Role -> pid on ``host``, while they run."""
        return self.path / f"processes-{host}.json"

    def write_memory(self, host: str, roles: Mapping[str, int]) -> None:
        """Write the host memory of the roles of ``host``, in bytes, each when last seen alive."""
        write_json(self.path / "memory" / f"{host}.json", roles)

    def memory(self) -> dict[str, int]:
        """Read the bytes of every role whose node has written them."""
        found: dict[str, int] = {}
        for path in sorted((self.path / "memory").glob("*.json")):
            found |= json.loads(path.read_text())
        return found

    # What the nodes tell each other

    def write_node(self, host: str, kind: str, facts: Mapping[str, Any]) -> None:
        write_json(self.path / "nodes" / f"{host}.{kind}.json", facts)

    def wait_nodes(
        self, hosts: Sequence[str], kind: str, deadline: float
    ) -> dict[str, dict[str, Any]]:
        """Read what each of ``hosts`` wrote. Raises WaitExpired, naming them, if some did not by ``deadline``."""
        found: dict[str, dict[str, Any]] = {}
        name = f"the {kind} of all nodes in {self.path / 'nodes'}"
        began = time.monotonic()
        with waiting(name, deadline - began):
            while True:
                for host in hosts:
                    path = self.path / "nodes" / f"{host}.{kind}.json"
                    if host not in found and path.exists():
                        found[host] = json.loads(path.read_text())
                missing = [host for host in hosts if host not in found]
                if not missing:
                    return found
                if self.ended():
                    raise WaitExpired(name, time.monotonic() - began, "the start has ended")
                if time.monotonic() > deadline:
                    raise WaitExpired(
                        name, time.monotonic() - began, f"nothing from {', '.join(missing)}"
                    )
                time.sleep(POLL_SECONDS)

    # Roles that hang

    def report_hung(self, role: str) -> None:
        """Have the supervisor of ``role`` end it, if it is still the process of now; then it is started again."""
        write_json(self.path / "hung" / f"{file_name(role)}.json", {"time": time.time()})

    def hung_since(self, role: str) -> float:
        """When ``role`` was last reported; 0 if never. Seconds since the epoch, by the reporter's clock."""
        try:
            report = json.loads((self.path / "hung" / f"{file_name(role)}.json").read_text())
        except FileNotFoundError:
            return 0.0
        return float(report["time"])

    # How it ended

    def end(self, outcome: Outcome, reason: str) -> None:
        """Tell every node to stop its roles. Only the first call of a start counts."""
        temporary = self.path / f".ended.{os.uname().nodename}.{os.getpid()}"
        write_json(temporary, {"outcome": outcome, "reason": reason, "time": time.time()})
        with suppress(FileExistsError):
            os.link(temporary, self.path / "ended.json")
        temporary.unlink()

    def ended(self) -> dict[str, Any] | None:
        """Outcome and reason once the start is over, else None."""
        try:
            ended: dict[str, Any] = json.loads((self.path / "ended.json").read_text())
        except FileNotFoundError:
            return None
        return ended

    def record_exit(self, exit_: Mapping[str, Any]) -> None:
        """Write down the end of a role: role, host, code, restarts, time, and whether it was started again."""
        name = f"{file_name(exit_['role'])}.{exit_['restarts']}.json"
        write_json(self.path / "exits" / name, exit_)

    def exits(self) -> list[dict[str, Any]]:
        """Every role that ended by itself, oldest first."""
        found = [json.loads(path.read_text()) for path in (self.path / "exits").glob("*.json")]
        return sorted(found, key=lambda e: float(e["time"]))


def committed_steps(run: RunFolder) -> int:
    """The newest step that a start of the run has reached for good; 0 while there is none."""
    try:
        batches = JournalReader(run.journal).batches()
    except JournalError:
        return 0
    # A batch of several steps is committed before the first of them: further ones count when they are saved.
    committed = batches[-1].first_step if batches else 0
    return max([committed, *(step for step, _ in run.complete_checkpoints())])


def starts(run: RunFolder) -> Iterator[StartFolder]:
    """All starts of a run, oldest first."""
    plans = [p for p in run.logs.glob("*/plan.json") if not p.parent.is_symlink()]
    for plan in sorted(plans, key=lambda p: p.stat().st_mtime_ns):
        yield StartFolder(plan.parent)


def latest_start(run: RunFolder) -> StartFolder | None:
    link = run.logs / "latest"
    return StartFolder(link.resolve()) if link.exists() else None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_durably(path, json.dumps(content, indent=1).encode())


def file_name(role: str) -> str:
    """Name a role's files: rollout-0 for ``rollout server 0``, trainer-3 for ``trainer rank 3``, controller."""
    words = role.split()
    return f"{words[0]}-{words[-1]}" if len(words) > 1 else role
