"""Generation beside training: begins groups as the window admits them, scores them and makes them durable.

The producer runs on its own; ``batch`` hands the consumer the groups of the next batch once all of them are durable,
and only the consumer commands the trainer. A failure of the producer is raised there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import numpy as np

from agpo_megatron.algorithm.step import has_variance
from agpo_megatron.config.schema import Config
from agpo_megatron.controller.evaluation import Rollouts
from agpo_megatron.controller.schedule import Fate, Window
from agpo_megatron.journal import Journal, JournaledGroup
from agpo_megatron.rollout.client import NonFiniteLogprob, ServerError
from agpo_megatron.rollout.group_rollout import RolloutError
from agpo_megatron.samples import Fragment, Group, Prompt
from agpo_megatron.wait import waiting_async

log = logging.getLogger(__name__)
FRAGMENT_SECONDS = 2.0
"""Seconds between two files of fragments: what a killed controller loses of responses that were cut into fragments."""
SET_ASIDE_SHARE = 0.01
"""Share of the groups begun that may fail for good, one at least; beyond it the run ends."""
STOP_SECONDS = 10.0
"""Seconds for the servers to end what runs when the run is to stop; what they return is kept."""


NO_GROUP = Group(Prompt(-1, np.zeros(0, np.int32), ""), [])
"""Ends the writer."""


@dataclass(frozen=True)
class Collected:
    """The groups of a batch, and how many dynamic sampling discarded for it. ``cursor``: the position after the last
    prompt used. ``metrics``: of the generation since the batch before; they depend on time, and are not recorded."""

    groups: list[JournaledGroup]
    discarded: int
    cursor: int
    metrics: dict[str, float]


class Producer:
    """One run's generation. Use ``producing``."""

    def __init__(
        self, config: Config, journal: Journal, rollouts: Rollouts, window: Window
    ) -> None:
        self.window = window
        self._config, self._journal, self._rollouts = config, journal, rollouts
        self._pending: dict[int, JournaledGroup] = {}
        self._known: dict[int, list[Fragment]] = {}
        self._ready: dict[int, JournaledGroup] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._finished: asyncio.Queue[Group] = asyncio.Queue()
        self._fragments: dict[int, list[Fragment]] = {}  # not durable yet, by position
        self._changed = asyncio.Event()
        self._ending = False
        self._failure: BaseException | None = None
        self._stats = _Stats(rollouts, window)
        self._set_aside = self._begun = 0

    def resume(self, pending: dict[int, JournaledGroup], known: dict[int, list[Fragment]]) -> None:
        """Take over what earlier attempts left: durable groups, and fragments of others."""
        self._pending, self._known = pending, known

    def admit(self) -> None:
        """Begin every group that the window admits. Groups that are durable already are not generated again."""
        while not self._ending and (positions := self.window.admit()):
            for position in positions:
                if position in self._pending:
                    self._settle(self._pending.pop(position))
                else:
                    self._begun += 1
                    task = asyncio.create_task(self._roll_out(position))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)

    async def batch(self, between: Callable[[], Awaitable[None]]) -> Collected:
        """Wait for the groups of the next batch. ``between`` is called every second of the wait, and may raise. Raises
        what ended the generation of a group."""
        while True:
            if self._failure is not None:
                raise self._failure
            if taken := self.window.take():
                break
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._changed.wait()
            await between()
        metrics = self._stats.take([self._ready[p].group for p in taken.positions])
        groups = [self._ready.pop(p) for p in taken.positions]
        for position in taken.discarded:
            del self._ready[position]
        return Collected(groups, len(taken.discarded), taken.cursor, metrics)

    async def _roll_out(self, position: int) -> None:
        rollouts = self._rollouts
        try:
            prompt = rollouts.stream.prompt_at(position)
            group = await rollouts.pool.generate_group(
                prompt, self._known.pop(position, ()), self._keep
            )
            source, problem = rollouts.stream.problem_at(position)
            self._finished.put_nowait(await rollouts.rewards.score_group(group, problem, source))
        except (RolloutError, ServerError) as error:
            self._put_aside(position, error)
        except Exception as error:  # it ends the run, in the consumer
            self._fail(error)

    def _put_aside(self, position: int, error: RolloutError | ServerError) -> None:
        """Go on without one group; with too many of them the cause is elsewhere."""
        self._set_aside += 1
        allowed = max(1, int(SET_ASIDE_SHARE * self._begun))
        if self._set_aside > allowed or isinstance(error, NonFiniteLogprob):
            self._fail(error)
            return
        log.error(
            "group g%09d is set aside (%d of %d, at most %d): %s",
            *(position, self._set_aside, self._begun, allowed, error),
        )
        self._fragments.pop(position, None)
        self.window.finish(position, Fate.SET_ASIDE)
        self._changed.set()
        self.admit()

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self._changed.set()

    def _keep(self, fragment: Fragment) -> None:
        self._fragments.setdefault(fragment.position, []).append(fragment)

    def _settle(self, journaled: JournaledGroup) -> None:
        """Note a durable group."""
        group = journaled.group
        informative = has_variance(group)
        self._ready[group.prompt.position] = journaled
        self._stats.finished(group)
        self.window.finish(group.prompt.position, Fate.ACCEPTED if informative else Fate.UNIFORM)
        self._changed.set()

    # Durability

    async def write(self) -> None:
        """Make finished groups durable as they come, and fragments of unfinished ones every few seconds, until ``end``.

        One task does both, so that no fragment is written after the group that it belongs to.
        """
        due = time.monotonic() + FRAGMENT_SECONDS
        ended = False
        while not ended:
            groups = await self._finished_groups(due - time.monotonic())
            ended = NO_GROUP in groups
            groups = [group for group in groups if group is not NO_GROUP]
            for group in groups:
                self._fragments.pop(group.prompt.position, None)
            if groups:
                for journaled in await asyncio.to_thread(self._journal.append, groups):
                    self._settle(journaled)
                self.admit()
            if ended or time.monotonic() >= due:
                fragments = [f for some in self._fragments.values() for f in some]
                self._fragments.clear()
                if fragments:
                    await asyncio.to_thread(self._journal.append_fragments, fragments)
                due = time.monotonic() + FRAGMENT_SECONDS

    async def _finished_groups(self, seconds: float) -> list[Group]:
        """Return the groups that are finished now; wait for one for ``seconds`` at most."""
        groups: list[Group] = []
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, seconds)):
                groups.append(await self._finished.get())
        while not self._finished.empty():
            groups.append(self._finished.get_nowait())
        return groups

    async def run(self) -> None:
        """``write``, whose failure ends the run, in the consumer."""
        try:
            await self.write()
        except Exception as error:
            self._fail(error)

    async def end(self, writer: asyncio.Task[None]) -> None:
        """End what runs and keep what it came to."""
        pool, self._ending = self._rollouts.pool, True
        if self._tasks:
            await pool.close_dispatch()
            await pool.drain(pool.servers, STOP_SECONDS)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await pool.open_dispatch()  # for the evaluation at the end
        self._finished.put_nowait(NO_GROUP)
        try:
            async with waiting_async("generated groups to be durable", STOP_SECONDS):
                await writer
        finally:
            writer.cancel()


class _Stats:
    """Counts of the generation between two batches."""

    def __init__(self, rollouts: Rollouts, window: Window) -> None:
        self._rollouts, self._window = rollouts, window
        self._since = time.monotonic()
        rollouts.pool.slots.take_usage()  # of the evaluation before
        self._before = (0, 0, 0)
        self._generated = self._trained = (0, 0)  # (tokens, samples) since this start
        self._fresh = 0  # tokens of groups finished since the batch before

    def finished(self, group: Group) -> None:
        self._generated = _plus(self._generated, [group])
        self._fresh += sum(len(sample.response_tokens) for sample in group.samples)

    def take(self, groups: Sequence[Group]) -> dict[str, float]:
        self._trained = _plus(self._trained, groups)
        pool, now = self._rollouts.pool, time.monotonic()
        counts = (pool.counts.fragments, pool.counts.resumed, pool.counts.tokens_lost)
        fragments, resumed, lost = (a - b for a, b in zip(counts, self._before, strict=True))
        slots, servers = pool.slots.take_usage()
        passed = len(pool.servers) * max(now - self._since, 1e-9)
        seconds = max(now - self._since, 1e-9)
        self._since, self._before = now, counts
        fresh, self._fresh = self._fresh, 0
        scoring = self._rollouts.rewards.pool.take_busy_seconds()
        metrics = {
            "rollout/slots_used_frac": slots / (passed * pool.slots.limit),
            "idle/servers_frac": 1 - servers / passed,
            "rollout/fragments": float(fragments),
            "rollout/resumed": float(resumed),
            "rollout/tokens_lost": float(lost),
            "window/ready_groups": float(self._window.ready),
            "window/open_groups": float(self._window.open),
            "time/reward": scoring,
            "busy/rewards_frac": scoring / seconds,
            "throughput/servers_tokens_per_s": fresh / seconds,
        }
        if self._generated[1] and self._trained[1]:
            means = (tokens / samples for tokens, samples in (self._trained, self._generated))
            metrics["rollout/length_bias"] = next(means) / next(means) - 1
        return metrics


def _plus(total: tuple[int, int], groups: Sequence[Group]) -> tuple[int, int]:
    samples = [sample for group in groups for sample in group.samples]
    return total[0] + sum(len(s.response_tokens) for s in samples), total[1] + len(samples)


@asynccontextmanager
async def producing(
    config: Config, journal: Journal, rollouts: Rollouts, window: Window
) -> AsyncIterator[Producer]:
    """Run a producer, with what earlier attempts left; on leaving, end what is generated and keep its fragments."""
    producer = Producer(config, journal, rollouts, window)
    pending = await asyncio.to_thread(journal.pending_groups)
    known = await asyncio.to_thread(journal.pending_fragments, pending)
    producer.resume(pending, known)
    writer = asyncio.create_task(producer.run())
    try:
        yield producer
    finally:
        await producer.end(writer)
