"""Servers that hang or do not join, a trainer that fails: the publish goes on with the rest, or says what is wrong."""

from __future__ import annotations

import asyncio
import time

import pytest
from test_sync_protocol import NAMES, publishing, received

from agpo_megatron.rollout.servers import State
from agpo_megatron.samples import WeightVersion
from agpo_megatron.sync.protocol import PublishError

pytestmark = pytest.mark.processes


@pytest.mark.parametrize(
    "endpoint",
    [
        "pause_generation",
        "init_weights_update_group",
        "begin_weight_update",
        "end_weight_update",
        "weights_checker",
        "flush_cache",
    ],
)
def test_a_server_that_hangs_does_not_hold_the_others_up(endpoint: str) -> None:
    async def run() -> None:
        async with publishing(2, timeout=9) as (publisher, pool, (good, hung), _):
            hung.stall[endpoint] = asyncio.Event()
            started = time.monotonic()
            result = await publisher.publish(WeightVersion(1, 1))
            assert time.monotonic() - started < 6
            assert result.servers == [good.url]
            assert [s.state for s in pool.servers] == [State.READY, State.DEAD]

    asyncio.run(run())


def test_a_server_that_hangs_in_the_broadcast() -> None:
    """The trainer gives up first, which fails the healthy server's call; that one receives again, the other is DEAD."""

    async def run() -> None:
        async with publishing(2, timeout=9) as (publisher, pool, (good, hung), trainer):
            endpoint = "update_weights_from_distributed"
            hung.stall[endpoint], good.stall[endpoint] = asyncio.Event(), asyncio.Event()
            good.refuse.append(endpoint)

            async def give_up(seconds: float) -> None:
                if trainer.sent == 1:
                    assert seconds <= 3  # the pass's own third
                    await asyncio.sleep(seconds)
                    trainer.error = "deadline"
                    good.stall.pop(endpoint).set()

            trainer.at_send = give_up
            result = await publisher.publish(WeightVersion(1, 1))
            assert result.servers == [good.url]
            assert received(good) == [["a"], *NAMES]
            assert [s.state for s in pool.servers] == [State.READY, State.DEAD]

    asyncio.run(run())


def test_a_server_that_refuses_a_bucket_leaves_so_that_the_trainer_can_go_on() -> None:
    async def run() -> None:
        async with publishing(2) as (publisher, _, (_, bad), trainer):
            bad.refuse.append("update_weights_from_distributed")

            async def until_it_left(_: float) -> None:
                async with asyncio.timeout(5):
                    while trainer.sent == 1 and "destroy_weights_update_group" not in dict(
                        bad.controls
                    ):
                        await asyncio.sleep(0.01)

            trainer.at_send = until_it_left
            result = await publisher.publish(WeightVersion(1, 1))
            assert len(result.servers) == 2

    asyncio.run(run())


@pytest.mark.parametrize("hangs", [False, True])
def test_a_server_that_does_not_join_does_not_block_those_that_wait_for_it(hangs: bool) -> None:
    async def run() -> None:
        async with publishing(3, timeout=9) as (publisher, pool, (one, bad, two), trainer):
            endpoint = "init_weights_update_group"
            closed = asyncio.Event()  # the first groups, when the trainer opens anew
            for fake in (one, two):
                fake.stall[endpoint] = closed
                fake.refuse.append(endpoint)
            if hangs:
                bad.stall[endpoint] = asyncio.Event()
            else:
                bad.refuse.append(endpoint)

            async def release() -> None:
                if len(trainer.opened) == 2:
                    closed.set()

            trainer.at_open = release
            result = await publisher.publish(WeightVersion(1, 1))
            healthy = [one.url, two.url]
            assert result.servers == (healthy if hangs else [*healthy, bad.url])
            assert received(one) == received(two) == NAMES  # once: they never left the transfer
            worlds = [world for _, world in trainer.opened]
            assert worlds == ([7, 7, 5] if hangs else [7, 5, 3])
            offsets = [b["rank_offset"] for n, b in two.controls if n == endpoint]
            assert offsets == [5, 3, 3]
            assert pool.servers[1].state is (State.DEAD if hangs else State.READY)

    asyncio.run(run())


@pytest.mark.parametrize("where", ["open", "send"])
def test_groups_that_may_be_closed_are_opened_again(where: str) -> None:
    async def run() -> None:
        async with publishing(1) as (publisher, _, (fake,), trainer):

            async def fail(*_: float) -> None:
                raise RuntimeError("trainer trouble")

            if where == "send":
                await publisher.publish(WeightVersion(1, 1))  # open, and would be kept
            setattr(trainer, f"at_{where}", fail)
            with pytest.raises(RuntimeError, match="trainer trouble"):
                await publisher.publish(WeightVersion(1, 1))
            setattr(trainer, f"at_{where}", None)
            fake.controls.clear()
            await publisher.publish(WeightVersion(1, 1))
            assert [name for name, _ in fake.controls].count("init_weights_update_group") == 2

    asyncio.run(run())


def test_groups_that_nobody_can_join_fail_the_servers_and_end() -> None:
    async def run() -> None:
        async with publishing(2, timeout=9) as (publisher, pool, fakes, trainer):
            closed = asyncio.Event()
            for fake in fakes:
                fake.stall["init_weights_update_group"] = closed
                fake.refuse += ["init_weights_update_group"] * 3

            async def release() -> None:
                if len(trainer.opened) == 2:
                    closed.set()

            trainer.at_open = release
            with pytest.raises(PublishError, match="did not open in time"):
                await publisher.publish(WeightVersion(1, 1))
            assert all(server.state is State.QUARANTINED for server in pool.servers)

    asyncio.run(run())
