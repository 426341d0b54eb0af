"""Runs the cells of a plan, several at once, each by the public command line; what has ended is not run again."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ablation.plan import START, Cell, Plan, PlanError

from agpo_megatron.cluster.keeper import die_with_parent
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.files import write_durably

POLL = 0.2
PATIENCE = 120.0
"""Seconds for a run that was asked to end: it saves the step it is at."""


@dataclass
class Job:
    """A cell that is being run: commands still to come, the process of the present one, and the lock that keeps other
    calls of the tool away. ``config``: digest of the run configuration when it began."""

    cell: Cell
    commands: list[str]
    config: str = ""
    lock: BinaryIO | None = None
    process: subprocess.Popen[bytes] | None = None
    began: float = field(default_factory=time.monotonic)


def is_finished(plan: Plan, cell: Cell) -> bool:
    """Say whether a cell has ended. Raises PlanError if its folder was made with other settings."""
    folder = RunFolder(plan.run_dir(cell))
    note = folder.path / "cell.json"
    if not note.exists():
        return False
    made = json.loads(note.read_text())
    if made.get("config") != plan.base_settings():
        raise PlanError(
            f"{folder.path} was made from another {plan.run_config()}; use another --out, or put back what changed"
        )
    if made["settings"] != plan.chosen(cell):
        differ = sorted(set(made["settings"]) ^ set(plan.chosen(cell)))
        raise PlanError(
            f"{folder.path} was made with other settings ({', '.join(differ)}); use another --out"
        )
    return bool(made["finished"])


def note(plan: Plan, cell: Cell, config: str, finished: bool, seconds: float) -> None:
    """Write ``cell.json``: what the run is, whether it has ended, and how long its last start took. ``config``: the
    digest of its run configuration."""
    folder = plan.run_dir(cell)
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "config": config,
        "settings": plan.chosen(cell),
        "finished": finished,
        "seconds": round(seconds, 1),
    }
    write_durably(folder / "cell.json", json.dumps(content, indent=1).encode())


def commands_of(plan: Plan, cell: Cell) -> list[str]:
    """Return the commands of a cell: ``train``, which evaluates before and after; of the start what its config asks."""
    if cell.arm != START:
        return ["train"]
    config = plan.config(cell)
    return (["prepare"] if config.prepare.recipe != "none" else []) + (
        ["sft"] if config.sft else []
    )


def run_cells(plan: Plan, cells: Sequence[Cell], jobs: int) -> list[str]:
    """Run the cells that have not ended, and the starts that they need, ``jobs`` at once. Returns one line for each
    that failed; the others go on. Ends what it has started when it is interrupted (SIGINT, SIGTERM) or killed."""
    needed = dict.fromkeys(Cell(START, c.task, c.seed) for c in cells)
    waiting = [
        c
        for c in [*needed, *dict.fromkeys(c for c in cells if c.arm != START)]
        if not is_finished(plan, c)
    ]
    failed: dict[Cell, str] = {}
    running: list[Job] = []
    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            while len(running) < jobs and (cell := startable(waiting, running, failed)):
                waiting.remove(cell)
                if (lock := locked(plan, cell)) is None:
                    failed[cell] = f"{cell}: another call of this tool runs it"
                else:
                    running.append(begin(plan, cell, lock))
            for job in [job for job in running if has_ended(plan, job, failed)]:
                running.remove(job)
                release(job)
            if waiting and not running and not startable(waiting, running, failed):
                failed |= {c: f"{c}: its start failed" for c in waiting}
                waiting = []
            time.sleep(POLL)
    finally:
        end(running)
        for job in running:
            release(job)
        signal.signal(signal.SIGTERM, earlier)
    return list(failed.values())


def startable(
    waiting: Iterable[Cell], running: Iterable[Job], failed: Iterable[Cell]
) -> Cell | None:
    """Return the first cell whose start, if it needs one, is made."""
    blocked = {c for c in [*waiting, *(j.cell for j in running), *failed] if c.arm == START}
    for cell in waiting:
        if cell.arm == START or Cell(START, cell.task, cell.seed) not in blocked:
            return cell
    return None


def locked(plan: Plan, cell: Cell) -> BinaryIO | None:
    """Take the lock of a cell, which falls with this process; None if another process has it."""
    folder = plan.run_dir(cell)
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "cell.lock").open("wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def release(job: Job) -> None:
    if job.lock is not None:
        job.lock.close()


def begin(plan: Plan, cell: Cell, lock: BinaryIO) -> Job:
    job = Job(cell, commands_of(plan, cell), plan.base_settings(), lock)
    note(plan, cell, job.config, False, 0.0)
    print(f"{cell}: begun", flush=True)
    launch(plan, job)
    return job


def launch(plan: Plan, job: Job) -> None:
    """Start the next command of a job; its output goes to a file in the cell's folder."""
    if not job.commands:
        job.process = None
        return
    command = job.commands.pop(0)
    folder = plan.run_dir(job.cell)
    line = [
        sys.executable,
        "-m",
        "agpo_megatron",
        command,
        str(plan.run_config()),
        "--run-dir",
        str(folder),
    ]
    for setting in plan.settings(job.cell):
        line += ["--set", setting]
    with log_of(folder, command).open("ab") as output:
        output.write(f"$ {shlex.join(line)}\n".encode())
        output.flush()
        # In the main thread: the kernel ends it when this thread ends.
        job.process = subprocess.Popen(
            line,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )


def log_of(folder: Path, command: str) -> Path:
    return folder / f"{command}.log"


def has_ended(plan: Plan, job: Job, failed: dict[Cell, str]) -> bool:
    """Look after a job: start its next command, note its end or its failure. Returns whether it has ended."""
    if job.process is not None:
        code = job.process.poll()
        if code is None:
            return False
        if code:
            log = log_of(plan.run_dir(job.cell), str(job.process.args[3]))  # type: ignore[index]
            last = log.read_text(errors="replace").strip().splitlines()[-1]
            failed[job.cell] = f"{job.cell}: ended with {code}: {last} ({log})"
            print(failed[job.cell], flush=True)
            return True
    if job.commands:
        launch(plan, job)
        return False
    seconds = time.monotonic() - job.began
    note(plan, job.cell, job.config, True, seconds)
    print(f"{job.cell}: {seconds:.0f} s", flush=True)
    return True


def end(running: Iterable[Job]) -> None:
    """Ask what still runs to end, and kill what does not."""
    processes = [job.process for job in running if job.process is not None]
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()  # its roles end with it (cluster/keeper.py)
            process.wait(PATIENCE)
