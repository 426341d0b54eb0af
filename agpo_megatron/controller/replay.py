"""Training on the recorded batches of an earlier run: no rollout servers, nothing generated."""

from __future__ import annotations

from agpo_megatron.controller.run import Run, seconds_into
from agpo_megatron.journal import JournalError, JournalReader


async def train_on_record(run: Run, recorded: JournalReader) -> None:
    """Take the recorded steps in order, up to ``train.steps``; in the same layout on a CPU the weights come out equal
    bit for bit. Continues from this run's own checkpoint if it has one.

    Raises JournalError when the record does not hold every step that is asked for.
    """
    config = run.config
    done = await run.load(recorded)
    names = recorded.step_names()
    missing = [s for s in range(done + 1, config.train.steps + 1) if s not in names]
    if missing:
        raise JournalError(
            f"{recorded.folder} has no step {missing[0]} "
            f"(it holds {min(names, default=0)} to {max(names, default=0)}); lower train.steps, "
            "or, if journal.keep: checkpoints has pruned it, replay another run"
        )
    for step in range(done + 1, config.train.steps + 1):
        record = recorded.read_record(names[step])
        timings: dict[str, float] = {}
        with (
            seconds_into(timings, "time/step"),
            run.phase(f"update step {step}", timings, "time/update"),
        ):
            stats = await run.update(record, recorded.folder, names[step])
        run.report(record, stats, timings)
        await run.save_if_due(config.train.steps)
    await run.export(run.folder.exported_model)
