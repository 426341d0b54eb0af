"""Kill one role of a real run at a named phase, and judge what the run folder holds afterwards."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from tiny_run import VOCABULARY, write_run

from agpo_megatron.cluster.node import MACHINE
from agpo_megatron.cluster.start_folder import latest_start, starts
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.journal import BatchRecord, JournalReader
from agpo_megatron.journal.records import decode_fragments
from agpo_megatron.observe.metrics import read_metrics
from agpo_megatron.samples import Fragment, Sample, WeightVersion

log = logging.getLogger(__name__)
SERVER = "rollout server 0"
STEPS, PROMPTS, GROUP = 4, 4, 4
Kill = tuple[str, ...]
"""A role, and the moments to wait for in turn before it is killed: see ``wait_for``."""


@dataclass(frozen=True)
class Ended:
    """``fragments``: those that were durable at a kill."""

    exit_code: int
    output: str
    fragments: tuple[Fragment, ...] = ()


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


def kill_at(config: Path, run_dir: Path, *kills: Kill, timeout: float = 240) -> Ended:
    """Start the run; SIGKILL each role at its moment; wait for the end.

    Asserts that no process of the run is left.
    """
    folder = RunFolder(run_dir)
    before = controller_logs(folder)
    run = subprocess.Popen(
        command(config, run_dir), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    descendants: set[psutil.Process] = set()
    fragments: list[Fragment] = []
    for role, *moments in kills:
        for moment in moments:
            wait_for(run, folder, moment, before, timeout)
        pids = running_processes(folder)
        descendants |= set(psutil.Process(run.pid).children(recursive=True))
        fragments += durable_fragments(folder)
        os.kill(pids[role], signal.SIGKILL)
    output, _ = run.communicate(timeout=timeout)
    _, alive = psutil.wait_procs(descendants, timeout=15)
    assert not alive, f"left behind: {[' '.join(p.cmdline()[:6]) for p in alive]}"
    return Ended(run.returncode, output, tuple(fragments))


def signal_at(
    config: Path, run_dir: Path, number: int, *moments: str, timeout: float = 240
) -> Ended:
    """Start the run; send its supervisor a signal after these moments; wait for the end."""
    folder = RunFolder(run_dir)
    before = controller_logs(folder)
    run = subprocess.Popen(
        command(config, run_dir), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for moment in moments:
        wait_for(run, folder, moment, before, timeout)
    os.kill(running_processes(folder)["supervisor"], number)
    sent = time.monotonic()
    output, _ = run.communicate(timeout=timeout)
    log.warning("ended %.1f s after %s", time.monotonic() - sent, signal.Signals(number).name)
    return Ended(run.returncode, output)


def wait_for(
    run: subprocess.Popen[str], folder: RunFolder, moment: str, before: set[Path], timeout: float
) -> None:
    """Wait for a moment of a run: a new file in a folder of its journal ("journal/samples"), a checkpoint that is
    being written ("saving 2"), or a phase (a pattern) that a log of its controller, other than those of ``before``,
    shows."""
    saving = re.fullmatch(r"saving (\d+)", moment)
    watched = folder.path / moment if "/" in moment else None
    old = set(watched.glob("[!.]*")) if watched else set()
    pattern = re.compile(rf"phase {moment}$", re.MULTILINE)

    def reached() -> bool:
        if saving:
            return partial_checkpoint(folder, int(saving[1])).is_dir()
        if watched:
            return bool(set(watched.glob("[!.]*")) - old)
        return any(pattern.search(p.read_text()) for p in controller_logs(folder) - before)

    deadline = time.monotonic() + timeout
    while not reached():
        assert run.poll() is None, f"the run ended before {moment}:\n{run.communicate()[0]}"
        assert time.monotonic() < deadline, f"{moment} was not reached in {timeout} s"
        time.sleep(0.005)


def partial_checkpoint(folder: RunFolder, step: int) -> Path:
    """Where a checkpoint is written until it is complete."""
    target = folder.checkpoint(step)
    return target.with_name(f".{target.name}.partial")


def durable_fragments(folder: RunFolder) -> list[Fragment]:
    """The fragments in the journal now, while its writer goes on."""
    found: list[Fragment] = []
    for path in sorted((folder.journal / "fragments").glob("*.arrow")):
        with suppress(FileNotFoundError):  # its groups are durable
            found += decode_fragments(path, path.read_bytes())
    return found


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
    run_dir: Path, steps: int, prompts: int, group_size: int, updates: int = 1, staleness: int = 0
) -> None:
    """Every step once, every prompt once and in order, every sample journaled once, each token from weights at most
    ``staleness`` batches before those that its batch starts from."""
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
        allowed = set(range(max(0, first - 1 - staleness * updates), first))
        for sample in reader.samples(record.samples):
            check_whole(sample, allowed)
    assert trained == sample_ids(range(steps // updates * prompts), group_size)
    found = journaled(folder)
    assert found.keys() >= set(trained), "a sample was trained that is not in the journal"
    assert set(found.values()) == {1}, "a sample was generated again"
    surplus = {int(name[1:].partition(".")[0]) for name in found.keys() - set(trained)}
    assert all(p >= record.cursor for p in surplus) and (staleness or not surplus), "never trained"


def check_whole(sample: Sample, allowed: set[int]) -> None:
    """The response ends at its first EOS, and each token's weights are of a step in ``allowed``, never older than those
    of the token before."""
    tokens, eos = sample.response_tokens.tolist(), VOCABULARY["</s>"]
    assert eos not in tokens[:-1], f"{sample.sample_id} goes on behind its end"
    assert (sample.finish_reason == "stop") == (tokens[-1] == eos)
    assert len(sample.rollout_logprobs) == len(tokens)
    edges = [0, *(span.end for span in sample.versions)]
    assert [span.start for span in sample.versions] == edges[:-1] and edges[-1] == len(tokens)
    steps = steps_of(sample)
    assert steps == sorted(steps) and set(steps) <= allowed, f"{sample.sample_id}: {steps}"


def steps_of(sample: Sample) -> list[int]:
    """The steps of the weights that generated the sample, span by span."""
    return [WeightVersion.parse(span.version).step for span in sample.versions]


def check_fragments(run_dir: Path, fragments: Sequence[Fragment]) -> int:
    """Every fragment that a kill found durable is a piece of the sample that it became; return how many were not
    its end."""
    reader, unfinished = JournalReader(RunFolder(run_dir).journal), 0
    found = {s.sample_id: s for s in all_samples(reader)}
    for fragment in fragments:
        sample = found[sample_ids([fragment.position], fragment.index + 1)[-1]]
        part = slice(fragment.start, fragment.end)
        assert np.array_equal(sample.response_tokens[part], fragment.tokens)
        assert np.array_equal(sample.rollout_logprobs[part], fragment.logprobs)
        for span in fragment.versions:
            assert any(
                s.version == span.version and s.start <= span.start and span.end <= s.end
                for s in sample.versions
            )
        unfinished += fragment.end < len(sample.response_tokens)
    return unfinished


def sample_ids(positions: Iterable[int], group_size: int) -> list[str]:
    return [f"g{p:09d}.{i}" for p in positions for i in range(group_size)]


def all_samples(reader: JournalReader) -> list[Sample]:
    return [
        sample
        for segment in reader.segments()
        for journaled in reader.groups(segment)
        for sample in journaled.group.samples
    ]


def journaled(folder: RunFolder) -> Counter[str]:
    """How often each sample is in the journal."""
    return Counter(s.sample_id for s in all_samples(JournalReader(folder.journal)))


def batches(reader: JournalReader) -> list[BatchRecord]:
    """The records of all batches, in order."""
    return [reader.record(name.name) for name in reader.batches()]


def check_dynamic_sampling(run_dir: Path, steps: int, prompts: int, group_size: int) -> None:
    """Every prompt up to the last cursor was generated once, under the weights of the step that used or replaced it
    (begun in surplus: of the one before); each step is full, and takes uniform groups only at the end of its search."""
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
            check_whole(sample, {step - 2, step - 1})
        cursor, replaced = record.cursor, replaced + row["sampling/discarded_groups"]
    assert replaced > 0, "the case must replace groups"
    found = journaled(folder)
    assert set(found.values()) == {1}, "a group was generated again"
    every = set(sample_ids(range(cursor), group_size))
    assert found.keys() >= every, "a group was skipped"
    surplus = {int(name[1:].partition(".")[0]) for name in found.keys() - every}
    assert all(position >= cursor for position in surplus)


def export_bytes(run_dir: Path) -> bytes:
    return b"".join(p.read_bytes() for p in sorted((run_dir / "hf").glob("*.safetensors")))


def kill_and_continue(
    tmp_path: Path,
    starts: Sequence[Sequence[Kill]],
    check: Callable[..., None] = check_nothing_lost_or_repeated,
    long_answers: bool = False,
    **changes: object,
) -> list[Fragment]:
    """Kill what each start names, each role at its moment; then let the run come to its end, and judge it.

    Returns the fragments that the kills found.
    """
    config = write_run(tmp_path, long_answers, **changes)
    run_dir = tmp_path / "run"
    fragments: list[Fragment] = []
    for kills in starts:
        outcome = kill_at(config, run_dir, *kills)
        fragments += outcome.fragments
        victim = kills[-1][0]
        if victim == SERVER:  # survived: restarted, given the weights, and the run comes to its end
            assert outcome.exit_code == 0, outcome.output
            assert controller_log(run_dir).count("-> dead") >= len(kills)
        elif victim == "controller":  # survived too: the trainers wait for the next one
            assert outcome.exit_code == 0, outcome.output
            assert outcome.output.count("controller ended with code -9; starting it") == len(kills)
        elif (
            victim == "supervisor"
        ):  # nobody is left to say anything; that nobody is left, kill_at has checked
            assert outcome.exit_code == -9
        else:
            assert outcome.exit_code == 1, outcome.output
            assert f"{victim} was killed by signal 9" in outcome.output
    outcome = finish(config, run_dir)
    assert outcome.exit_code == 0, outcome.output
    check(
        run_dir,
        changes.get("train.steps", STEPS),
        changes.get("train.prompts_per_batch", PROMPTS),
        GROUP,
    )
    # What the killed run learnt is what its journal says, bit for bit.
    replayed = tmp_path / "replayed"
    outcome = finish(config, replayed, "--replay", str(run_dir))
    assert outcome.exit_code == 0, outcome.output
    assert export_bytes(replayed) == export_bytes(run_dir) != b""
    return fragments
