"""One job of the production script on a test cluster: submit, follow, kill its roles, judge."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from slurm_cluster import SlurmCluster, wait_for

from agpo_megatron.config.run_folder import RunFolder

REPO = Path(__file__).parents[2]
SCRIPT = REPO / "launch" / "agpo_70b.sh"
TRAINER, CONTROLLER = "agpo_megatron.trainer", "agpo_megatron.controller"
PHASE_SECONDS = 600.0


def site_env(folder: Path) -> dict[str, str]:
    """The site's settings, as production reads them: here the one environment that all roles share."""
    path = folder / "site.env"
    path.write_text(f"TRAIN_PYTHON={sys.executable}\nOMP_NUM_THREADS=1\nAGPO_WATCH_SECONDS=1\n")
    return {"AGPO_SITE_ENV": str(path)}


@dataclass
class Job:
    cluster: SlurmCluster
    id: str
    folder: RunFolder
    output_file: Path

    @staticmethod
    def submit(cluster: SlurmCluster, config: Path, *options: str, sbatch: tuple[str, ...]) -> Job:
        """``sbatch``: its own options; ``options``: the script's. The run folder lies beside ``config``."""
        where = config.parent
        run_dir = where / "run"
        command = ("sbatch", "--parsable", *sbatch, str(SCRIPT), str(config))
        arguments = ("--run-dir", str(run_dir), *options)
        job = cluster.command(*command, *arguments, env=site_env(where), cwd=where)
        return Job(cluster, job, RunFolder(run_dir), where / f"agpo-{job}.out")

    @property
    def output(self) -> str:
        return self.output_file.read_text() if self.output_file.exists() else ""

    @property
    def state(self) -> str:
        return self.cluster.state(self.id)

    def start(self, restart: int) -> Path:
        """Folder of the start with this restart count."""
        return self.folder.logs / f"{self.id}-{restart}"

    def log(self, restart: int) -> str:
        path = self.start(restart) / "controller.log"
        return path.read_text() if path.exists() else ""

    def phases(self, restart: int) -> list[str]:
        return re.findall(r"phase (.*)", self.log(restart))

    def wait_phase(self, restart: int, phase: str) -> None:
        """Until the controller of that start enters ``phase`` ("update step 2")."""

        looked = time.monotonic()

        def reached() -> bool:
            nonlocal looked
            if time.monotonic() - looked > 5:
                looked = time.monotonic()
                assert self.state not in ("COMPLETED", "FAILED", "CANCELLED"), self.output
            return phase in self.phases(restart)

        wait_for(reached, f"{phase} of start {restart}", PHASE_SECONDS, pause=0.01)

    def wait_state(self, *states: str, seconds: float = PHASE_SECONDS) -> None:
        wait_for(lambda: self.state in states, f"job {self.id} to be {states}", seconds, 0.2)

    def pid(self, module: str, **env: str) -> int:
        found = self.cluster.roles(module, **env)
        assert len(found) == 1, found
        return found[0].pid

    def kill_at(self, restart: int, phase: str, module: str, **env: str) -> None:
        """SIGKILL a role as soon as the controller enters ``phase``, which it has not yet."""
        pid = self.pid(module, **env)
        self.wait_phase(restart, phase)
        os.kill(pid, signal.SIGKILL)

    def check_nothing_left(self) -> None:
        gone = "the job's processes to be gone"
        try:
            wait_for(lambda: not list(self.cluster.processes()), gone, seconds=20)
        except AssertionError as error:
            for process in self.cluster.processes():
                error.add_note(f"{process} {process.cmdline()}")
            raise
