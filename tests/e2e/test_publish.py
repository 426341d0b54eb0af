"""Weight publishing from plain torch to a real SGLang server on CPU."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
import made
import numpy as np
import pytest
import torch
from live_server import LiveServer, server_config, tiny_llama
from plain_trainer import PlainTrainer, changed, logprobs
from transformers import LlamaForCausalLM

from agpo_megatron.rollout.client import ServerClient
from agpo_megatron.rollout.pool import RolloutPool
from agpo_megatron.rollout.servers import State
from agpo_megatron.samples import Floats, Fragment, Sample, WeightVersion
from agpo_megatron.sync.protocol import Publisher, PublishError

log = logging.getLogger(__name__)
Models = dict[str, LlamaForCausalLM]
PROMPT = made.prompt(3, [1, 5, 9, 33, 12, 60, 7], "")


@dataclass
class Bench:
    pool: RolloutPool
    publisher: Publisher
    trainer: PlainTrainer


@asynccontextmanager
async def bench(
    server: LiveServer, seed: int = 5, fragment_tokens: int = 2048, keep: bool = False
) -> AsyncIterator[Bench]:
    config = server_config(
        group_size=4, max_response_tokens=400, fragment_tokens=fragment_tokens
    ).rollout
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
            keep_running=keep,
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


async def published_meanwhile(b: Bench, fragments: list[Fragment]) -> tuple[list[Sample], Models]:
    """Generate two groups, and publish other weights once every sample has its first fragment. Returns the samples, and
    the models by version."""
    with torch.no_grad():
        b.trainer.model.model.embed_tokens.weight[2] = 0  # EOS, which is unlikely then
    old = await b.publisher.publish(WeightVersion(1, 1))
    groups = [
        asyncio.create_task(b.pool.generate_group(PROMPT, keep=fragments.append)) for _ in range(2)
    ]
    while len(fragments) < 8:
        await asyncio.sleep(0.005)
    models = {str(old.version): copy.deepcopy(b.trainer.model)}
    changed(b.trainer.model, seed=9)
    b.trainer.step = 2
    new = await b.publisher.publish(WeightVersion(2, 1))
    models[str(new.version)] = b.trainer.model
    log.warning("publish with samples in flight: %s", new.seconds)
    samples = [sample for group in await asyncio.gather(*groups) for sample in group.samples]
    for sample in samples:
        count = len(sample.response_tokens)
        assert [span.start for span in sample.versions] + [count] == [
            0,
            *(span.end for span in sample.versions),
        ]
        versions = [span.version for span in sample.versions]
        assert versions == list(models)[: len(versions)]  # the old, and then maybe the new
        assert len(sample.rollout_logprobs) == count
        assert sample.finish_reason == ("stop" if sample.response_tokens[-1] == 2 else "length")
        assert count == 400 or sample.finish_reason == "stop"
    assert any(len(sample.versions) == 2 for sample in samples)
    return samples, models


def differences(sample: Sample, model: LlamaForCausalLM) -> Floats:
    """How far the log-prob of each response token is from transformers', given all tokens before it."""
    tokens = [*PROMPT.tokens.tolist(), *sample.response_tokens.tolist()]
    expected = np.array(logprobs(model, tokens)[len(PROMPT.tokens) - 1 :], np.float32)
    return np.abs(sample.rollout_logprobs - expected)


def test_running_samples_go_on_under_the_new_weights(live_server: LiveServer) -> None:
    """The tokens that an aborted request returned are kept, and the rest is generated on a cache of the new weights."""

    async def run() -> None:
        fragments: list[Fragment] = []
        async with bench(live_server, fragment_tokens=50) as b:
            samples, models = await published_meanwhile(b, fragments)
            for sample in samples:
                for span in sample.versions:
                    part = slice(span.start, span.end)
                    assert differences(sample, models[span.version])[part].max() < 1e-4
            assert any(len(f.tokens) % 50 and not f.finish_reason for f in fragments), "cut short"

    asyncio.run(run())


def test_running_requests_may_be_kept_over_a_publish(live_server: LiveServer) -> None:
    """Requests are halted, and go on with the new weights on the old cache: their spans say where."""

    async def run() -> None:
        fragments: list[Fragment] = []
        async with bench(live_server, fragment_tokens=50, keep=True) as b:
            samples, models = await published_meanwhile(b, fragments)
            before = next(iter(models.values()))
            for sample in samples:
                first, *more = sample.versions
                found = differences(sample, before)
                assert found[: first.end].max() < 1e-4
                for span in more:  # one token may be of a forward pass that ran when it was halted
                    after = found[span.start + 1 :]
                    assert not len(after) or after[:3].max() > 1e-3
            assert any(len(f.versions) == 2 for f in fragments), "in the middle of a request"
            assert not any(len(f.tokens) % 50 and not f.finish_reason for f in fragments)

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
