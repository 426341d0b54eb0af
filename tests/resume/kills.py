"""Kill one role of a real run at a named phase, and judge what the run folder holds afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

from agpo_megatron.cluster.node import MACHINE
from agpo_megatron.cluster.start_folder import latest_start, starts
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.journal import BatchRecord, JournalReader
from agpo_megatron.observe.metrics import read_metrics
from agpo_megatron.samples import WeightVersion


@dataclass(frozen=True)
class Ended:
    exit_code: int
    output: str


def command(config: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "agpo_megatron",
        "train",
        str(config),
        "--run-dir",
        str(run_dir),
        *more,
    ]


def finish(config: Path, run_dir: Path, *more: str, timeout: float = 240) -> Ended:
    """Run the command to its end."""
    result = subprocess.run(
        command(config, run_dir, *more), capture_output=True, text=True, timeout=timeout
    )
    return Ended(result.returncode, result.stdout + result.stderr)


def kill_at(config: Path, run_dir: Path, *kills: tuple[str, str], timeout: float = 240) -> Ended:
    """Start the run; SIGKILL each role as soon as the controller enters its phase ("update step 2"); wait for the end.

    Asserts that no process of the run is left.
    """
    folder = RunFolder(run_dir)
    before = controller_logs(folder)
    run = subprocess.Popen(
        command(config, run_dir), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    descendants: set[psutil.Process] = set()
    for role, phase in kills:
        pattern = re.compile(rf"phase {re.escape(phase)}$", re.MULTILINE)
        deadline = time.monotonic() + timeout
        while not any(pattern.search(p.read_text()) for p in controller_logs(folder) - before):
            assert run.poll() is None, f"the run ended before {phase}:\n{run.communicate()[0]}"
            assert time.monotonic() < deadline, f"{phase} was not reached in {timeout} s"
            time.sleep(0.005)
        pids = running_processes(folder)
        descendants |= set(psutil.Process(run.pid).children(recursive=True))
        os.kill(pids[role], signal.SIGKILL)
    output, _ = run.communicate(timeout=timeout)
    _, alive = psutil.wait_procs(descendants, timeout=15)
    assert not alive, f"left behind: {[' '.join(p.cmdline()[:6]) for p in alive]}"
    return Ended(run.returncode, output)


def controller_log(run_dir: Path) -> str:
    return "".join(p.read_text() for p in sorted(controller_logs(RunFolder(run_dir))))


def controller_logs(folder: RunFolder) -> set[Path]:
    return {start.log("controller") for start in starts(folder) if start.log("controller").exists()}


def running_processes(folder: RunFolder) -> dict[str, int]:
    """Role -> pid; empty while the roles have not started."""
    start = latest_start(folder)
    table = start and start.processes(MACHINE)
    return json.loads(table.read_text()) if table and table.exists() else {}


def check_nothing_lost_or_repeated(
    run_dir: Path, steps: int, prompts: int, group_size: int, updates: int = 1
) -> None:
    """Every step once, every prompt once and in order, every sample journaled once, all from the weights that its batch
    starts from."""
    folder = RunFolder(run_dir)
    assert [m["step"] for m in read_metrics(run_dir)] == list(range(1, steps + 1))
    reader = JournalReader(folder.journal)
    trained: list[str] = []
    for number, first in enumerate(range(1, steps + 1, updates), start=1):
        record = batches(reader)[number - 1]
        assert list(record.steps) == list(range(first, first + updates))
        assert record.cursor == number * prompts
        assert WeightVersion.parse(record.weight_version).step == first - 1
        trained += record.sample_ids
        for sample in reader.samples(record.samples):
            assert {WeightVersion.parse(s.version).step for s in sample.versions} == {first - 1}
    assert trained == [
        f"g{p:09d}.{i}" for p in range(steps // updates * prompts) for i in range(group_size)
    ]
    assert journaled(folder) == Counter(trained), "a sample was generated again, or never trained"


def journaled(folder: RunFolder) -> Counter[str]:
    """How often each sample is in the journal."""
    reader = JournalReader(folder.journal)
    return Counter(
        sample.sample_id
        for segment in reader.segments()
        for journaled in reader.groups(segment)
        for sample in journaled.group.samples
    )


def batches(reader: JournalReader) -> list[BatchRecord]:
    """The records of all batches, in order."""
    return [reader.record(name.name) for name in reader.batches()]


def check_dynamic_sampling(run_dir: Path, steps: int, prompts: int, group_size: int) -> None:
    """Every prompt up to the last cursor was generated once, under the weights of the step that used or replaced it;
    each step is full, and takes uniform groups only after its last round."""
    folder = RunFolder(run_dir)
    metrics = read_metrics(run_dir)
    assert [m["step"] for m in metrics] == list(range(1, steps + 1))
    reader, cursor, replaced = JournalReader(folder.journal), 0, 0.0
    for step, row in enumerate(metrics, start=1):
        record = batches(reader)[step - 1]
        taken = {name.partition(".")[0] for name in record.sample_ids}
        assert len(taken) == prompts and len(record.sample_ids) == prompts * group_size
        assert {int(g[1:]) for g in taken} <= set(range(cursor, record.cursor))
        assert record.cursor - cursor == prompts + row["sampling/discarded_groups"]
        for sample in reader.samples(record.samples):
            assert {WeightVersion.parse(s.version).step for s in sample.versions} == {step - 1}
        cursor, replaced = record.cursor, replaced + row["sampling/discarded_groups"]
    assert replaced > 0, "the case must replace groups"
    every = [f"g{p:09d}.{i}" for p in range(cursor) for i in range(group_size)]
    assert journaled(folder) == Counter(every), "a group was generated again, or skipped"
