"""Training on the recorded batches of an earlier run: no rollout servers, nothing generated."""

from __future__ import annotations

from agpo_megatron.controller.run import Run, seconds_into
from agpo_megatron.journal import JournalError, JournalReader


async def train_on_record(run: Run, recorded: JournalReader) -> None:
    """Take the recorded steps in order, up to ``train.steps``; in the same layout on a CPU the weights come out equal
    bit for bit. Continues from this run's own checkpoint if it has one.

    Raises JournalError when the record does not begin where this run stands.
    """
    done = await run.load()
    steps = [s for s in recorded.steps() if done < s <= run.config.train.steps]
    if steps and steps[0] != done + 1:
        raise JournalError(
            f"{recorded.folder} begins at step {steps[0]}, but step {done + 1} is needed; "
            "its journal has been pruned (journal.keep: checkpoints)"
        )
    for step in steps:
        record = recorded.record(step)
        timings: dict[str, float] = {}
        with (
            seconds_into(timings, "time/step"),
            run.phase(f"update step {step}", timings, "time/update"),
        ):
            stats = await run.update(record, recorded.folder)
        run.report(record, stats, timings)
        if step % run.config.run.checkpoint_every == 0:
            await run.save()
    await run.save()
    await run.export(run.folder.exported_model)
