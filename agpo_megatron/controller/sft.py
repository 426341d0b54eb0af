"""The cold start: supervised tuning through the same trainer, the same journal and the same fused loss."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from agpo_megatron.algorithm.aggregation import sequence_weights
from agpo_megatron.config.schema import SftConfig
from agpo_megatron.controller.run import Recipe, Run, seconds_into
from agpo_megatron.data.stream import shuffled_position
from agpo_megatron.journal import StepRecord, StepRow
from agpo_megatron.journal.writer import JournaledGroup
from agpo_megatron.types import Group

log = logging.getLogger(__name__)


def sft_recipe(sft: SftConfig) -> Recipe:
    return Recipe(
        loss={"policy": "nll"},
        lr=sft.lr,
        warmup_steps=sft.warmup_steps,
        steps=sft.steps,
        schedule="linear",
    )


async def cold_start(run: Run, examples: Sequence[Group], sft: SftConfig, output: Path) -> None:
    """``sft.steps`` steps of maximum likelihood on the examples' responses, then the result to ``output``."""
    done = await run.load()
    await run.replay(done)
    journaled = await asyncio.to_thread(journal_examples, run, examples)
    for step in range(run.version.step + 1, sft.steps + 1):
        timings: dict[str, float] = {}
        first = (step - 1) * sft.batch_size
        positions = [
            shuffled_position(run.config.seed, len(journaled), first + i)
            for i in range(sft.batch_size)
        ]
        with seconds_into(timings, "time/step"):
            record = sft_step(step, [journaled[p] for p in positions], run)
            name = await asyncio.to_thread(run.journal.commit_step, record)
            with run.phase(f"update step {step}", timings, "time/update"):
                stats = await run.update(record, run.folder.journal, name)
        run.report(record, stats, timings)
        if step % run.config.run.checkpoint_every == 0:
            await run.save()
    await run.export(output)


def journal_examples(run: Run, examples: Sequence[Group]) -> list[JournaledGroup]:
    """All examples as one segment, written once: an example is a group of one sample at its place in the file."""
    known = run.journal.pending_groups()
    if len(known) != len(examples):
        known = {j.group.prompt.position: j for j in run.journal.append(examples)}
    return [known[i] for i in range(len(examples))]


def sft_step(step: int, journaled: Sequence[JournaledGroup], run: Run) -> StepRecord:
    """Token-mean likelihood: w = 1 / (response tokens of the batch), A = 1."""
    samples = [j.group.samples[0] for j in journaled]
    counts = [sum(s.loss_mask) for s in samples]
    weights = sequence_weights(counts, counts, "token_mean")
    rows = [
        StepRow(
            sample_id=sample.sample_id,
            ref=j.refs[0],
            tokens=len(sample.prompt_tokens) + len(sample.response_tokens),
            reward=0.0,
            advantage=1.0,
            loss_weight=weights[i],
            trained=counts[i],
        )
        for i, (j, sample) in enumerate(zip(journaled, samples, strict=True))
    ]
    return StepRecord(
        step=step,
        attempt=run.journal.attempt,
        cursor=0,  # examples are drawn again and again: they stay pending
        weight_version=str(run.version),
        segments={j.refs[0].segment: j.digest for j in journaled},
        rows=rows,
    )
