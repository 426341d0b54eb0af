"""Weight publishing from plain torch to a real SGLang server on CPU."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
import made
import pytest
from live_server import LiveServer, server_config, tiny_llama
from plain_trainer import PlainTrainer, changed, logprobs

from agpo_megatron.rollout.client import ServerClient
from agpo_megatron.rollout.pool import RolloutPool
from agpo_megatron.rollout.servers import State
from agpo_megatron.samples import WeightVersion
from agpo_megatron.sync.protocol import Publisher, PublishError

log = logging.getLogger(__name__)
PROMPT = made.prompt(3, [1, 5, 9, 33, 12, 60, 7], "")


@dataclass
class Bench:
    pool: RolloutPool
    publisher: Publisher
    trainer: PlainTrainer


@asynccontextmanager
async def bench(server: LiveServer, seed: int = 5) -> AsyncIterator[Bench]:
    config = server_config(group_size=4, max_response_tokens=400).rollout
    trainer = PlainTrainer(tiny_llama(seed), step=1)
    async with aiohttp.ClientSession() as session:
        pool = RolloutPool([ServerClient(server.url, session, timeout=60)], config)
        publisher = Publisher(
            pool,
            trainer,
            trainer.plan,
            server_ranks=1,
            backend="gloo",
            probe_tokens=[7919 * i % 70 for i in range(32)],
            probe_tolerance=1e-3,
            timeout=90,
        )
        async with pool:
            await pool.wait_alive(seconds=60)
            try:
                yield Bench(pool, publisher, trainer)
            finally:
                trainer.close()


def test_servers_compute_what_the_trainer_computes(live_server: LiveServer) -> None:
    async def run() -> None:
        async with bench(live_server) as b:
            (server,) = b.pool.servers
            before = await server.client.score(PROMPT.tokens)
            first = await b.publisher.publish(WeightVersion(1, 1))
            assert server.state is State.READY
            old = logprobs(b.trainer.model, PROMPT.tokens)
            assert max(abs(x - y) for x, y in zip(before, old, strict=True)) > 0.1
            greedy_old = await b.pool.sample(PROMPT)

            changed(b.trainer.model, seed=9)
            b.trainer.step = 2
            second = await b.publisher.publish(WeightVersion(2, 1))
            assert first.version.digest != second.version.digest
            assert len(b.trainer.opened) == 1  # the group is kept
            assert await server.client.weight_version() == str(second.version)
            assert second.probe_diff_max < 1e-4
            assert second.bytes == sum(p.nbytes for p in b.trainer.model.parameters())
            log.warning("publish: %s", {k: round(v, 3) for k, v in second.seconds.items()})

            (sample,) = (await b.pool.sample(PROMPT)).samples
            expected = logprobs(b.trainer.model, [*PROMPT.tokens, *sample.response_tokens])
            assert sample.rollout_logprobs == pytest.approx(
                expected[len(PROMPT.tokens) - 1 :], abs=1e-4
            )
            assert [s.version for s in sample.versions] == [str(second.version)]
            assert sample.response_tokens.tolist() != greedy_old.samples[0].response_tokens.tolist()

            # the same weights give the same identity
            b.trainer.step = 3
            third = await b.publisher.publish(WeightVersion(3, 1))
            assert third.version.digest == second.version.digest

    asyncio.run(run())


def test_running_groups_are_made_again_under_the_new_weights(live_server: LiveServer) -> None:
    async def run() -> None:
        async with bench(live_server) as b:
            (server,) = b.pool.servers
            await b.publisher.publish(WeightVersion(1, 1))
            groups = [asyncio.create_task(b.pool.generate_group(PROMPT)) for _ in range(2)]
            while server.in_flight < 8:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            b.trainer.step = 2
            started = time.monotonic()
            second = await b.publisher.publish(WeightVersion(2, 1))
            log.warning("publish with samples in flight: %.2f s", time.monotonic() - started)
            assert second.seconds["pause"] < 0.5  # nothing runs any more: SGLang need not poll
            for group in await asyncio.gather(*groups):
                for sample in group.samples:
                    assert {s.version for s in sample.versions} == {str(second.version)}

    asyncio.run(run())


def test_one_flipped_element_is_found_and_sent_again(live_server: LiveServer) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"

    async def run() -> None:
        async with bench(live_server) as b:
            b.trainer.spoil = (name, 77)
            with pytest.raises(
                PublishError, match=r"checksums differ from the trainer's: .*layers\.1.*qkv_proj"
            ):
                await b.publisher.publish(WeightVersion(1, 1))
            (server,) = b.pool.servers
            assert server.state is State.QUARANTINED
            # every pass had a group of its own: all servers, the failed one alone, and now the next publish
            b.trainer.spoil = None
            await b.publisher.publish(WeightVersion(1, 1))
            assert server.state is State.READY
            assert len(set(b.trainer.opened)) == len(b.trainer.opened) == 3

    asyncio.run(run())


def test_a_trainer_at_another_step_sends_nothing(live_server: LiveServer) -> None:
    async def run() -> None:
        async with bench(live_server) as b:
            await b.publisher.publish(WeightVersion(1, 1))
            with pytest.raises(PublishError, match="did not send: stage 0: holds step 1"):
                await b.publisher.publish(WeightVersion(2, 1))

    asyncio.run(run())


def test_a_quarantined_server_catches_up_alone(live_server: LiveServer) -> None:
    async def run() -> None:
        async with bench(live_server) as b:
            (server,) = b.pool.servers
            await b.publisher.publish(WeightVersion(1, 1))
            await server.client.set_weight_version("initial", 10)  # as a restarted one reports
            await b.pool.mark_dead(server, "test: connection lost")
            group = await b.pool.generate_group(PROMPT)  # waits for the server's return
            assert server.state is State.READY
            assert all(s.versions[0].version == server.version for s in group.samples)
            assert server.version.startswith("1.1.")

    asyncio.run(run())
