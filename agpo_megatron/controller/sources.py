"""Sources of batches other than live generation (live.py): recorded batches and worked examples."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from agpo_megatron.algorithm.step import supervised
from agpo_megatron.config.schema import SftConfig
from agpo_megatron.controller.batch import Batch
from agpo_megatron.controller.run import Recipe, Run, seconds_into
from agpo_megatron.data.stream import shuffled_position
from agpo_megatron.journal import JournaledGroup, JournalError, JournalReader
from agpo_megatron.samples import Group


async def recorded(
    run: Run, journal: JournalReader, last: int | None = None
) -> AsyncGenerator[Batch, None]:
    """Yield the committed batches of a journal after the trainer's step; nothing is generated. In the same layout on a
    CPU the resulting weights are equal, bit for bit.

    ``last``: the step up to which every step must be there. Raises JournalError when one is missing.
    """
    names = [name for name in journal.batches() if name.last_step > run.version.step]
    newest = (
        names[-1] if names else None
    )  # all steps before were decided: it was committed after them
    if last is not None:
        held = {step for name in names for step in range(name.first_step, name.last_step + 1)}
        missing = [step for step in range(run.version.step + 1, last + 1) if step not in held]
        if missing:
            raise JournalError(
                f"{journal.folder} has no step {missing[0]} (it holds {min(held, default=0)} to "
                f"{max(held, default=0)}); lower train.steps, or, if journal.keep: checkpoints has pruned it, replay "
                "another run"
            )
    for name in names:
        if last is None or name.first_step <= last:
            record = await asyncio.to_thread(journal.record, name.name)
            yield Batch(record, journal.folder, name.name, replayed=True, settled=name != newest)


def supervised_recipe(sft: SftConfig) -> Recipe:
    return Recipe(lr=sft.lr, warmup_steps=sft.warmup_steps, steps=sft.steps, schedule="linear")


async def worked_examples(
    run: Run, examples: Sequence[Group], sft: SftConfig
) -> AsyncGenerator[Batch, None]:
    """Yield batches of worked solutions for the cold start: same trainer, journal and fused loss, with likelihood."""
    journaled = await asyncio.to_thread(_journal_examples, run, examples)
    while run.version.step < sft.steps:
        first = run.version.step * sft.batch_size
        positions = [
            shuffled_position(run.config.seed, len(journaled), first + i)
            for i in range(sft.batch_size)
        ]
        timings: dict[str, float] = {}
        with seconds_into(timings, "time/step"):
            groups = [journaled[p] for p in positions]
            decision = supervised([j.group.samples[0] for j in groups])
            # Cursor 0: examples are drawn repeatedly, so they stay pending.
            batch = await run.commit(groups, decision, updates=1, cursor=0, timings=timings)
        yield batch


def _journal_examples(run: Run, examples: Sequence[Group]) -> list[JournaledGroup]:
    """Journal all examples as one segment, once: each is a group of one sample at its position in the file."""
    known = run.journal.pending_groups()
    if len(known) != len(examples):
        known = {j.group.prompt.position: j for j in run.journal.append(examples)}
    return [known[i] for i in range(len(examples))]
