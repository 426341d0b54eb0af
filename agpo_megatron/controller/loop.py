"""The training loop of AGPO, top to bottom.

prompts -> rollout pool -> rewards -> journal (durable) -> scores, where the loss needs them
        -> advantages and loss weights -> step committed -> update -> weights N+1 -> publish -> next step
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from agpo_megatron.config.schema import Config, LossConfig
from agpo_megatron.controller.batching import StepRequest, build_step, has_variance, to_score
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
    train = config.train
    return Recipe(
        loss=loss_settings(config.algorithm.loss),
        lr=train.lr,
        warmup_steps=train.warmup_steps,
        steps=train.steps,
        schedule=train.lr_schedule,
        min_lr=train.min_lr,
    )


def loss_settings(loss: LossConfig) -> dict[str, Any]:
    """What an update command says of the loss (policy.objective.LossSettings); the entropy coefficient, which may
    change from step to step, is the record's."""
    return {
        "policy": loss.policy,
        "old_logprobs": loss.old_logprobs,
        "clip_low": loss.clip_low,
        "clip_high": loss.clip_high,
        "dual_clip": loss.dual_clip,
        "adaptive": loss.clip.kind,
        "minimum": loss.clip.min,
        "tau": loss.clip.tau,
        "tie": loss.clip.tie,
        "scope": loss.clip.scope,
        "on": loss.clip.on,
        "when_clipped": loss.clip.when_clipped,
        "kl_coef": loss.kl.coef if loss.kl.place == "loss" else 0.0,
        "kl_estimator": loss.kl.estimator,
        "kl_importance": loss.kl.importance,
    }


@dataclass
class Rollouts:
    """Where a step's groups come from."""

    pool: RolloutPool
    rewards: RewardPool
    stream: PromptStream
    held_out: Sequence[Prompt]


@dataclass(frozen=True)
class Collected:
    """The groups of a step, and what getting them took. ``cursor``: the prompt position behind all that was used."""

    groups: list[JournaledGroup]
    discarded: list[JournaledGroup]
    cursor: int
    rounds: int


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
    last = await asyncio.to_thread(run.journal.last_step)
    cursor = last.cursor if last else 0
    entropy_state = last.entropy_state if last else config.algorithm.loss.entropy.coef

    for step in range(run.version.step + 1, config.train.steps + 1):
        if config.eval.every and run.version.step % config.eval.every == 0:
            await evaluate(run, rollouts, run.version.step)
        timings: dict[str, float] = {}
        with seconds_into(timings, "time/step"):
            collected = await collect(run, rollouts, step, cursor, pending, timings)
            request = StepRequest(
                step=step,
                attempt=run.journal.attempt,
                cursor=collected.cursor,
                version=run.version,
                algorithm=config.algorithm,
                reward=config.reward,
                max_response_tokens=config.rollout.max_response_tokens,
                scores=await run.score(
                    to_score(collected.groups, config.algorithm, config.reward), timings
                ),
                entropy_state=entropy_state,
                discarded=collected.discarded,
                rounds=collected.rounds,
            )
            record = await asyncio.to_thread(build_step, collected.groups, request)
            name = await asyncio.to_thread(run.journal.commit_step, record)
            cursor, entropy_state = record.cursor, record.entropy_state
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
    cursor: int,
    pending: dict[int, JournaledGroup],
    timings: dict[str, float],
) -> Collected:
    """The step's groups, from the prompts at ``cursor`` on.

    Under ``resample`` (dynamic sampling) groups without variance are replaced by those of the next prompts, in at
    most ``resample_rounds`` rounds; if that is not enough, the earliest of them fill the step after all. Which prompts
    a step uses depends on what is durable alone, so that a resumed run takes the same ones.
    """
    config, size = run.config, run.config.train.prompts_per_step
    advantage = config.algorithm.advantage
    resample = advantage.zero_variance == "resample"
    chosen: list[JournaledGroup] = []
    silent: list[JournaledGroup] = []
    rounds = 0
    while len(chosen) < size and rounds < (advantage.resample_rounds if resample else 1):
        positions = range(cursor, cursor + size - len(chosen))
        cursor, rounds = positions.stop, rounds + 1
        for journaled in await generate(run, rollouts, step, positions, pending, timings):
            informative = has_variance(journaled.group, config.algorithm, config.reward)
            (chosen if informative or not resample else silent).append(journaled)
    missing = size - len(chosen)
    if missing:
        log.warning(
            "step %d: after %d rounds of generation %d of %d groups still have zero variance; they fill the step",
            step,
            rounds,
            missing,
            size,
        )
    return Collected(chosen + silent[:missing], silent[missing:], cursor, rounds)


async def generate(
    run: Run,
    rollouts: Rollouts,
    step: int,
    positions: range,
    pending: dict[int, JournaledGroup],
    timings: dict[str, float],
) -> list[JournaledGroup]:
    """Groups of these prompts in their order, each durable before it counts; journaled ones are not generated again."""
    size = len(positions)
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
    spent = rollouts.rewards.take_busy_seconds()
    timings["time/reward"] = timings.get("time/reward", 0.0) + spent
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
