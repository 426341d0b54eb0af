"""Submits an ablation to Slurm: an array of the starts, then one of the cells, each element a tools/ablate.py.

Cells wait until all starts have ended, well or not: a cell whose start failed tries it once more, and the others run.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ablation.plan import Cell, Plan, PlanError
from ablation.running import is_finished

from agpo_megatron.files import write_durably

TOOL = Path(__file__).parents[1] / "ablate.py"
SUBMIT_SECONDS = 60.0
SCRIPT = """#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --array=0-{last}%{jobs}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={logs}/{name}-%a.out
set -euo pipefail
cells=(
{cells}
)
exec {command} --only "${{cells[$SLURM_ARRAY_TASK_ID]}}"
"""


def script(name: str, cells: Sequence[Cell], jobs: int, logs: Path, command: Sequence[str]) -> str:
    """Return the batch script of an array with an element per cell."""
    return SCRIPT.format(
        name=name,
        last=len(cells) - 1,
        jobs=jobs,
        logs=logs,
        cells="\n".join(f"    {shlex.quote(str(cell))}" for cell in cells),
        command=shlex.join(command),
    )


def submit(plan: Plan, jobs: int, options: Sequence[str]) -> list[str]:
    """Write and submit the arrays of what has not ended; return the ids of the jobs. ``options``: for sbatch. Raises
    PlanError where sbatch refuses."""
    this_plan = [str(plan.path.absolute()), "--out", str(plan.out), *plan.further]
    ids: list[str] = []
    logs = plan.out / "slurm"
    logs.mkdir(parents=True, exist_ok=True)
    for name, listed in (("ablation-starts", plan.starts()), ("ablation-cells", plan.cells())):
        cells = [cell for cell in listed if not is_finished(plan, cell)]
        if not cells:
            continue
        path = logs / f"{name}.sh"
        command = [sys.executable, str(TOOL), *this_plan]
        write_durably(path, script(name, cells, jobs, logs, command).encode())
        after = [f"--dependency=afterany:{ids[-1]}"] if ids else []
        line = ["sbatch", "--parsable", *after, *options, str(path)]
        try:
            done = subprocess.run(line, capture_output=True, text=True, timeout=SUBMIT_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PlanError(f"--slurm: {error}; {path} is written, submit it yourself") from error
        if done.returncode:
            raise PlanError(f"--slurm: sbatch refused {path}: {done.stderr.strip()}")
        ids.append(done.stdout.strip().partition(";")[0])
    return ids
