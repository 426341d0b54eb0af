"""A small run folder for the tests of reports, written by the product's own writers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import made
import numpy as np

from agpo_megatron.cluster.roles import machine_plan
from agpo_megatron.cluster.start_folder import StartFolder
from agpo_megatron.config import Config
from agpo_megatron.config.record import resolved_yaml
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.journal import BatchRecord, Journal
from agpo_megatron.journal.records import sequence_columns
from agpo_megatron.observe.metrics import MetricsWriter
from agpo_megatron.samples import Group, Prompt, VersionSpan

GROUPS, SIZE = 2, 3
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><!--\u2028&amp;"


def config(steps: int = 4) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "no-such-model"},
            "data": {"path": "d"},
            "train": {"steps": steps},
            "algorithm": {"preset": "grpo"},
        }
    )


def length(step: int, place: int) -> int:
    """Response tokens of a sample: 6 samples a step, of 10 to 15 tokens at step 0."""
    return 10 + 10 * step + place


def reward(step: int, place: int) -> float:
    return (step + place) / 8


def gap(step: int, place: int) -> float:
    """The largest difference of the trainer's log-prob of a token of the sample, at its third token."""
    return 0.5 * (step + 1) + 0.01 * place


def make_group(step: int, number: int, text: str, ids: Sequence[int] = ()) -> Group:
    position = step * GROUPS + number
    prompt = Prompt(
        position, np.array([1, 2], np.int32), "7", f"{text} {position}", ["sums", "words"][number]
    )
    samples = []
    for i in range(SIZE):
        n = length(step, number * SIZE + i)
        tokens = np.resize(np.array(list(ids) or [65 + i], np.int32), n)
        half = n // 2
        spans = (
            VersionSpan(f"{step}.1.a", 0, half),
            VersionSpan(f"{max(0, step - 1)}.1.a", half, n),
        )
        samples.append(
            made.sample(
                prompt,
                i,
                n,
                response_tokens=tokens,
                versions=spans,
                text=text,
                raw_reward=reward(step, number * SIZE + i),
                correct=i == 0,
                reward_parts={"near": 0.5},
            )
        )
    return Group(prompt, samples)


def write_batch(
    journal: Journal,
    step: int,
    scored: bool = True,
    text: str = "what is",
    ids: Sequence[int] = (),
) -> str:
    """Commit one step of 2 groups of 3; ``step`` counts from 0 here. Returns the name of the batch's file."""
    journaled = journal.append([make_group(step, number, text, ids) for number in range(GROUPS)])
    samples = [s for j in journaled for s in j.group.samples]
    count = len(samples)
    decided = {
        "reward": [reward(step, i) for i in range(count)],
        "advantage": [i - 2.5 for i in range(count)],
        "loss_weight": [0.5] * count,
        "trained": [len(s.response_tokens) for s in samples],
        "staleness": [0.5] * count,
    }
    record = BatchRecord(
        first_step=step + 1,
        updates=1,
        attempt=journal.attempt,
        cursor=(step + 1) * GROUPS,
        weight_version=f"{step}.1.a",
        sample_ids=[s.sample_id for s in samples],
        tokens=np.array([s.length for s in samples], np.int32),
        samples=[block for j in journaled for block in j.blocks],
        details=[],
        columns=sequence_columns(decided, count),
    )
    old = []
    for i, sample in enumerate(samples):
        scores = sample.rollout_logprobs + np.float32(0.125)
        scores[2] = sample.rollout_logprobs[2] - np.float32(gap(step, i))
        old.append(scores if scored else None)
    return journal.commit(record, {"old_logprobs": old})[1]


def write_metrics(run: RunFolder, steps: Sequence[int]) -> None:
    writer = MetricsWriter(run.path, tensorboard=False)
    for step in steps:
        row: dict[str, Any] = {
            "step": step,
            "reward/mean": step / 10,
            "reward/accuracy": step / 5,
            "loss/clip_gate": float(step % 2),
            "group/cov_length_advantage": -float(step),
            "rollout/logprob_abs_diff_max": 0.5,
            "time/rollout": 1.0,
            "time/update": 2.0,
            "time/publish": 0.5,
            "time/step": 4.0,
            "idle/trainer_frac": 0.25,
        }
        writer.write(row)
    writer.close()


def make_run(path: Path, scored: bool = True, text: str = "what is") -> RunFolder:
    """Four steps; the controller was killed after the second, and the start goes on with a second attempt."""
    run = RunFolder(path)
    path.mkdir(parents=True, exist_ok=True)
    run.config.write_text(resolved_yaml(config()))
    run.versions.write_text(json.dumps({"python": "3.11", "torch": "2.13"}))
    make_start(run)
    for steps in ((0, 1), (2, 3)):
        journal = Journal(run.journal)
        for step in steps:
            write_batch(journal, step, scored, text)
    write_metrics(run, range(1, 5))
    run.evaluations.mkdir()
    scores = {"accuracy": 0.5, "accuracy_low": 0.25, "accuracy_high": 0.75, "tokens_mean": 9.0}
    run.evaluation(4).write_text(json.dumps({"sets": {"held.jsonl": scores}}))
    return run


def make_start(run: RunFolder) -> StartFolder:
    """A start whose controller was killed in step 2, and whose server was lost."""
    start = StartFolder.create(run, "s1", machine_plan(config(), "localhost", "train"), config())
    start.log("controller").write_text(
        "2026-01-02 03:04:05,100 INFO agpo_megatron.controller.run: phase update step 2\n"
        "2026-01-02 03:04:06,000 INFO agpo_megatron.rollout.pool: rollout server http://h:1 ready for 4 s"
        " -> quarantined (awaits weights 2)\n"
        "2026-01-02 03:04:07,000 INFO agpo_megatron.rollout.pool: rollout server http://h:1 ready for 4 s"
        " -> dead (no answer)\n"
    )
    exit_ = {"role": "controller", "host": "", "code": -9, "log": "", "restarts": 0}
    moment = 1_900_000_000.0  # later than all of the log
    start.record_exit({**exit_, "restarted": True, "time": moment})
    return start


def data_of(page: Path) -> dict[str, Any]:
    """What a report has embedded."""
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.S
    )
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data
