"""The training loop of AGPO, top to bottom.

prompts -> rollout pool -> rewards -> journal (durable) -> advantages and loss weights -> step committed
        -> update -> weights N+1 -> publish -> next step
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from agpo_megatron.config.schema import Config
from agpo_megatron.controller.batching import build_step
from agpo_megatron.controller.publishing import make_publisher
from agpo_megatron.controller.run import Evaluation, Recipe, Run, seconds_into
from agpo_megatron.data.stream import PromptStream
from agpo_megatron.journal.writer import JournaledGroup
from agpo_megatron.observe.summary import write_summary
from agpo_megatron.reward.workers import RewardPool
from agpo_megatron.rollout.pool import RolloutPool
from agpo_megatron.sync.protocol import Publisher
from agpo_megatron.types import Group, Prompt

log = logging.getLogger(__name__)


def agpo_recipe(config: Config) -> Recipe:
    train, clip = config.train, config.algorithm.loss.clip
    return Recipe(
        loss="ppo",
        lr=train.lr,
        warmup_steps=train.warmup_steps,
        steps=train.steps,
        schedule=train.lr_schedule,
        min_lr=train.min_lr,
        gate_min=clip.min if clip.enabled else None,
        when_clipped=clip.when_clipped,
    )


@dataclass
class Rollouts:
    """Where a step's groups come from."""

    pool: RolloutPool
    rewards: RewardPool
    stream: PromptStream
    held_out: Sequence[Prompt]


async def train(run: Run, rollouts: Rollouts) -> None:
    """Run to ``train.steps``, continuing where the run folder stands."""
    config = run.config
    done = await run.load()
    await run.replay(done)
    prompts = map(rollouts.stream.prompt_at, itertools.count())
    publisher = make_publisher(config, rollouts.pool, run.trainers, run.backend, prompts)
    pending = await asyncio.to_thread(run.journal.pending_groups)
    await publish(run, publisher, {})
    before = await evaluate(run, rollouts, step=0)

    for step in range(run.version.step + 1, config.train.steps + 1):
        timings: dict[str, float] = {}
        with seconds_into(timings, "time/step"):
            groups = await collect(run, rollouts, step, pending, timings)
            record = await asyncio.to_thread(
                build_step,
                groups,
                step=step,
                attempt=run.journal.attempt,
                cursor=step * config.train.prompts_per_step,
                version=run.version,
                algorithm=config.algorithm,
                reward=config.reward,
            )
            name = await asyncio.to_thread(run.journal.commit_step, record)
            with run.phase(f"update step {step}", timings, "time/update"):
                stats = await run.update(record, run.folder.journal, name)
            await publish(run, publisher, timings)
        run.report(record, stats, timings)
        await run.save_if_due(config.train.steps)

    after = await evaluate(run, rollouts, step=config.train.steps)
    await run.export(run.folder.exported_model)
    if before and after:
        write_summary(run.folder.path, before, after, {"steps": run.version.step})


async def collect(
    run: Run,
    rollouts: Rollouts,
    step: int,
    pending: dict[int, JournaledGroup],
    timings: dict[str, float],
) -> list[JournaledGroup]:
    """The step's groups in prompt order, each durable before it counts; journaled ones are not generated again."""
    size = run.config.train.prompts_per_step
    positions = range((step - 1) * size, step * size)
    ready = {p: pending.pop(p) for p in positions if p in pending}
    missing = [p for p in positions if p not in ready]
    finished: asyncio.Queue[Group] = asyncio.Queue()

    async def roll_out(position: int) -> None:
        group = await rollouts.pool.generate_group(rollouts.stream.prompt_at(position))
        finished.put_nowait(await rollouts.rewards.score_group(group))

    async def make_durable() -> None:
        while len(ready) < size:
            groups = [await finished.get()]
            while not finished.empty():
                groups.append(finished.get_nowait())
            for journaled in await asyncio.to_thread(run.journal.append, groups):
                ready[journaled.group.prompt.position] = journaled

    with run.phase(f"generate step {step}", timings, "time/rollout"):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(make_durable())
            for position in missing:
                tasks.create_task(roll_out(position))
    timings["time/reward"] = rollouts.rewards.take_busy_seconds()
    return [ready[p] for p in positions]


async def publish(run: Run, publisher: Publisher, timings: dict[str, float]) -> None:
    """Give every server the trainer's weights; on return they generate under ``run.version``."""
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


async def evaluate(run: Run, rollouts: Rollouts, step: int) -> dict[str, float] | None:
    """Greedy accuracy and response tokens on the held-out problems; kept per step, so measured once."""
    if not rollouts.held_out:
        return None
    saved = run.saved_evaluation(step)
    if saved is None:
        if run.version.step != step:
            return None  # the weights of that step are gone; it was not measured then
        with run.phase(f"evaluate step {step}", {}, ""):
            saved = await measure(rollouts)
        run.save_evaluation(step, saved)
    return saved.scores


async def measure(rollouts: Rollouts) -> Evaluation:
    """Greedy decoding of every held-out problem."""

    async def one(prompt: Prompt) -> Group:
        return await rollouts.rewards.score_group(await rollouts.pool.generate_greedy(prompt))

    groups = await asyncio.gather(*(one(prompt) for prompt in rollouts.held_out))
    samples = [group.samples[0] for group in groups]
    correct = [len(s.response_tokens) for s in samples if s.accuracy > 0.5]
    scores = {
        "accuracy": len(correct) / len(samples),
        "tokens_mean": fmean(len(s.response_tokens) for s in samples),
        "tokens_correct_mean": fmean(correct) if correct else 0.0,
    }
    return Evaluation(scores, samples)
