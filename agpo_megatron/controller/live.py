"""Live generation as a source of batches for AGPO.

publish -> prompts -> rollout pool -> rewards -> journal (durable) -> scores, where the loss needs them
        -> advantages and loss weights -> batch committed -> its updates -> publish -> ...
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from agpo_megatron.algorithm.step import StepRequest, decide, drops_groups, has_variance
from agpo_megatron.config.schema import Config
from agpo_megatron.controller.evaluation import Rollouts, evaluate
from agpo_megatron.controller.publishing import make_publisher
from agpo_megatron.controller.run import Batch, Recipe, Run, seconds_into
from agpo_megatron.journal import JournaledGroup
from agpo_megatron.observe.summary import write_summary
from agpo_megatron.samples import Group
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


@dataclass(frozen=True)
class Collected:
    """The groups of a batch, and those discarded for it. ``cursor``: the position after the last prompt used."""

    groups: list[JournaledGroup]
    discarded: list[JournaledGroup]
    cursor: int
    rounds: int


async def live(run: Run, rollouts: Rollouts) -> AsyncGenerator[Batch, None]:
    """Generate batches up to ``train.steps``, each under the weights after the batch before.

    The consumer must have taken the optimizer steps of a batch when it asks for the next: their weights are published
    then. Evaluates before the first batch, on schedule and after the last.
    """
    config = run.config
    prompts = map(rollouts.stream.prompt_at, itertools.count())
    publisher = make_publisher(config, rollouts.pool, run.trainers, run.backend, prompts)
    pending = await asyncio.to_thread(run.journal.pending_groups)
    last = await asyncio.to_thread(run.journal.last)
    cursor = last.cursor if last else 0
    entropy_state = last.entropy_state if last else config.algorithm.loss.entropy.coef
    timings: dict[str, float] = {}
    with seconds_into(timings, "time/step"):
        await publish(run, publisher, timings)
    before = await evaluate(run, rollouts, step=0)
    while run.version.step < config.train.steps:
        if config.eval.every and run.version.step % config.eval.every == 0:
            await evaluate(run, rollouts, run.version.step)
        with seconds_into(timings, "time/step"):
            collected = await collect(run, rollouts, cursor, pending, timings)
            batch = await commit(run, collected, entropy_state, timings)
        cursor, entropy_state = batch.record.cursor, batch.record.entropy_state
        yield batch
        timings = {}
        with seconds_into(timings, "time/step"):
            await publish(run, publisher, timings)
    after = await evaluate(run, rollouts, step=config.train.steps)
    if before and after:
        write_summary(run.folder.path, before, after, {"steps": run.version.step})


async def commit(
    run: Run, collected: Collected, entropy_state: float, timings: dict[str, float]
) -> Batch:
    """Score and decide a batch, and commit it to the journal."""
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
        entropy_state=entropy_state,
        discarded=len(collected.discarded),
        rounds=collected.rounds,
    )
    decision = await asyncio.to_thread(decide, groups, request)
    return await run.commit(
        collected.groups,
        decision,
        updates=request.updates,
        cursor=collected.cursor,
        timings=timings,
    )


async def collect(
    run: Run,
    rollouts: Rollouts,
    cursor: int,
    pending: dict[int, JournaledGroup],
    timings: dict[str, float],
) -> Collected:
    """Collect the groups of the next batch, from the prompts at ``cursor`` on.

    Under ``resample`` (dynamic sampling) zero-variance groups are replaced by those of the next prompts, in at most
    ``resample_rounds`` rounds; if that is not enough, the earliest of them fill the batch after all. The prompts of a
    batch depend only on durable data, so that a resumed run uses the same ones.
    """
    config, size = run.config, run.config.train.prompts_per_batch
    advantage = config.algorithm.advantage
    resample = advantage.zero_variance == "resample"
    chosen: list[JournaledGroup] = []
    uniform: list[JournaledGroup] = []
    rounds = 0
    while len(chosen) < size and rounds < (advantage.resample_rounds if resample else 1):
        positions = range(cursor, cursor + size - len(chosen))
        cursor, rounds = positions.stop, rounds + 1
        for journaled in await generate(run, rollouts, positions, pending, timings):
            informative = has_variance(journaled.group)
            (chosen if informative or not resample else uniform).append(journaled)
    missing = size - len(chosen)
    if missing:
        log.warning(
            "step %d: after %d rounds of generation %d of %d groups still have zero variance; they fill the batch",
            run.version.step + 1,
            rounds,
            missing,
            size,
        )
    return Collected(chosen + uniform[:missing], uniform[missing:], cursor, rounds)


async def generate(
    run: Run,
    rollouts: Rollouts,
    positions: range,
    pending: dict[int, JournaledGroup],
    timings: dict[str, float],
) -> list[JournaledGroup]:
    """Return the groups of these prompts in order, all durable; those already journaled are not generated again."""
    size = len(positions)
    ready = {p: pending.pop(p) for p in positions if p in pending}
    missing = [p for p in positions if p not in ready]
    finished: asyncio.Queue[Group] = asyncio.Queue()

    async def roll_out(position: int) -> None:
        group = await rollouts.pool.generate_group(rollouts.stream.prompt_at(position))
        source, problem = rollouts.stream.problem_at(position)
        finished.put_nowait(await rollouts.rewards.score_group(group, problem, source))

    async def make_durable() -> None:
        while len(ready) < size:
            groups = [await finished.get()]
            while not finished.empty():
                groups.append(finished.get_nowait())
            for journaled in await asyncio.to_thread(run.journal.append, groups):
                ready[journaled.group.prompt.position] = journaled

    with run.phase(f"generate step {run.version.step + 1}", timings, "time/rollout"):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(make_durable())
            for position in missing:
                tasks.create_task(roll_out(position))
    spent = rollouts.rewards.pool.take_busy_seconds()
    timings["time/reward"] = timings.get("time/reward", 0.0) + spent
    return [ready[p] for p in positions]


async def publish(run: Run, publisher: Publisher, timings: dict[str, float]) -> None:
    """Publish the trainer's weights to every server; on return they generate under ``run.version``."""
    with run.phase(f"publish weights {run.version.step}", timings, "time/publish"):
        publication = await publisher.publish(run.version)
    run.version = publication.version
    log.info(
        "published %s to %d server(s), %d bytes, probe difference %.2e, seconds %s",
        publication.version,
        len(publication.servers),
        publication.bytes,
        publication.probe_diff_max,
        {phase: round(took, 3) for phase, took in publication.seconds.items()},
    )
