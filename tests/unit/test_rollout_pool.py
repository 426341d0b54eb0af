"""Dispatch and failure behaviour of the pool, against local servers that fail in ways real ones cannot be made to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import made
import pytest
from aiohttp import web
from fake_sglang import FakeServer

from agpo_megatron.config.schema import RolloutConfig
from agpo_megatron.rollout import pool as pool_module
from agpo_megatron.rollout.client import NonFiniteLogprob, ServerClient, ServerError
from agpo_megatron.rollout.group_rollout import RolloutError
from agpo_megatron.rollout.pool import RolloutPool
from agpo_megatron.rollout.servers import State
from agpo_megatron.samples import Prompt
from agpo_megatron.wait import WaitExpired

pytestmark = pytest.mark.processes


@asynccontextmanager
async def fleet(
    count: int, probe: bool = False, **config: Any
) -> AsyncIterator[tuple[RolloutPool, list[FakeServer]]]:
    """A pool with ``count`` READY servers; ``probe`` starts its probing."""
    fakes = [FakeServer() for _ in range(count)]
    for fake in fakes:
        await fake.start()
    settings = {"group_size": 4, "max_in_flight": 8, "start_timeout": 5.0, **config}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        clients = [ServerClient(fake.url, session, timeout=5) for fake in fakes]
        pool = RolloutPool(clients, RolloutConfig.model_validate(settings))
        for server in pool.servers:
            await pool.mark_ready(server, "1.1.a")
        try:
            if probe:
                async with pool:
                    yield pool, fakes
            else:
                yield pool, fakes
        finally:
            for fake in fakes:
                fake.release.set()
                await fake.stop()


def prompts(count: int) -> list[Prompt]:
    return [made.prompt(i, [1, 2, 3], "0") for i in range(count)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


def groups(pool: RolloutPool, count: int) -> list[asyncio.Task[Any]]:
    return [asyncio.create_task(pool.generate_group(p)) for p in prompts(count)]


def test_a_group_is_one_request_and_becomes_samples() -> None:
    async def run() -> None:
        async with fleet(1) as (pool, (fake,)):
            group = await pool.generate_group(made.prompt(12, [4, 5], "9"))
            (request,) = fake.requests
            assert request["input_ids"] == [4, 5]
            assert request["sampling_params"]["n"] == 4
            assert [s.sample_id for s in group.samples] == [f"g000000012.{i}" for i in range(4)]
            assert group.samples[3].rollout_logprobs.tolist() == [-0.5, -0.25]
            assert group.samples[3].loss_mask.tolist() == [1, 1]
            assert group.samples[3].versions[0].version == "1.1.a"
            greedy = await pool.sample(made.prompt(12, [4, 5], "9"))
            assert len(greedy.samples) == 1
            assert fake.requests[1]["sampling_params"]["temperature"] == 0

    asyncio.run(run())


def test_least_loaded_server_first_and_never_above_the_limit() -> None:
    async def run() -> None:
        async with fleet(2) as (pool, fakes):
            for fake in fakes:
                fake.release.clear()
            tasks = groups(pool, 6)
            await until(lambda: all(fake.busy == 8 for fake in fakes))
            await asyncio.sleep(0.05)
            assert [s.in_flight for s in pool.servers] == [8, 8]  # two of the six groups wait
            for fake in fakes:
                fake.release.set()
            await asyncio.gather(*tasks)
            assert [fake.most_busy for fake in fakes] == [8, 8]
            assert [s.in_flight for s in pool.servers] == [0, 0]

    asyncio.run(run())


def test_a_group_larger_than_the_limit_runs_on_an_idle_server() -> None:
    async def run() -> None:
        async with fleet(1, group_size=16) as (pool, (fake,)):
            await asyncio.gather(*groups(pool, 2))
            assert fake.most_busy == 16

    asyncio.run(run())


def test_a_broken_connection_is_retried_elsewhere_and_the_server_returns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool_module, "PROBE_SECONDS", 0.02)

    async def run() -> None:
        async with fleet(2, probe=True) as (pool, (first, second)):
            await first.stop()
            done = await asyncio.gather(*groups(pool, 3))
            assert len(done) == len(second.requests) == 3
            assert [s.state for s in pool.servers] == [State.DEAD, State.READY]
            await first.start()  # same weights: serves again
            await until(lambda: pool.servers[0].state is State.READY)
            await first.stop()
            await pool.mark_dead(pool.servers[0], "test")
            first.version = "initial"  # a new process: other weights
            await first.start()
            await until(lambda: pool.servers[0].state is State.QUARANTINED)
            await asyncio.gather(*groups(pool, 2))
            assert len(first.requests) == 0
            assert "holds weights 'initial'" in pool.report()

    asyncio.run(run())


def test_attempts_are_bounded_and_all_are_reported() -> None:
    async def refuse(_: dict[str, Any]) -> web.Response:
        return web.Response(status=503, text="shutting down")

    async def run() -> None:
        async with fleet(2, attempts=3) as (pool, fakes):
            for fake in fakes:
                fake.behave = refuse
            with pytest.raises(
                RolloutError,
                match=r"g000000000: all samples at token 0 failed 3 times .*503.*503.*503",
            ):
                await pool.generate_group(prompts(1)[0])
            assert sorted(len(fake.requests) for fake in fakes) == [1, 2]

    asyncio.run(run())


def test_a_bad_request_is_not_retried() -> None:
    async def refuse(_: dict[str, Any]) -> web.Response:
        return web.json_response({"error": {"message": "too long"}}, status=400)

    async def run() -> None:
        async with fleet(2) as (pool, fakes):
            for fake in fakes:
                fake.behave = refuse
            with pytest.raises(ServerError, match="HTTP 400.*too long"):
                await pool.generate_group(prompts(1)[0])
            assert sum(len(fake.requests) for fake in fakes) == 1

    asyncio.run(run())


def test_a_silent_server_is_left_after_the_request_timeout() -> None:
    async def run() -> None:
        async with fleet(2) as (pool, fakes):
            for server in pool.servers:
                server.client._timeout = 0.2
            fakes[0].release.clear()
            await asyncio.gather(*groups(pool, 2))
            assert pool.servers[0].state is State.DEAD
            assert "nothing within 0 s" in pool.servers[0].reason

    asyncio.run(run())


@pytest.mark.parametrize("value", [None, -1e39])
def test_a_non_finite_logprob_is_named(value: float | None) -> None:
    async def run() -> None:
        async with fleet(2) as (pool, fakes):
            for fake in fakes:
                fake.logprob = value
            with pytest.raises(NonFiniteLogprob, match=r"response token 0 .*version 1\.1\.a"):
                await pool.generate_group(prompts(1)[0])

    asyncio.run(run())


def test_closed_gate_and_drain_abort_and_generate_again() -> None:
    async def run() -> None:
        async with fleet(1, attempts=1) as (pool, (fake,)):
            fake.release.clear()
            running = groups(pool, 2)
            await until(lambda: fake.busy == 8)
            await pool.close_dispatch()
            await pool.drain(pool.servers, 5)
            assert pool.servers[0].in_flight == 0
            waiting = groups(pool, 1)
            await asyncio.sleep(0.05)
            assert len(fake.requests) == 2  # nothing goes out while the gate is closed
            assert not any(task.done() for task in waiting)
            await pool.open_dispatch()
            done = await asyncio.gather(*running, *waiting)
            samples = [sample for group in done for sample in group.samples]
            assert {sample.finish_reason for sample in samples} == {"stop"}
            # The last token of an aborted request may be EOS all the same; no response goes on behind it.
            assert {tuple(s.response_tokens) for s in samples} == {(7, 2), (7, 7, 2)}
            assert {request["extra_key"] for request in fake.requests} == {"1.1.a"}

    asyncio.run(run())


def test_an_abort_that_nobody_asked_for_is_a_failed_attempt() -> None:
    async def run() -> None:
        async with fleet(1, attempts=3) as (pool, (fake,)):

            async def abort(body: dict[str, Any]) -> web.Response:
                meta = {"finish_reason": {"type": "abort"}}  # as of a request that was still queued
                outputs = [{"output_ids": [], "meta_info": meta}] * body["sampling_params"]["n"]
                return web.json_response(outputs)

            fake.behave = abort
            with pytest.raises(
                RolloutError, match=r"failed 3 times .*aborted by the server itself"
            ):
                async with asyncio.timeout(5):
                    await pool.generate_group(prompts(1)[0])
            assert len(fake.requests) == 3

    asyncio.run(run())


@pytest.mark.parametrize("answers", [False, True])
def test_a_server_that_ends_nothing_holds_no_drain_up(answers: bool) -> None:
    async def run() -> None:
        async with fleet(2) as (pool, (hung, _)):
            hung.release.clear()
            running = groups(pool, 1)
            await until(lambda: hung.busy == 4)
            if answers:
                hung.release = asyncio.Event()  # what an abort sets, and no sample waits for
            else:
                hung.stall["abort_request"] = asyncio.Event()
            async with asyncio.timeout(2.5 if answers else 1.8):  # else DEAD after half the time
                await pool.drain(pool.servers, 2.0)
            assert [s.state for s in pool.servers] == [State.DEAD, State.READY]
            for task in running:
                task.cancel()

    asyncio.run(run())


def test_a_server_that_was_dead_when_versions_were_retired_does_not_serve_the_old_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool_module, "PROBE_SECONDS", 0.02)

    async def run() -> None:
        async with fleet(2, probe=True) as (pool, (first, _)):
            await first.stop()
            await pool.mark_dead(pool.servers[0], "test")
            await pool.retire_versions("new weights")
            assert [s.state for s in pool.servers] == [State.DEAD, State.QUARANTINED]
            await first.start()  # and still reports version 1.1.a
            await until(lambda: pool.servers[0].state is not State.DEAD)
            assert pool.servers[0].state is State.QUARANTINED

    asyncio.run(run())


@pytest.mark.parametrize(
    "spans",
    [
        [],
        [{"version": "1.1.a", "start": 0, "end": 1}],
        [{"version": "1.1.a", "start": 1, "end": 2}],
        [{"version": "1.1.a", "start": 0, "end": 3}],
        [{"version": "", "start": 0, "end": 2}],
        [{"version": v, "start": s, "end": 2} for v, s in (("1.1.a", 0), ("2.1.b", 1))],
    ],
)
def test_every_token_must_have_a_version(spans: list[dict[str, Any]]) -> None:
    async def run() -> None:
        async with fleet(1, attempts=1) as (pool, (fake,)):
            fake.spans = spans
            with pytest.raises(RolloutError, match="weight_versions .* do not cover 2 tokens"):
                await pool.generate_group(prompts(1)[0])
            fake.spans = [
                {"version": "1.1.a", "start": 0, "end": 0},
                {"version": "2.1.b", "start": 0, "end": 1},
                {"version": "3.1.c", "start": 1, "end": 2},
            ]
            group = await pool.generate_group(prompts(1)[0])
            assert [s.version for s in group.samples[0].versions] == ["2.1.b", "3.1.c"]

    asyncio.run(run())


def test_no_ready_server_is_a_named_wait_with_the_state_of_all() -> None:
    async def run() -> None:
        async with fleet(1, start_timeout=0.2) as (pool, _):
            await pool.quarantine(pool.servers[0], "transfer broke")
            with pytest.raises(WaitExpired, match="to become ready .*quarantined .*transfer broke"):
                await pool.generate_group(prompts(1)[0])
            with pytest.raises(WaitExpired, match="2 of 1 rollout"):
                await pool.wait_alive(2, 0.05)

    asyncio.run(run())


def test_starting_servers_are_quarantined_until_someone_vouches_for_their_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool_module, "PROBE_SECONDS", 0.02)

    async def run() -> None:
        fake = FakeServer()
        await fake.start()
        async with aiohttp.ClientSession() as session:
            client = ServerClient(fake.url, session)
            await fake.stop()
            pool = RolloutPool([client], RolloutConfig(start_timeout=5))
            async with pool:
                await asyncio.sleep(0.05)
                assert pool.servers[0].state is State.STARTING
                await fake.start()
                await pool.wait_alive()
                assert pool.servers[0].state is State.QUARANTINED

                pool.serve_as_started()
                await until(lambda: pool.servers[0].state is State.READY)
                assert pool.servers[0].version == "1.1.a"
        await fake.stop()

    asyncio.run(run())
