"""What a publish does to the responses that run meanwhile: ended and continued later, or halted and kept."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from generating_server import GeneratingServer, prompt, response
from test_sync_protocol import NAMES, publishing, received

from agpo_megatron.rollout.pool import RolloutPool
from agpo_megatron.rollout.servers import State
from agpo_megatron.samples import Group, WeightVersion

pytestmark = pytest.mark.processes
TRANSFER = [
    "begin_weight_update",
    *["update_weights_from_distributed"] * 3,
    "end_weight_update",
    "weights_checker",
]
LENGTH = 9


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def halted_group(
    pool: RolloutPool, position: int, fake: GeneratingServer
) -> asyncio.Task[Group]:
    """A group of two whose samples wait on ``fake`` before their fourth token."""
    fake.halt(3)
    task = asyncio.create_task(pool.generate_group(prompt(position, LENGTH)))
    await until(lambda: fake.halted == 2)
    return task


def controls(fake: GeneratingServer) -> list[str]:
    """Names of the control calls since the last time, a pause with its mode, abort_request once a row."""
    names = [
        f"pause {body['mode']}" if name == "pause_generation" else name
        for name, body in fake.controls
    ]
    fake.controls.clear()
    repeated = [
        name == "abort_request" == before for name, before in zip(names[1:], names, strict=False)
    ]
    return names[:1] + [name for name, again in zip(names[1:], repeated, strict=True) if not again]


def assert_whole(group: Group, spans: list[tuple[str, int, int]]) -> None:
    for sample in group.samples:
        assert sample.response_tokens.tolist() == response(group.prompt, sample.index)
        assert [(s.version, s.start, s.end) for s in sample.versions] == spans


def test_the_first_publish_ends_what_runs_and_later_ones_keep_it_running() -> None:
    async def run() -> None:
        async with publishing(1, keep_running=True, kind=GeneratingServer, group_size=2) as (
            publisher,
            pool,
            (fake,),
            trainer,
        ):
            await pool.mark_ready(pool.servers[0], "1.1.a")
            task = await halted_group(pool, 0, fake)
            fake.controls.clear()
            first = str((await publisher.publish(WeightVersion(1, 1))).version)
            joins = ["init_weights_update_group"] * 2
            assert controls(fake) == [
                "abort_request", "pause abort", *joins, *TRANSFER,
                "flush_cache", "update_weight_version", "continue_generation",
            ]  # fmt: skip
            assert_whole(await task, [("1.1.a", 0, 2), (first, 2, LENGTH)])

            task = await halted_group(pool, 1, fake)
            before = len(fake.requests)

            async def tempt(_: float) -> None:
                fake.go_on.set()  # only the pause holds it now
                await asyncio.sleep(0.05)
                assert (fake.busy, pool.servers[0].in_flight) == (2, 2)
                assert pool.servers[0].state is State.QUARANTINED

            trainer.at_send = tempt
            second = str((await publisher.publish(WeightVersion(2, 1))).version)
            assert controls(fake) == [
                "pause in_place", *TRANSFER, "update_weight_version", "continue_generation"
            ]  # fmt: skip
            assert fake.version == pool.servers[0].version == second != first
            assert_whole(await task, [(first, 0, 3), (second, 3, LENGTH)])
            assert len(fake.requests) == before + 1, "and the probe"
            assert (pool.counts.tokens_lost, pool.counts.resumed) == (2, 2), "those of the first"
            assert (pool.servers[0].torn, pool.servers[0].paused) == (0, False)

    asyncio.run(run())


def test_recompute_ends_what_runs_at_every_publish() -> None:
    async def run() -> None:
        async with publishing(1, kind=GeneratingServer, group_size=2) as (
            publisher, pool, (fake,), _,
        ):  # fmt: skip
            first = str((await publisher.publish(WeightVersion(1, 1))).version)
            task = await halted_group(pool, 0, fake)
            fake.controls.clear()
            second = str((await publisher.publish(WeightVersion(2, 1))).version)
            assert controls(fake) == [
                "abort_request", "pause abort", *TRANSFER,
                "flush_cache", "update_weight_version", "continue_generation",
            ]  # fmt: skip
            assert_whole(await task, [(first, 0, 2), (second, 2, LENGTH)])
            assert sorted(len(r["input_ids"]) for r in fake.requests[-2:]) == [5, 5]
            assert (pool.counts.tokens_lost, pool.counts.resumed) == (2, 2)

    asyncio.run(run())


@pytest.mark.parametrize("dies", [False, True])
def test_what_a_server_that_left_the_transfer_returns_is_thrown_away(dies: bool) -> None:
    async def run() -> None:
        async with publishing(
            2, keep_running=True, kind=GeneratingServer, group_size=2, fragment_tokens=16
        ) as (publisher, pool, (bad, good), trainer):
            first = str((await publisher.publish(WeightVersion(1, 1))).version)
            task = await halted_group(pool, 0, bad)
            (bad.drop if dies else bad.refuse).append("end_weight_update")
            answered = len(bad.answers)

            async def tear(_: float) -> None:
                bad.version = "half.written"  # as what runs there would see it
                bad.go_on.set()

            trainer.at_send = tear
            good.controls.clear()
            bad.controls.clear()
            second = str((await publisher.publish(WeightVersion(2, 1))).version)
            assert pool.servers[0].torn == 1 and pool.servers[1].torn == 0
            assert (good.version, pool.servers[1].state) == (second, State.READY)
            assert "abort_request" not in controls(good)
            if dies:
                assert pool.servers[0].state in (State.DEAD, State.QUARANTINED)
            else:
                names = controls(bad)
                again = names.index("continue_generation")  # to be aborted, it has to go on
                assert names[again : again + 3] == [
                    "continue_generation", "abort_request", "pause abort"
                ]  # fmt: skip
                assert "flush_cache" in names and received_twice(bad, names)
                assert pool.servers[0].state is State.READY
            assert_whole(await task, [(second, 0, LENGTH)])
            assert len(bad.answers) >= answered + 2, "it did return something"
            assert pool.counts.tokens_lost == 2 * 16
            assert first != second

    asyncio.run(run())


def received_twice(fake: GeneratingServer, names: list[str]) -> bool:
    return names.count("update_weights_from_distributed") == 2 * len(NAMES)


def test_what_runs_when_a_transfer_breaks_off_is_thrown_away_too() -> None:
    """The run ends then; what it drains at last may have been generated with weights that are half written."""

    async def run() -> None:
        async with publishing(1, keep_running=True, kind=GeneratingServer, group_size=2) as (
            publisher,
            pool,
            (fake,),
            trainer,
        ):
            await publisher.publish(WeightVersion(1, 1))
            assert len(received(fake)) == 3
            task = await halted_group(pool, 0, fake)

            async def fail(_: float) -> None:
                fake.version = "half.written"
                fake.go_on.set()
                raise ConnectionResetError("trainer is gone")

            trainer.at_send = fail
            with pytest.raises(ConnectionResetError):
                await publisher.publish(WeightVersion(2, 1))
            assert pool.servers[0].state is State.QUARANTINED
            await pool.close_dispatch()
            await pool.drain(pool.servers, 5)
            assert pool.servers[0].in_flight == 0
            assert pool.counts.fragments == 0 and pool.counts.tokens_lost > 0
            task.cancel()

    asyncio.run(run())
