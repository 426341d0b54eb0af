"""A run in virtual time: the product's window, producer, pool, slots and journal between simulated servers and a
trainer that only takes time."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
from benchmarks.fleet.clock import VirtualLoop, run, virtual_time
from benchmarks.fleet.servers import LIMIT, PROMPT, UNIT, Lengths, SimulatedServer, prompt_at, total

from agpo_megatron.config import load_config
from agpo_megatron.config.schema import Config
from agpo_megatron.controller import producer as producer_module
from agpo_megatron.controller.evaluation import Rollouts
from agpo_megatron.controller.live import window_of
from agpo_megatron.controller.producer import Collected, Producer, producing
from agpo_megatron.journal import Journal
from agpo_megatron.reward import Problem
from agpo_megatron.rollout import pool as pool_module
from agpo_megatron.rollout import servers as servers_module
from agpo_megatron.rollout import slots as slots_module
from agpo_megatron.rollout.pool import RolloutPool
from agpo_megatron.samples import Group, WeightVersion

FRAGMENT_SECONDS = 20.0
"""Ten times the product's: a file every two simulated seconds would be most of what a simulation costs."""
CLOCKED = (producer_module, slots_module, pool_module, servers_module)


@dataclass(frozen=True)
class Arm:
    """One setting. ``train_seconds``: of a batch of mean length. ``accepted``: share of groups that dynamic sampling
    accepts; None without it. ``counted_from``: steps before are not counted."""

    name: str
    staleness: int
    servers: int = 8
    train_seconds: float = 70.0
    keep: bool = False
    accepted: float | None = None
    groups: int = 128
    samples: int = 8
    slots: int = 128
    fragment_tokens: int = 2048 // UNIT
    publish_seconds: float = 20.0
    steps: int = 24
    counted_from: int = 8


@dataclass(frozen=True)
class Result:
    """What came of an arm. Shares of the time that is counted, where a publish is work of the
    trainer; tokens are simulated ones. ``lost``: generated again or thrown away, other than in groups that dynamic
    sampling replaces; ``tokens_lost``: what the pool says of that. ``aborted``: responses that were aborted and had
    tokens; each generates its last one again. ``length_bias``: trained responses against all that the window began."""

    step_seconds: float
    trainer_idle: float
    decoding: float
    prefilling: float
    slots_used: float
    lost: int
    tokens_lost: int
    aborted: int
    replaced: int
    length_bias: float
    staleness: float
    staleness_max: int


class Trainee:
    """Book-keeping of an arm while it runs."""

    def __init__(self, arm: Arm, loop: VirtualLoop) -> None:
        self.arm, self.loop = arm, loop
        self.lengths = Lengths(arm.samples)
        self.clients = [SimulatedServer(n, self.lengths, loop) for n in range(arm.servers)]
        self.starts: list[tuple[float, ...]] = []
        self.worked = self.slot_seconds = 0.0
        self.trained: list[int] = []
        self.staleness: list[tuple[float, int]] = []
        self.reached: dict[tuple[int, int], int] = {}
        self.replaced = 0

    def mark(self) -> None:
        parts = (total(self.clients, "decoding"), total(self.clients, "prefilling"))
        self.starts.append((self.loop.time(), self.worked, *parts, self.slot_seconds))

    async def rewarded(self, group: Group, problem: Problem, source: int) -> Group:
        """Rewards that differ, but in the share of groups that dynamic sampling is to replace."""
        differ = self.accepts(group.prompt.position)
        scored = [replace(s, raw_reward=float(differ and s.index % 2)) for s in group.samples]
        return Group(group.prompt, scored)

    def accepts(self, position: int) -> bool:
        """Whether the rewards of a group will differ; its lengths have no part in that."""
        share = self.arm.accepted
        return share is None or np.random.default_rng((7, position)).random() < share

    def note(self, collected: Collected, step: int) -> None:
        """Note what a batch is made of, under the weights of ``step``."""
        age = tokens = oldest = 0
        for journaled in collected.groups:
            for sample in journaled.group.samples:
                self.trained.append(len(sample.response_tokens))
                for span in sample.versions:
                    behind, n = step - WeightVersion.parse(span.version).step, span.end - span.start
                    age, tokens, oldest = age + behind * n, tokens + n, max(oldest, behind)
        self.staleness.append((age / tokens, oldest))
        self.replaced += collected.discarded

    def result(self, pool: RolloutPool, begun: int) -> Result:
        arm, since = self.arm, self.arm.counted_from
        first, last = self.starts[since - 1], self.starts[-1]
        seconds, worked, decoding, prefilling, slots = (
            b - a for a, b in zip(first, last, strict=True)
        )
        expected = [n for p in filter(self.accepts, range(begun)) for n in self.lengths.of_group(p)]
        return Result(
            step_seconds=seconds / (arm.steps - since),
            trainer_idle=1 - worked / seconds,
            decoding=decoding / seconds / arm.servers,
            prefilling=prefilling / seconds / arm.servers,
            slots_used=slots / seconds / arm.servers / arm.slots,
            lost=int(total(self.clients, "generated")) - sum(self.reached.values()),
            tokens_lost=pool.counts.tokens_lost,
            aborted=int(total(self.clients, "aborted")),
            replaced=self.replaced,
            length_bias=float(np.mean(self.trained) / np.mean(expected)) - 1,
            staleness=float(np.mean([mean for mean, _ in self.staleness[since:]])),
            staleness_max=max(oldest for _, oldest in self.staleness[since:]),
        )


def config_of(arm: Arm, folder: Path) -> Config:
    path = folder / "c.yaml"
    path.write_text("model: {path: m}\ndata: {path: d}\n")
    settings = [
        f"train.prompts_per_batch={arm.groups}",
        f"train.max_staleness={arm.staleness}",
        f"train.steps={arm.steps + arm.staleness + 2}",  # the window must not close at the end
        f"rollout.group_size={arm.samples}",
        f"rollout.max_in_flight={arm.slots}",
        f"rollout.max_response_tokens={LIMIT}",
        f"rollout.fragment_tokens={arm.fragment_tokens}",
    ]
    preset = "agpo" if arm.accepted is None else "dapo"
    return load_config(path, [f"algorithm.preset={preset}", *settings], str(folder))


def simulate(arm: Arm) -> Result:
    """Run an arm; its journal is written in full, to a temporary folder."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # fsync would take minutes
    with (
        virtual_time(CLOCKED) as loop,
        patch.object(producer_module, "FRAGMENT_SECONDS", FRAGMENT_SECONDS),
        tempfile.TemporaryDirectory(prefix="bench-fleet-", dir=memory) as folder,
    ):
        result: Result = run(loop, _train(Trainee(arm, loop), Path(folder)))
        return result


async def _train(trainee: Trainee, folder: Path) -> Result:
    arm = trainee.arm
    config, journal = config_of(arm, folder), Journal(folder / "journal")
    clients: Any = trainee.clients
    async with RolloutPool(clients, config.rollout) as pool:
        for server in pool.servers:
            await pool.mark_ready(server, "0.1.")
        _watch(trainee, pool)
        rewards: Any = SimpleNamespace(
            score_group=trainee.rewarded, pool=SimpleNamespace(take_busy_seconds=lambda: 0.0)
        )
        stream: Any = SimpleNamespace(
            prompt_at=prompt_at, problem_at=lambda position: (0, Problem([], ""))
        )
        window = window_of(config, 0, 0)
        async with producing(config, journal, Rollouts(pool, rewards, stream, []), window) as found:
            await _steps(trainee, pool, found)
        return trainee.result(pool, window.admitted)


def _watch(trainee: Trainee, pool: RolloutPool) -> None:
    """Note how far each response has come, whoever asked for it."""
    generate_group = pool.generate_group

    async def watched(prompt: Any, known: Any, keep: Any) -> Group:
        def kept(fragment: Any) -> None:
            key = (fragment.position, fragment.index)
            trainee.reached[key] = max(trainee.reached.get(key, 0), fragment.end)
            keep(fragment)

        return await generate_group(prompt, known, kept)

    pool.generate_group = watched  # type: ignore[method-assign]


async def _nothing() -> None:
    pass


async def _steps(trainee: Trainee, pool: RolloutPool, producer: Producer) -> None:
    """What the training loop does, with a trainer that sleeps."""
    arm = trainee.arm
    nominal = arm.groups * arm.samples * (trainee.lengths.mean() + PROMPT)
    for step in range(arm.steps):
        producer.admit()
        collected = await producer.batch(_nothing)
        passed = trainee.loop.time() - (trainee.starts[-1][0] if trainee.starts else 0.0)
        capacity = passed * arm.servers * arm.slots
        trainee.slot_seconds += collected.metrics["rollout/slots_used_frac"] * capacity
        trainee.mark()
        trainee.note(collected, step)
        tokens = sum(s.length for j in collected.groups for s in j.group.samples)
        seconds = arm.train_seconds * tokens / nominal
        await asyncio.sleep(seconds)
        await publish(trainee, pool, step + 1)
        trainee.worked += seconds + arm.publish_seconds
        producer.window.publish()


async def publish(trainee: Trainee, pool: RolloutPool, step: int) -> None:
    """What ``sync.protocol`` does to the pool, with servers that take the weights in a fixed time."""
    version = str(WeightVersion(step, 1))
    await pool.close_dispatch()
    await pool.retire_versions(f"awaits weights {step}")
    if not trainee.arm.keep:
        await pool.drain(pool.servers, 60.0)
    for client in trainee.clients:
        client.pause()
    await asyncio.sleep(trainee.arm.publish_seconds)
    for server, client in zip(pool.servers, trainee.clients, strict=True):
        client.take_weights(version, flush=not trainee.arm.keep)
        await pool.mark_ready(server, version)
    await pool.open_dispatch()
