"""Who gets room on which server, in which order, and that nobody keeps it or waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from generating_server import GeneratingServer, decode, prompt, response

from agpo_megatron.config.schema import RolloutConfig
from agpo_megatron.rollout import slots as slots_module
from agpo_megatron.rollout.client import ServerClient
from agpo_megatron.rollout.pool import RolloutPool
from agpo_megatron.rollout.servers import Server, State
from agpo_megatron.rollout.slots import Slots
from agpo_megatron.wait import WaitExpired


class Fleet:
    """Slots over servers that are never asked anything; ``given`` lists in order who got room where."""

    def __init__(self, count: int, limit: int) -> None:
        session: Any = None
        self.servers = [Server(ServerClient(f"http://s{i}", session)) for i in range(count)]
        self.ready = list(self.servers)
        self.none_ready = self.asked = 0
        self.slots = Slots(limit, self._ready, self._note)
        self.given: list[tuple[str, int]] = []

    def _ready(self) -> list[Server]:
        self.asked += 1
        return self.ready

    def _note(self) -> None:
        self.none_ready += 1

    def ask(self, name: str, samples: int, position: int, index: int = 0, **more: Any) -> Any:
        """A task that waits for room, then keeps it."""

        async def wait() -> Server:
            server = await self.slots.acquire(samples, (position, index), **more)
            self.given.append((name, self.servers.index(server)))
            return server

        return asyncio.create_task(wait())

    def used(self) -> list[int]:
        return [self.slots.used(server) for server in self.servers]


async def settle() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test

    asyncio.run(bounded())


def test_the_lowest_position_comes_first_whoever_came_first() -> None:
    async def test() -> None:
        fleet = Fleet(1, limit=2)
        (server,) = fleet.servers
        fleet.ask("running", 2, 9)
        await settle()
        for name, position, index in (("e", 7, 0), ("d", 4, 1), ("c", 4, 0)):
            fleet.ask(name, 1, position, index)
        await settle()
        fleet.ask("b", 1, 3)  # a group that arrives later and is needed first
        fleet.ask("a", 2, 0)
        await settle()
        assert fleet.given == [("running", 0)] and fleet.slots.waiting == 5
        fleet.slots.release(server, 1)
        await settle()
        assert len(fleet.given) == 1, "a needs two, and nobody passes it"
        fleet.slots.release(server, 1)
        await settle()
        assert fleet.given[1:] == [("a", 0)]
        for count in (2, 1, 1):
            fleet.slots.release(server, count)
            await settle()
        assert [name for name, _ in fleet.given[1:]] == ["a", "b", "c", "d", "e"]
        assert fleet.used() == [2] and fleet.slots.waiting == 0

    run(test())


def test_equal_priorities_come_in_the_order_of_their_arrival() -> None:
    async def test() -> None:
        fleet = Fleet(1, limit=1)
        for name in "abcd":
            fleet.ask(name, 1, 5)
        for _ in range(3):
            await settle()
            fleet.slots.release(fleet.servers[0], 1)
        await settle()
        assert [name for name, _ in fleet.given] == ["a", "b", "c", "d"]

    run(test())


def test_the_least_loaded_server_up_to_the_limit() -> None:
    async def test() -> None:
        fleet = Fleet(2, limit=4)
        for position, samples in enumerate((3, 1, 2, 1, 2)):
            fleet.ask(str(position), samples, position)
            await settle()
        assert fleet.given == [("0", 0), ("1", 1), ("2", 1), ("3", 0)]
        assert fleet.used() == [4, 3] and fleet.slots.waiting == 1
        assert [server.in_flight for server in fleet.servers] == [4, 3]
        fleet.slots.release(fleet.servers[1], 1)
        await settle()
        assert fleet.given[4:] == [("4", 1)] and fleet.used() == [4, 4]

    run(test())


def test_a_request_above_the_limit_takes_an_idle_server() -> None:
    async def test() -> None:
        fleet = Fleet(2, limit=4)
        fleet.ask("small", 1, 0)
        fleet.ask("large", 9, 1)
        fleet.ask("larger", 10, 2)
        await settle()
        assert fleet.given == [("small", 0), ("large", 1)]
        fleet.slots.release(fleet.servers[0], 1)
        await settle()
        assert fleet.given[2:] == [("larger", 0)] and fleet.used() == [10, 9]

    run(test())


@pytest.mark.parametrize(
    ("own", "other", "expected"),
    [(0, 0, 1), (1, 0, 1), (2, 0, 0), (5, 2, 1), (6, 2, 0), (7, 3, 1), (8, 7, 0)],
)
def test_the_server_with_the_prefix_is_preferred_unless_overloaded(
    own: int, other: int, expected: int
) -> None:
    """Up to twice the load of the other, and one: a server that has come back soon gets its share."""

    async def test() -> None:
        fleet = Fleet(2, limit=8)
        for server, used in ((1, own), (0, other)):
            for _ in range(used):
                avoid = [fleet.servers[1 - server]]
                await fleet.slots.acquire(1, (0, 0), avoid=avoid)
        assert fleet.used() == [other, own]
        chosen = await fleet.slots.acquire(1, (1, 0), prefer=fleet.servers[1])
        assert fleet.servers.index(chosen) == expected

    run(test())


def test_a_server_is_avoided_only_where_there_is_another() -> None:
    async def test() -> None:
        fleet = Fleet(3, limit=8)
        first, second, third = fleet.servers
        chosen = await fleet.slots.acquire(5, (0, 0), avoid=[first, third], prefer=first)
        assert chosen is second
        assert await fleet.slots.acquire(1, (0, 0), avoid=[first, third]) is second
        assert await fleet.slots.acquire(1, (0, 0), avoid=fleet.servers) is first
        fleet.ready = [second, third]
        assert await fleet.slots.acquire(1, (0, 0), prefer=first) is third
        fleet.ready = [third]
        assert await fleet.slots.acquire(1, (0, 0), avoid=[third]) is third

    run(test())


def test_a_waiter_that_is_cancelled_holds_nobody_up() -> None:
    async def test() -> None:
        fleet = Fleet(1, limit=4)
        fleet.ask("running", 2, 0)
        large = fleet.ask("large", 4, 1)
        fleet.ask("small", 1, 2)
        await settle()
        assert [name for name, _ in fleet.given] == ["running"]
        large.cancel()
        await settle()
        assert [name for name, _ in fleet.given] == ["running", "small"]
        assert fleet.used() == [3] and fleet.slots.waiting == 0

    run(test())


def test_one_that_is_cancelled_as_it_gets_room_gives_it_back() -> None:
    async def test() -> None:
        fleet = Fleet(1, limit=2)
        running = fleet.ask("running", 2, 0)
        lost = fleet.ask("lost", 2, 1)
        fleet.ask("next", 2, 2)
        await settle()
        fleet.slots.release(running.result(), 2)
        fleet.slots.offer()  # "lost" has room now, and has not run yet
        assert fleet.used() == [2]
        lost.cancel()
        await settle()
        assert [name for name, _ in fleet.given] == ["running", "next"]
        assert fleet.used() == [2] and fleet.servers[0].in_flight == 2

    run(test())


def test_without_a_ready_server_somebody_is_told_and_all_can_be_failed() -> None:
    async def test() -> None:
        fleet = Fleet(1, limit=2)
        fleet.ready = []
        waiters = [fleet.ask(str(i), 1, i) for i in range(3)]
        await settle()
        assert (fleet.none_ready, fleet.slots.waiting) == (3, 3)
        waiters[1].cancel()
        await settle()
        fleet.slots.fail(ValueError("no server"))
        found = await asyncio.gather(*waiters, return_exceptions=True)
        assert [type(f) for f in found] == [ValueError, asyncio.CancelledError, ValueError]
        assert fleet.slots.waiting == 0 and fleet.used() == [0]
        fleet.ready = fleet.servers
        assert await fleet.slots.acquire(2, (0, 0)) is fleet.servers[0], "it goes on"

    run(test())


def test_usage_is_summed_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(slots_module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def test() -> None:
        slots = Fleet(2, limit=4).slots
        now[0] += 5  # idle
        first = await slots.acquire(3, (0, 0))
        now[0] += 2  # 3 samples on one server
        second = await slots.acquire(1, (0, 0))
        assert first is not second
        now[0] += 4  # 4 samples on two
        slots.release(first, 3)
        now[0] += 1  # 1 sample on one
        assert slots.take_usage() == (6 + 16 + 1, 2 + 8 + 1)
        now[0] += 3
        assert slots.take_usage() == (3, 3)
        slots.release(second, 1)
        now[0] += 7
        assert slots.take_usage() == (0, 0)

    run(test())


def test_thousands_of_waiters_are_each_woken_once() -> None:
    """A change looks at those who can go on, and at the first who cannot: not at all who wait."""
    count, limit = 5000, 64

    async def test() -> None:
        fleet = Fleet(2, limit=limit)

        async def one(position: int) -> None:
            server = await fleet.slots.acquire(1, (position, 0))
            fleet.given.append((str(position), 0))
            assert max(fleet.used()) <= limit
            await asyncio.sleep(0)
            fleet.slots.release(server, 1)

        chosen = 0
        choose = fleet.slots._choose

        def counted(*args: Any) -> Server | None:
            nonlocal chosen
            chosen += 1
            return choose(*args)

        fleet.slots._choose = counted  # type: ignore[method-assign]
        await asyncio.gather(*(one(position) for position in reversed(range(count))))
        order = [int(name) for name, _ in fleet.given]
        assert order == list(range(count)), "the lowest first, though the highest asked first"
        assert max(chosen, fleet.asked) <= 3 * count, "per arrival, wait and release"
        assert fleet.used() == [0, 0] and fleet.slots.waiting == 0

    run(test())


async def _pool(session: aiohttp.ClientSession, fake: GeneratingServer) -> RolloutPool:
    config = RolloutConfig(
        group_size=2, fragment_tokens=4, max_in_flight=16, start_timeout=0.3, attempts=1
    )
    pool = RolloutPool([ServerClient(fake.url, session, timeout=5)], config, decode)
    await pool.mark_ready(pool.servers[0], "1.1.a")
    return pool


@pytest.mark.processes
def test_an_evaluation_beside_training_has_slots_of_its_own() -> None:
    async def test() -> None:
        fake = GeneratingServer()
        await fake.start()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            pool = await _pool(session, fake)
            server = pool.servers[0]
            fake.halt(2)
            train = [asyncio.create_task(pool.generate_group(prompt(i, 6))) for i in range(10)]
            while fake.busy < 16:
                await asyncio.sleep(0.005)
            beside = [
                asyncio.create_task(pool.sample(prompt(20 + i, 7), beside=True)) for i in range(5)
            ]
            while fake.busy < 18:  # an eighth of 16 more
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.05)
            assert (pool.slots.used(server), pool.slots_beside.used(server)) == (16, 2)
            assert (pool.slots.waiting, pool.slots_beside.waiting) == (2, 3)
            assert server.in_flight == 18
            waits = asyncio.create_task(pool.sample(prompt(30, 7)))
            await asyncio.sleep(0.05)
            assert pool.slots.waiting == 3, "one that is not beside waits like training"
            fake.go_on.set()
            for group in await asyncio.gather(*beside, waits):
                assert group.samples[0].response_tokens.tolist() == response(group.prompt, 0)
            await asyncio.gather(*train)
            assert fake.most_busy == 18 and server.in_flight == 0
            assert pool.counts.fragments == 10 * 2 * 2, "those of evaluations do not count"
        await fake.stop()

    run(test())


@pytest.mark.processes
def test_nobody_waits_for_ever_while_no_server_is_ready() -> None:
    async def test() -> None:
        fake = GeneratingServer()
        await fake.start()
        async with aiohttp.ClientSession() as session:
            pool = await _pool(session, fake)
            await pool.close_dispatch()
            tasks = [asyncio.create_task(pool.generate_group(prompt(i, 6))) for i in range(3)]
            tasks.append(asyncio.create_task(pool.sample(prompt(9, 6), beside=True)))
            await asyncio.sleep(0.4)
            assert not any(task.done() for task in tasks), "a publish has its own deadline"
            await pool.quarantine(pool.servers[0], "transfer broke")
            await pool.open_dispatch()
            await asyncio.sleep(0.1)
            assert not any(task.done() for task in tasks), "0.3 s from now on"
            for error in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(error, WaitExpired)
                assert "to become ready" in str(error)
                assert f"{fake.url} quarantined" in str(error) and "transfer broke" in str(error)
            waiter = asyncio.create_task(pool.generate_group(prompt(4, 6)))
            with pytest.raises(WaitExpired):  # it has been over since before
                await waiter
            await pool.mark_ready(pool.servers[0], "1.1.a")
            await pool.generate_group(prompt(5, 6))
            assert pool.servers[0].state is State.READY
        await fake.stop()

    run(test())
