"""Live generation as a source of batches for AGPO.

producer:  window -> prompts -> rollout pool -> rewards -> journal (durable) -> batch
consumer:  batch -> scores, where the loss needs them -> advantages and loss weights -> batch committed
           -> its updates -> publish, which opens the window further -> next batch
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator

from agpo_megatron.algorithm.step import StepRequest, decide, drops_groups, has_variance
from agpo_megatron.config.schema import Config
from agpo_megatron.controller.batch import Batch
from agpo_megatron.controller.evaluation import Rollouts, evaluate, evaluating
from agpo_megatron.controller.producer import Collected, producing
from agpo_megatron.controller.publishing import make_publisher
from agpo_megatron.controller.run import Recipe, Run, seconds_into
from agpo_megatron.controller.schedule import Window
from agpo_megatron.journal.records import BatchRecord
from agpo_megatron.observe.summary import write_summary
from agpo_megatron.sync.protocol import Publisher

log = logging.getLogger(__name__)


def live_recipe(config: Config) -> Recipe:
    train = config.train
    return Recipe(
        lr=train.lr,
        warmup_steps=train.warmup_steps,
        steps=train.steps,
        schedule=train.lr_schedule,
        min_lr=train.min_lr,
    )


def window_of(config: Config, step: int, cursor: int) -> Window:
    """Return the window of a run whose weights have taken ``step`` optimizer steps."""
    train, advantage = config.train, config.algorithm.advantage
    resample = advantage.zero_variance == "resample"
    return Window(
        train.prompts_per_batch,
        train.max_staleness,
        (train.steps - step) // train.updates_per_batch,
        cursor,
        advantage.resample_factor * train.prompts_per_batch if resample else None,
    )


async def live(run: Run, rollouts: Rollouts) -> AsyncGenerator[Batch, None]:
    """Generate batches up to ``train.steps``: each under the weights after the batch before, or, with
    ``train.max_staleness``, ahead of it.

    The consumer must have taken the optimizer steps of a batch when it asks for the next: their weights are published
    then. Evaluates before the first batch, on schedule and after the last.
    """
    config, timings = run.config, dict[str, float]()
    prompts = map(rollouts.stream.prompt_at, itertools.count())
    publisher = make_publisher(config, rollouts.pool, run.trainers, run.backend, prompts)
    last = await asyncio.to_thread(run.journal.last)
    window = window_of(config, run.version.step, last.cursor if last else 0)
    if run.vitals:
        run.vitals.pool, run.vitals.rewards = rollouts.pool, rollouts.rewards
        run.vitals.window = window
    with seconds_into(timings, "time/step"):
        await publish(run, publisher, timings)
    before = await evaluate(run, rollouts, step=0)
    async with (
        producing(config, run.journal, rollouts, window) as producer,
        evaluating(run, rollouts) as evaluations,
    ):
        while run.version.step < config.train.steps:
            await evaluations.due(run.version.step)
            with seconds_into(timings, "time/step"):
                producer.admit()
                with run.phase(f"generate step {run.version.step + 1}", timings, "time/rollout"):
                    collected = await producer.batch(run.stop_if_asked)
                batch = await commit(run, collected, last, timings)
            last = batch.record
            yield batch
            timings = {}
            with seconds_into(timings, "time/step"):
                await publish(run, publisher, timings)
            window.publish()
    after = await evaluate(run, rollouts, step=config.train.steps)
    if before and after:
        write_summary(run.folder.path, before, after, {"steps": run.version.step})


async def commit(
    run: Run, collected: Collected, last: BatchRecord | None, timings: dict[str, float]
) -> Batch:
    """Score and decide the batch after ``last``, and commit it to the journal."""
    config, groups = run.config, [journaled.group for journaled in collected.groups]
    scored = [
        journaled
        for journaled in collected.groups
        if not drops_groups(config.algorithm) or has_variance(journaled.group)
    ]
    request = StepRequest(
        algorithm=config.algorithm,
        first_step=run.version.step + 1,
        updates=config.train.updates_per_batch,
        seed=config.seed,
        max_response_tokens=config.rollout.max_response_tokens,
        scores=await run.score(scored, timings),
        entropy_state=last.entropy_state if last else config.algorithm.loss.entropy.coef,
        gate_state=last.gate_state if last else (),
        discarded=collected.discarded,
    )
    decision = await asyncio.to_thread(decide, groups, request)
    timings |= collected.metrics
    return await run.commit(
        collected.groups,
        decision,
        updates=request.updates,
        cursor=collected.cursor,
        timings=timings,
    )


async def publish(run: Run, publisher: Publisher, timings: dict[str, float]) -> None:
    """Publish the trainer's weights to every server; on return they generate under ``run.version``."""
    with run.phase(f"publish weights {run.version.step}", timings, "time/publish"):
        publication = await publisher.publish(run.version, moved=run.moved)
    run.version, run.moved = publication.version, False
    log.info(
        "published %s to %d server(s), %d bytes, probe difference %.2e, seconds %s",
        publication.version,
        len(publication.servers),
        publication.bytes,
        publication.probe_diff_max,
        {phase: round(took, 3) for phase, took in publication.seconds.items()},
    )
