"""Responses made of many requests equal those of one, whatever happens between and during the requests."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from generating_server import GeneratingServer, decode, prompt, response

from agpo_megatron.config.schema import RolloutConfig
from agpo_megatron.rollout.client import NoDescriptor, ServerClient
from agpo_megatron.rollout.group_rollout import RolloutError
from agpo_megatron.rollout.pool import RolloutPool
from agpo_megatron.rollout.servers import State
from agpo_megatron.samples import Fragment, Group, Prompt, VersionSpan

pytestmark = pytest.mark.processes


@asynccontextmanager
async def fleet(
    count: int, seed: int | None = None, **config: Any
) -> AsyncIterator[tuple[RolloutPool, list[GeneratingServer]]]:
    """A pool with ``count`` READY servers; requests of 4 tokens, groups of 2 samples."""
    fakes = [GeneratingServer() for _ in range(count)]
    for fake in fakes:
        await fake.start()
    settings = {"group_size": 2, "fragment_tokens": 4, "start_timeout": 5.0, **config}
    async with aiohttp.ClientSession() as session:
        clients = [ServerClient(fake.url, session, timeout=5) for fake in fakes]
        pool = RolloutPool(clients, RolloutConfig.model_validate(settings), decode, seed)
        for server in pool.servers:
            await pool.mark_ready(server, "1.1.a")
        try:
            async with asyncio.timeout(20):
                yield pool, fakes
        finally:
            for fake in fakes:
                fake.go_on.set()
                await fake.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


def assert_uninterrupted(group: Group, limit: int = 10**6) -> None:
    for index, sample in enumerate(group.samples):
        tokens = response(group.prompt, index, limit)
        assert sample.index == index
        assert sample.response_tokens.tolist() == tokens
        expected = np.array([-t / 100 for t in tokens], np.float32)
        assert sample.rollout_logprobs.tolist() == expected.tolist()
        assert sample.loss_mask.tolist() == [1] * len(tokens)


def asked(fake: GeneratingServer) -> list[tuple[int, int, int]]:
    """Of each request: samples, tokens of the response it continues, tokens at most."""
    found = []
    for body in fake.requests:
        sampling = body["sampling_params"]
        found.append((sampling["n"], len(body["input_ids"]) - 3, sampling["max_new_tokens"]))
    return found


def spans(group: Group, index: int = 0) -> list[tuple[str, int, int]]:
    return [(s.version, s.start, s.end) for s in group.samples[index].versions]


def test_many_requests_make_the_response_of_one() -> None:
    async def run() -> None:
        kept: list[Fragment] = []
        async with fleet(2) as (pool, fakes):
            problems = [prompt(position, length) for position, length in enumerate((1, 4, 9, 23))]
            groups = await asyncio.gather(
                *(pool.generate_group(p, keep=kept.append) for p in problems)
            )
            for group in groups:
                assert_uninterrupted(group)
                assert spans(group) == [("1.1.a", 0, int(group.prompt.tokens[1]))]
                assert {s.finish_reason for s in group.samples} == {"stop"}
            per_sample = 1 + 1 + 3 + 6
            assert (pool.counts.fragments, pool.counts.resumed) == (2 * per_sample, 0)
            assert pool.counts.tokens_lost == 0
            assert sum(len(fake.requests) for fake in fakes) == 4 + 2 * (2 + 5)
        ends = {(f.position, f.index, f.start): (f.end, f.finish_reason) for f in kept}
        assert len(ends) == len(kept) == 2 * per_sample
        assert [ends[2, 1, start] for start in (0, 4, 8)] == [(4, ""), (8, ""), (9, "stop")]

    asyncio.run(run())


def test_the_group_shares_its_first_request_only() -> None:
    async def run() -> None:
        async with fleet(1, max_response_tokens=10) as (pool, (fake,)):
            group = await pool.generate_group(prompt(0, 50))
            assert_uninterrupted(group, limit=10)
            assert {s.finish_reason for s in group.samples} == {"length"}
            assert asked(fake)[0] == (2, 0, 4)
            assert sorted(asked(fake)[1:]) == [(1, 4, 4), (1, 4, 4), (1, 8, 2), (1, 8, 2)]

    asyncio.run(run())


def test_each_sample_keeps_a_seed_of_its_own() -> None:
    async def seeds(run: int | None, position: int) -> list[list[int]]:
        """Of each sample of a group, in the order of its requests."""
        found: dict[tuple[int, ...], list[int]] = {}
        async with fleet(1, seed=run, group_size=3) as (pool, (fake,)):
            group = await pool.generate_group(prompt(position, 12))
            assert_uninterrupted(group)
            first, *rest = fake.requests
            if run is None:
                assert first["sampling_params"]["n"] == 3
                assert not [r for r in fake.requests if "sampling_seed" in r["sampling_params"]]
                return []
            for sample, params in zip(group.samples, first["sampling_params"], strict=True):
                found[tuple(sample.response_tokens[:4])] = [params["sampling_seed"]]
            for body in rest:
                ((ids,), (params,)) = body["input_ids"], body["sampling_params"]
                found[tuple(ids[3:7])].append(params["sampling_seed"])
        return list(found.values())

    async def run() -> None:
        of_first, again, other = [await seeds(*which) for which in ((1, 0), (1, 0), (2, 0))]
        of_next = await seeds(1, 1)
        assert [len(of_one) for of_one in of_first] == [3, 3, 3]
        assert of_first == again
        every = [of_one for group in (of_first, other, of_next) for of_one in group]
        assert all(len(set(of_one)) == 1 for of_one in every)
        assert len({of_one[0] for of_one in every}) == 9
        assert await seeds(None, 0) == []

    asyncio.run(run())


@pytest.mark.parametrize(("length", "reason"), [(8, "stop"), (12, "stop"), (13, "length")])
def test_only_the_limit_truncates(length: int, reason: str) -> None:
    async def run() -> None:
        async with fleet(1, max_response_tokens=12) as (pool, _):
            group = await pool.generate_group(prompt(0, length))
            assert_uninterrupted(group, limit=12)
            assert {s.finish_reason for s in group.samples} == {reason}

    asyncio.run(run())


def test_each_token_has_the_version_it_was_generated_under() -> None:
    async def run() -> None:
        async with fleet(1) as (pool, (fake,)):

            async def update(body: dict[str, Any]) -> None:
                length = len(body["input_ids"]) - 3
                fake.version = "2.1.b" if 8 <= length < 16 else "1.1.a"

            fake.behave = update
            fake.halt(18)
            task = asyncio.create_task(pool.generate_group(prompt(0, 22)))
            await until(lambda: fake.halted == 2)
            fake.version = "3.1.c"  # in the middle of a request
            fake.go_on.set()
            group = await task
            assert_uninterrupted(group)
            expected = [("1.1.a", 0, 8), ("2.1.b", 8, 16), ("1.1.a", 16, 18)]
            for index in (0, 1):
                found = spans(group, index)
                assert found[:3] == expected
                assert found[3] == ("3.1.c", 18, 20)
                assert found[3:] == [("3.1.c", 18, 20), ("1.1.a", 20, 22)]

    asyncio.run(run())


def test_a_dead_server_costs_the_requests_under_way_only() -> None:
    async def run() -> None:
        async with fleet(2) as (pool, (first, second)):
            second.version = "2.1.b"
            first.halt(6)
            task = asyncio.create_task(pool.generate_group(prompt(0, 14)))
            await until(lambda: first.halted == 2)
            await first.stop()
            group = await task
            assert_uninterrupted(group)
            assert [s.state for s in pool.servers] == [State.DEAD, State.READY]
            assert spans(group) == spans(group, 1) == [("1.1.a", 0, 4), ("2.1.b", 4, 14)]
            assert sorted(asked(second)) == [(1, at, 4) for at in (4, 4, 8, 8, 12, 12)]
            assert pool.counts.tokens_lost == 2 * 4
            assert (pool.counts.fragments, pool.counts.resumed) == (2 + 6, 2)
            assert [s.in_flight for s in pool.servers] == [0, 0]

    asyncio.run(run())


def test_an_abort_keeps_what_there_is_and_continues_it() -> None:
    async def run() -> None:
        async with fleet(1, fragment_tokens=8, attempts=1) as (pool, (fake,)):
            kept: list[Fragment] = []
            fake.halt(3)
            task = asyncio.create_task(pool.generate_group(prompt(0, 14), keep=kept.append))
            await until(lambda: fake.halted == 2)
            await pool.close_dispatch()
            await pool.drain(pool.servers, 5)
            assert pool.servers[0].in_flight == 0
            # Of three tokens each: nobody has looked whether the last one ends the response.
            assert [(f.index, f.start, f.end, f.finish_reason) for f in kept] == [
                (0, 0, 2, ""),
                (1, 0, 2, ""),
            ]
            fake.version = "2.1.b"
            await pool.open_dispatch()
            group = await task
            assert_uninterrupted(group)
            assert spans(group) == [("1.1.a", 0, 2), ("2.1.b", 2, 14)]
            assert sorted(asked(fake)[1:]) == [(1, at, 8) for at in (2, 2, 10, 10)]
            assert pool.counts.tokens_lost == 2, "the last token of each"
            assert (pool.counts.fragments, pool.counts.resumed) == (6, 2)

    asyncio.run(run())


def test_an_abort_before_the_first_token_asks_for_the_group_again() -> None:
    async def run() -> None:
        async with fleet(1, attempts=1) as (pool, (fake,)):
            fake.halt(0)
            task = asyncio.create_task(pool.generate_group(prompt(0, 4)))
            await until(lambda: fake.halted == 2)
            await pool.drain(pool.servers, 5)
            assert_uninterrupted(await task)
            assert asked(fake) == [(2, 0, 4), (2, 0, 4)]
            assert (pool.counts.fragments, pool.counts.resumed) == (2, 2)

    asyncio.run(run())


@pytest.mark.parametrize("every", [4, 1])
@pytest.mark.parametrize(("place", "end"), [(2, 4), (3, 5), (4, 6), (7, 9), (2, 5), (3, 7), (1, 6)])
def test_a_stop_text_across_the_border_of_two_requests_ends_the_response(
    place: int, end: int, every: int
) -> None:
    problem = prompt(0, 30)
    texts = [decode(np.array(response(problem, index), np.int32), True) for index in (0, 1)]
    wanted = texts[0][place:end]
    assert texts[0].index(wanted) == place and wanted not in texts[1]

    async def run() -> None:
        async with fleet(
            1, stop=["never", wanted], max_response_tokens=30, fragment_tokens=every
        ) as (pool, (fake,)):
            group = await pool.generate_group(problem)
            sample = group.samples[0]
            assert sample.finish_reason == "stop"
            assert sample.response_tokens.tolist() == response(problem, 0)[:end]
            assert len(sample.rollout_logprobs) == end
            assert spans(group) == [("1.1.a", 0, end)]
            unseen = place // every != (end - 1) // every  # by the server, which goes on
            assert pool.counts.tokens_lost == (-end % every if unseen else 0)
            assert group.samples[1].response_tokens.tolist() == response(problem, 1)
            fragments = -(-end // every)
            first = response(problem, 0)[0]
            mine = [body for body in fake.requests if body["input_ids"][3:4] == [first]]
            assert len(mine) == fragments - 1

    asyncio.run(run())


def test_progress_gives_all_attempts_back() -> None:
    async def run() -> None:
        async with fleet(1, attempts=2) as (pool, (fake,)):
            met: set[tuple[int, ...]] = set()

            async def fail_once(body: dict[str, Any]) -> web.Response | None:
                ids = tuple(body["input_ids"])
                if ids in met:
                    return None
                met.add(ids)
                return web.Response(status=503, text="busy")

            fake.behave = fail_once
            group = await pool.generate_group(prompt(0, 20))
            assert_uninterrupted(group)
            assert len(met) == 1 + 2 * 4  # a failure before each fragment, more than attempts
            assert pool.counts.tokens_lost == 4 * (2 + 2 * 4)
            assert pool.servers[0].state is State.READY

    asyncio.run(run())


def test_attempts_without_progress_end_the_group_and_name_the_place() -> None:
    async def run() -> None:
        async with fleet(2, attempts=3) as (pool, fakes):

            async def refuse_at_8(body: dict[str, Any]) -> web.Response | None:
                if len(body["input_ids"]) - 3 < 8:
                    return None
                return web.Response(status=500, text="out of memory")

            for fake in fakes:
                fake.behave = refuse_at_8
            with pytest.raises(
                RolloutError,
                match=r"g000000000: sample [01] at token 8 failed 3 times without progress "
                r"\(rollout.attempts=3\): .*HTTP 500.*HTTP 500.*HTTP 500",
            ):
                await pool.generate_group(prompt(0, 20))
            at_8 = [len([r for r in asked(fake) if r[1] == 8]) for fake in fakes]
            assert min(at_8) >= 1, "the other server was tried"
            assert [s.in_flight for s in pool.servers] == [0, 0]

    asyncio.run(run())


def test_an_answer_without_tokens_is_a_failed_attempt() -> None:
    async def run() -> None:
        async with fleet(1, attempts=2) as (pool, (fake,)):

            async def nothing(body: dict[str, Any]) -> web.Response:
                meta = {"finish_reason": {"type": "stop"}, "weight_version": "1.1.a"}
                output = {"output_ids": [], "meta_info": {**meta, "output_token_logprobs": []}}
                return web.json_response([output] * 2)

            fake.behave = nothing
            with pytest.raises(RolloutError, match="failed 2 times .*no tokens"):
                await pool.generate_group(prompt(0, 20))

    asyncio.run(run())


def fragment(of: Prompt, index: int, start: int, end: int, reason: str = "") -> Fragment:
    tokens = np.array(response(of, index)[start:end], np.int32)
    logprobs = (-tokens / 100).astype(np.float32)
    return Fragment(
        of.position, index, start, tokens, logprobs, (VersionSpan("0.1.z", start, end),), reason
    )


def test_known_fragments_are_continued_and_gaps_and_duplicates_ignored() -> None:
    problem = prompt(0, 14)
    known = [
        fragment(problem, 0, 8, 12),  # out of order
        fragment(problem, 0, 0, 4),
        fragment(problem, 0, 4, 8),
        fragment(problem, 0, 4, 8),  # twice
        fragment(problem, 1, 0, 4),
        fragment(problem, 1, 8, 12),  # after a gap
        fragment(problem, 2, 0, 14, "stop"),
        fragment(problem, 3, 4, 8),  # without a beginning
    ]

    async def run() -> None:
        async with fleet(1, group_size=4) as (pool, (fake,)):
            group = await pool.generate_group(problem, known)
            for index in (0, 1, 2):
                sample = group.samples[index]
                assert sample.response_tokens.tolist() == response(problem, index)
            assert spans(group, 0) == [("0.1.z", 0, 12), ("1.1.a", 12, 14)]
            assert spans(group, 1) == [("0.1.z", 0, 4), ("1.1.a", 4, 14)]
            assert spans(group, 2) == [("0.1.z", 0, 14)]
            assert spans(group, 3) == [("1.1.a", 0, 14)]
            assert {s.finish_reason for s in group.samples} == {"stop"}
            assert sorted(at for _, at, _ in asked(fake)) == [0, 4, 4, 8, 8, 12, 12, 12]
            assert {n for n, _, _ in asked(fake)} == {1}
            assert pool.counts.resumed == 2

    asyncio.run(run())


def test_known_fragments_beyond_the_settings_of_this_attempt_are_left_out() -> None:
    """A resumed run may have smaller groups and shorter responses."""
    problem = prompt(0, 14)
    known = [
        *(fragment(problem, 0, at, at + 4) for at in (0, 4)),  # at the limit, and not finished
        *(fragment(problem, 1, *span) for span in ((0, 4), (4, 7))),
        fragment(problem, 2, 0, 8, "length"),
        fragment(problem, 3, 0, 4),
    ]

    async def run() -> None:
        async with fleet(1, group_size=3, max_response_tokens=8) as (pool, (fake,)):
            group = await pool.generate_group(problem, known)
            assert_uninterrupted(group, limit=8)
            assert {s.finish_reason for s in group.samples} == {"length"}
            assert sorted(asked(fake)) == [(1, 4, 4), (1, 7, 1)]

    asyncio.run(run())


def test_what_is_complete_is_not_generated_again() -> None:
    problem = prompt(0, 6)
    known = [fragment(problem, index, 0, 6, "stop") for index in (0, 1)]

    async def run() -> None:
        async with fleet(1) as (pool, (fake,)):
            assert_uninterrupted(await pool.generate_group(problem, known))
            assert fake.requests == []

    asyncio.run(run())


def test_what_a_server_returns_after_it_left_a_transfer_is_thrown_away() -> None:
    async def run() -> None:
        async with fleet(2, attempts=1) as (pool, (first, second)):
            first.halt(6)
            task = asyncio.create_task(pool.generate_group(prompt(0, 10)))
            await until(lambda: first.halted == 2)
            first.version = "half.written"
            pool.servers[0].torn += 1
            await pool.quarantine(pool.servers[0], "left a transfer")
            first.go_on.set()
            group = await task
            assert_uninterrupted(group)
            assert len(first.answers) == 4, "it did answer"
            assert spans(group) == spans(group, 1) == [("1.1.a", 0, 10)]
            assert sorted(asked(second)) == [(1, at, 4) for at in (4, 4, 8, 8)]
            assert (pool.counts.tokens_lost, pool.counts.resumed) == (8, 2)

    asyncio.run(run())


@asynccontextmanager
async def no_descriptor_left() -> AsyncIterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_without_a_file_descriptor_no_server_is_to_blame(host: str) -> None:
    async def run() -> None:
        async with fleet(2) as (pool, fakes):
            for fake, server in zip(fakes, pool.servers, strict=True):
                server.client.url = f"http://{host}:{fake.port}"
            async with no_descriptor_left():
                with pytest.raises(NoDescriptor, match="no file descriptor left .*max_in_flight"):
                    await pool.generate_group(prompt(0, 10))
            assert [s.state for s in pool.servers] == [State.READY, State.READY]
            assert [s.in_flight for s in pool.servers] == [0, 0]
            assert_uninterrupted(await pool.generate_group(prompt(0, 10)))

    asyncio.run(run())


def test_an_abort_of_a_request_that_a_drain_overtook_is_no_failure() -> None:
    """Its room was given out before the drain, and it went out afterwards."""

    async def run() -> None:
        async with fleet(1, attempts=1) as (pool, (fake,)):

            async def halts_when_it_arrives(body: dict[str, Any]) -> None:
                if len(fake.requests) == 1:
                    await until(lambda: fake.aborts == 1)  # the next abort is its own
                    fake.halt(at=0)

            fake.behave = halts_when_it_arrives
            task = asyncio.create_task(pool.generate_group(prompt(0, 9)))
            while not pool.servers[0].in_flight:
                await asyncio.sleep(0)
            assert not fake.requests
            await pool.close_dispatch()
            await pool.drain(pool.servers, 5)
            assert asked(fake) == [(2, 0, 4)] and fake.answers == [[], []]
            await pool.open_dispatch()
            assert_uninterrupted(await task)

    asyncio.run(run())
