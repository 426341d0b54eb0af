"""Measures what the controller and one rank do with a batch besides generating and training, on one core.

    bench.py loop [--samples 8192] [--tokens 16384] [--batches 400] [--dir DIR] [--json FILE]

A batch is ``--samples`` responses, in groups of 8, of exactly ``--tokens`` tokens each, with 4 characters of text a
token. The process and those it starts are bound to one core; other work on it shows in the wall time, so CPU time
stands beside it. Nothing is extrapolated: what is measured on a part of the batch says so.

    parse        one answer to /generate, 8 responses with log-probs: bytes to Generation objects through
                 ServerClient.generate, without a socket; best of 30
    scores       read_scores and place_on_loss_mask: what the trainer scored, back at its places
    decide       ``decide`` with a token-level correction over the batch, all groups with variance; best of 3
    commit       Journal.commit of that decision, old log-probs and factors of every token with it
    append       Journal.append of an eighth of the batch at a time against a plain write and sync of the same bytes,
                 in turn, 8 times: least raw seconds over least seconds
    read         what a rank of 16 reads of the batch (record and its own rows) in a process of its own, files in the
                 page cache: best of ``--rounds``, and the peak of the resident set above that of the process before
    pack         ``pack`` of those sequences
    memory       growth of the resident set of a process that parses, appends and decides a quarter of the batch,
                 by token: groups and decision are held
    resume       Journal(...), last, pending_groups with half a batch pending at full length, after ``--batches``
                 batches of 64 segments. Committed segments are links to one small file: at resume and in prune only
                 their names are looked at (removal of large files by the file system is thus not in it)
    prune        of all these batches but the newest

Needs 5 GB of memory and 6 GB of disk at the default size.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from benchmarks.logprob import resident

from agpo_megatron.algorithm.settings import AlgorithmSettings
from agpo_megatron.algorithm.step import Decision, Scores, StepRequest, decide
from agpo_megatron.controller.micro_batches import plan_micro_batches
from agpo_megatron.files import sync
from agpo_megatron.journal import BatchRecord, Journal, JournaledGroup, JournalReader
from agpo_megatron.journal.reader import SegmentName
from agpo_megatron.journal.records import (
    place_on_loss_mask,
    read_scores,
    sequence_columns,
    write_scores,
)
from agpo_megatron.policy.packing import pack
from agpo_megatron.rollout.client import Sampling, ServerClient
from agpo_megatron.samples import Group, Prompt, Sample, VersionSpan

GROUP, RANKS, SEGMENTS, PROMPT = 8, 16, 64, 128
VOCABULARY = 151936
MEGABYTE = 10**6


@dataclass(frozen=True)
class Row:
    """One measurement. ``cpu``: CPU seconds beside the wall seconds; ``target``: with the sign of what meets it."""

    name: str
    value: float
    unit: str
    target: str = ""
    cpu: float | None = None

    @property
    def met(self) -> bool:
        sign, _, bound = self.target.partition(" ")
        return {"<=": self.value <= float(bound or 0), ">=": self.value >= float(bound or 0)}.get(
            sign, True
        )

    def __str__(self) -> str:
        cpu = "" if self.cpu is None else f"{self.cpu:.3f} s CPU"
        verdict = "" if not self.target else f"target {self.target}{'' if self.met else '  MISSED'}"
        return f"{self.name:<8} {self.value:10.3f} {self.unit:<12} {cpu:<14} {verdict}".rstrip()


class Clock:
    """Wall and CPU seconds of a block."""

    def __enter__(self) -> Self:
        self._started = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall = time.perf_counter() - self._started[0]
        self.cpu = time.process_time() - self._started[1]


def least(clocks: Sequence[Clock]) -> tuple[float, float]:
    """Least wall and least CPU seconds."""
    return min(c.wall for c in clocks), min(c.cpu for c in clocks)


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of ``work`` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(work, *arguments).result()


def answer(tokens: int) -> bytes:
    """Make what SGLang answers to one request of n = GROUP: JSON without blanks, floats with 17 digits."""
    rng = np.random.default_rng(0)
    span = {"version": "1.1.d", "start": 0, "end": tokens}
    outputs = []
    for _ in range(GROUP):
        ids = rng.integers(0, VOCABULARY, tokens).tolist()
        logprobs = (-rng.standard_exponential(tokens, np.float32)).tolist()
        entries = [[lp, t, None] for lp, t in zip(logprobs, ids, strict=True)]
        meta = {
            "id": "0" * 32,
            "finish_reason": {"type": "stop", "matched": 2},
            "weight_version": "1.1.d",
            "weight_versions": [span],
            "input_token_logprobs": [[None, 5, None], *([[-1.5, 5, None]] * (PROMPT - 1))],
            "output_token_logprobs": entries,
        }
        outputs.append({"text": text_of(tokens), "output_ids": ids, "meta_info": meta})
    return json.dumps(outputs, separators=(",", ":")).encode()


def text_of(tokens: int) -> str:
    return "word" * tokens


class Canned:
    """A session and its response: every request is answered with the same bytes."""

    status, content_type = 200, "application/json"

    def __init__(self, data: bytes) -> None:
        self._data = data

    def request(self, *_: object, **__: object) -> Canned:
        return self

    async def __aenter__(self) -> Canned:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def read(self) -> bytes:
        return self._data


def prompt(position: int) -> Prompt:
    return Prompt(position, np.arange(PROMPT, dtype=np.int32), "42", "what is 6 * 7?")


def parsed_groups(data: bytes, count: int) -> Iterator[Group]:
    """Groups as the rollout pool builds them from the client's answers."""
    client = ServerClient("http://canned", Canned(data))  # type: ignore[arg-type]
    for position in range(count):
        tokens = prompt(position).tokens
        outputs = asyncio.run(client.generate(tokens, Sampling(1), GROUP))
        samples = [
            Sample(
                group_id=prompt(position).group_id,
                index=i,
                prompt_tokens=tokens,
                response_tokens=output.tokens,
                rollout_logprobs=output.logprobs,
                loss_mask=np.ones(len(output.tokens), np.uint8),
                versions=output.versions,
                finish_reason=output.finish_reason,
                text=text_of(len(output.tokens)),
                raw_reward=float(i % 2),
                correct=bool(i % 2),
            )
            for i, output in enumerate(outputs)
        ]
        yield Group(prompt(position), samples)


def made_groups(first: int, count: int, tokens: int) -> list[Group]:
    """Groups at positions from ``first`` on; half of each is right."""
    rng = np.random.default_rng(first)
    ones, text = np.ones(tokens, np.uint8), text_of(tokens)
    groups = []
    for position in range(first, first + count):
        samples = [
            Sample(
                group_id=prompt(position).group_id,
                index=i,
                prompt_tokens=prompt(position).tokens,
                response_tokens=rng.integers(0, VOCABULARY, tokens, np.int32),
                loss_mask=ones.copy(),
                rollout_logprobs=-rng.standard_exponential(tokens, np.float32),
                versions=(VersionSpan("0.1.d", 0, tokens),),
                finish_reason="stop",
                text=text,
                raw_reward=float(i % 2),
                correct=bool(i % 2),
            )
            for i in range(GROUP)
        ]
        groups.append(Group(prompt(position), samples))
    return groups


def scored(folder: Path, groups: Sequence[Group]) -> tuple[Scores, Clock]:
    """Scores near the rollout's, as they come from a trainer's file; the clock is that of the reading."""
    path, rng = folder / "scores.arrow", np.random.default_rng(1)
    samples = {s.sample_id: s for group in groups for s in group.samples}
    noise = rng.normal(0, 0.3, len(next(iter(samples.values())).response_tokens)).astype(np.float32)
    write_scores(path, {name: s.rollout_logprobs + noise for name, s in samples.items()})
    pa.default_memory_pool().release_unused()  # a trainer's process wrote them
    with Clock() as clock:
        found = read_scores(path, path.read_bytes())
        old = {name: place_on_loss_mask(v, samples[name]) for name, v in found.items()}
    path.unlink()
    return Scores(old), clock


def request_of(scores: Scores, tokens: int) -> StepRequest:
    return StepRequest(
        algorithm=AlgorithmSettings.model_validate({"loss": {"correction": {"kind": "mis"}}}),
        first_step=1,
        updates=1,
        seed=0,
        max_response_tokens=tokens,
        scores=scores,
    )


def record_of(
    journal: Journal, groups: Sequence[JournaledGroup], decision: Decision, step: int, cursor: int
) -> BatchRecord:
    samples = [sample for journaled in groups for sample in journaled.group.samples]
    return BatchRecord(
        first_step=step,
        updates=1,
        attempt=journal.attempt,
        cursor=cursor,
        weight_version=f"{step - 1}.1.d",
        sample_ids=[sample.sample_id for sample in samples],
        tokens=np.array([sample.length for sample in samples], dtype=np.int32),
        samples=[block for journaled in groups for block in journaled.blocks],
        details=[],
        columns=sequence_columns(decision.columns, len(samples)),
        metrics=decision.metrics,
    )


def measure_parse(options: argparse.Namespace) -> Iterator[Row]:
    data = answer(options.tokens)
    client = ServerClient("http://canned", Canned(data))  # type: ignore[arg-type]

    async def rounds() -> list[Clock]:
        clocks = []
        for _ in range(30):
            with Clock() as clock:
                await client.generate([1], Sampling(1), GROUP)
            clocks.append(clock)
        return clocks

    clocks = asyncio.run(rounds())
    wall, cpu = least(clocks)
    yield Row("parse", wall * 1000, "ms", "<= 25", cpu)


def measure_batch(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """The rows from the groups of a batch to the sequences of a rank."""
    groups = made_groups(0, options.samples // GROUP, options.tokens)
    scores, clock = scored(folder, groups)
    yield Row("scores", clock.wall, "s", cpu=clock.cpu)
    clocks = []
    for _ in range(3):
        with Clock() as clock:
            decision = decide(groups, request_of(scores, options.tokens))
        clocks.append(clock)
    wall, cpu = least(clocks)
    yield Row("decide", wall, "s", "<= 1", cpu)
    journal, journaled, turns = Journal(folder / "journal"), [], []
    share = -(-len(groups) // 8)
    for first in range(0, len(groups), share):
        with Clock() as clock:
            added = journal.append(groups[first : first + share])
        journaled += added
        turns.append((clock, raw_write(folder, added[0].blocks[0].file)))
    size = sum(b.length for j in journaled[:share] for b in j.blocks)
    wall, cpu = least([clock for clock, _ in turns])
    raw_wall, raw_cpu = least([clock for _, clock in turns])
    yield Row("append", raw_wall / wall, "x raw", ">= 0.5")
    yield Row("append", size / wall / MEGABYTE, "MB/s", cpu=cpu)
    yield Row("raw", size / raw_wall / MEGABYTE, "MB/s", cpu=raw_cpu)
    record = record_of(journal, journaled, decision, 1, len(groups))
    with Clock() as clock:
        record, name = journal.commit(record, decision.columns)
    yield Row("commit", clock.wall, "s", cpu=clock.cpu)
    lengths = [int(n) for n in record.tokens]
    plan = plan_micro_batches(lengths, data_parallel=RANKS, token_budget=2 * max(lengths))
    del groups, scores, decision, journaled
    runs = [alone(read_as_rank, folder / "journal", name, plan[0]) for _ in range(options.rounds)]
    seconds = min(r["read"] for r in runs)
    yield Row("read", seconds, "s", "<= 1", min(r["read_cpu"] for r in runs))
    yield Row("read", max(r["peak"] for r in runs) / 1e9, "GB peak", "<= 0.3")
    yield Row("pack", min(r["pack"] for r in runs), "s", cpu=min(r["pack_cpu"] for r in runs))


def raw_write(folder: Path, segment: str) -> Clock:
    """Time to write and sync the bytes of a segment under another name."""
    data = (folder / "journal" / "samples" / segment).read_bytes()
    path = folder / "raw"
    with Clock() as clock:
        path.write_bytes(data)
        sync(path)
        sync(folder)
    path.unlink()
    return clock


def read_as_rank(journal: Path, name: str, plan: Sequence[Sequence[int]]) -> dict[str, float]:
    """Read a rank's rows of a batch, then pack them."""
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    with Clock() as read:
        reader = JournalReader(journal)
        record = reader.record(name)
        sequences = iter(reader.sequences(record, [row for rows in plan for row in rows]))
    peak = resident("VmHWM") - before
    with Clock() as packing:
        for rows in plan:
            pack([next(sequences) for _ in rows], 16)
    return {
        "read": read.wall,
        "read_cpu": read.cpu,
        "peak": peak,
        "pack": packing.wall,
        "pack_cpu": packing.cpu,
    }


def grow(tokens: int, count: int, folder: Path) -> float:
    """Bytes by which this process grows for each token of ``count`` groups that it generates, appends and decides."""
    data, journal = answer(tokens), Journal(folder / "grow")
    for group in parsed_groups(data, 1):
        journal.append([group])  # what the first call loads is not the batch's
    del group
    gc.collect()
    before = resident()
    journaled = [j for group in parsed_groups(data, count) for j in journal.append([group])]
    groups = [j.group for j in journaled]
    scores, _ = scored(folder, groups)
    decision = decide(groups, request_of(scores, tokens))
    gc.collect()
    assert len(decision.columns["correction"]) == count * GROUP
    return (resident() - before) / (count * GROUP * tokens)


def measure_memory(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    count = max(1, options.samples // GROUP // 4)
    yield Row("memory", alone(grow, options.tokens, count, folder), "B a token", "<= 20")


def build_history(options: argparse.Namespace, folder: Path) -> Journal:
    """A journal of ``--batches`` batches of 64 segments each, and half a batch that is pending."""
    journal = Journal(folder)
    groups_each = options.samples // GROUP
    segments = min(SEGMENTS, groups_each)
    share = groups_each // segments
    first = made_groups(0, groups_each, 2)
    journaled = [
        j
        for start in range(0, groups_each, share)
        for j in journal.append(first[start : start + share])
    ]
    decision = decide(first, request_of(scored(folder, first)[0], 2))
    small = folder / "samples" / journaled[0].blocks[0].file
    record, _ = journal.commit(
        record_of(journal, journaled, decision, 1, groups_each), decision.columns
    )
    details = next(block.file for block in record.details if block)
    number = segments
    for batch in range(1, options.batches):
        for start in range(batch * groups_each, (batch + 1) * groups_each, share):
            span = f"p{start:09d}-{start + share - 1:09d}"
            digest = SegmentName.parse(small.name).digest
            os.link(
                small, folder / "samples" / f"segment-a000001-{number:08d}-{span}-{digest}.arrow"
            )
            number += 1
        step, cursor = batch + 1, (batch + 1) * groups_each
        journal.commit(record_of(journal, journaled, decision, step, cursor), {})
        name = details.replace("details-00000001", f"details-{step:08d}")
        os.link(folder / "batches" / details, folder / "batches" / name)
    pending = Journal(folder)  # the next attempt, which counts its segments from 0
    start = options.batches * groups_each
    for at in range(start, start + groups_each // 2, share):
        pending.append(made_groups(at, share, options.tokens))
    return pending


def resume(folder: Path, batches: int) -> dict[str, float]:
    """Take over a journal, then prune all of it but the newest batch."""
    with Clock() as resumed:
        journal = Journal(folder)
        last = journal.last()
        pending = journal.pending_groups()
    assert last is not None and last.first_step == batches and pending
    del pending
    with Clock() as pruned:
        removed = journal.prune(batches)
    assert removed >= batches - 1
    return {
        "resume": resumed.wall,
        "resume_cpu": resumed.cpu,
        "prune": pruned.wall,
        "prune_cpu": pruned.cpu,
    }


def measure_resume(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    build_history(options, folder / "history")
    found = alone(resume, folder / "history", options.batches)
    yield Row("resume", found["resume"], "s", "<= 10", found["resume_cpu"])
    yield Row("prune", found["prune"], "s", "<= 1", found["prune_cpu"])


def measure(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    yield from measure_parse(options)
    yield from measure_batch(options, folder)
    yield from measure_memory(options, folder)
    yield from measure_resume(options, folder)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=8192, help="of a batch; at least 128")
    parser.add_argument("--tokens", type=int, default=16384, help="of each response")
    parser.add_argument("--batches", type=int, default=400, help="of the journal to resume")
    parser.add_argument("--rounds", type=int, default=3, help="of the read by a rank")
    parser.add_argument("--dir", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print(
        f"{options.samples} samples x {options.tokens} tokens, {options.batches} batches, one core"
    )
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-loop-", dir=options.dir) as root:
        for row in measure(options, Path(root)):
            rows.append(row)
            print(row, flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0 if all(row.met for row in rows) else 1
