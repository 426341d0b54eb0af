"""The rollout room against a real SGLang server on CPU."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar
from urllib.parse import urlsplit

import aiohttp
import made
import pytest
from live_server import LiveServer, server_config
from plain_trainer import logprobs
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from agpo_megatron.rollout.checksum import ServerChecksums
from agpo_megatron.rollout.client import Generation, Sampling, ServerClient, ServerError
from agpo_megatron.rollout.pool import RolloutPool
from agpo_megatron.rollout.server import refuse_port_in_use
from agpo_megatron.samples import VersionSpan

PROMPT = [1, 5, 9, 33, 12, 60, 7]
T = TypeVar("T")


def with_client(server: LiveServer, use: Callable[[ServerClient], Awaitable[T]]) -> T:
    async def run() -> T:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            return await use(ServerClient(server.url, session, timeout=120))

    return asyncio.run(run())


@pytest.fixture(scope="module")
def reference(live_server: LiveServer) -> LlamaForCausalLM:
    """transformers on the weights that the server holds now: those of its checkpoint, restored if a test published."""

    async def restore(client: ServerClient) -> None:
        body = {"model_path": str(live_server.model)}
        await client._call("/update_weights_from_disk", body)

    with_client(live_server, restore)
    return AutoModelForCausalLM.from_pretrained(live_server.model).float().eval()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_are_those_of_transformers(
    live_server: LiveServer, reference: LlamaForCausalLM, temperature: float
) -> None:
    sampling = Sampling(24, temperature, ignore_eos=True)
    outputs = with_client(live_server, lambda c: c.generate(PROMPT, sampling, n=4))
    assert len({tuple(o.tokens) for o in outputs}) == 4  # four samples, not one four times
    for output in outputs:
        assert output.finish_reason == "length"
        assert len(output.tokens) == 24
        expected = logprobs(reference, [*PROMPT, *output.tokens], temperature)[len(PROMPT) - 1 :]
        assert output.logprobs == pytest.approx(expected, abs=1e-4)
        assert [(s.start, s.end) for s in output.versions] == [(0, 24)]


def test_many_prompts_of_different_lengths_at_once(
    live_server: LiveServer, reference: LlamaForCausalLM
) -> None:
    """Batched attention with ragged prefills and decodes, prefix cache warm and cold."""
    prompts = [[1, *range(3, 3 + n)] for n in (1, 2, 9, 30, 60, 31, 8, 60)]

    async def all_at_once(client: ServerClient) -> list[list[int]]:
        sampling = Sampling(20, 0.0, ignore_eos=True)
        outputs = await asyncio.gather(*(client.generate(p, sampling) for p in prompts))
        return [o[0].tokens.tolist() for o in outputs]

    for prompt, tokens in zip(prompts, with_client(live_server, all_at_once), strict=True):
        expected = logprobs(reference, prompt + tokens)
        scored = with_client(live_server, lambda c, t=prompt + tokens: c.score(t))
        assert scored == pytest.approx(expected, abs=1e-4)
        assert tokens == greedy(reference, prompt, 20)


@pytest.mark.parametrize("start", [1, 4, 9])
def test_score(live_server: LiveServer, reference: LlamaForCausalLM, start: int) -> None:
    tokens = [*PROMPT, 22, 41, 3]
    scored = with_client(live_server, lambda c: c.score(tokens, start))
    assert scored == pytest.approx(logprobs(reference, tokens)[start - 1 :], abs=1e-4)


def test_checksums_follow_from_the_checkpoint(
    live_server: LiveServer, reference: LlamaForCausalLM
) -> None:
    """Fused layers and the padded vocabulary (70 rows, SGLang holds 128) included."""
    expected = ServerChecksums()
    for name, tensor in reference.state_dict().items():
        if name != "lm_head.weight":  # tied
            expected.add(name, tensor)
    (found,) = with_client(live_server, lambda c: c.checksums(30))
    assert expected.result().items() <= found.items()
    assert len(expected.result()) == 2 + 2 * 6


def test_a_request_the_model_cannot_take_names_server_and_cause(live_server: LiveServer) -> None:
    with pytest.raises(ServerError, match=r"/generate: HTTP 400: .*longer than") as caught:
        with_client(live_server, lambda c: c.generate([1] * 600, Sampling(8)))
    assert not caught.value.retryable
    assert live_server.url in str(caught.value)


def test_a_taken_port_is_named(live_server: LiveServer) -> None:
    port = urlsplit(live_server.url).port
    assert port
    with pytest.raises(OSError, match=rf"port {port} .* is in use; .*rollout\.port"):
        refuse_port_in_use("127.0.0.1", port)


async def aborted(client: ServerClient, tokens: list[int]) -> list[Generation]:
    """Four samples of at most 400 tokens, ended in their middle."""
    seconds = 0.1
    while True:
        running = asyncio.create_task(client.generate(tokens, Sampling(400, ignore_eos=True), n=4))
        await asyncio.sleep(seconds)
        await client.abort_all()
        outputs = await running
        if all(len(output.tokens) for output in outputs):
            return outputs
        seconds *= 2  # none has begun


def test_what_an_aborted_request_returns_is_complete_and_continued_by_its_prefix(
    live_server: LiveServer, reference: LlamaForCausalLM
) -> None:
    async def use(client: ServerClient) -> None:
        version = await client.weight_version()
        for begun in await aborted(client, PROMPT):
            assert begun.finish_reason == "abort" and len(begun.tokens) < 400
            assert [*begun.versions] == [VersionSpan(version, 0, len(begun.tokens))]
            prefix = [*PROMPT, *begun.tokens.tolist()]
            (rest,) = await client.generate(prefix, Sampling(20, ignore_eos=True))
            assert [*rest.versions] == [VersionSpan(version, 0, 20)]
            expected = logprobs(reference, [*prefix, *rest.tokens.tolist()])[len(PROMPT) - 1 :]
            found = [*begun.logprobs, *rest.logprobs]
            assert found == pytest.approx(expected, abs=1e-4)

    with_client(live_server, use)


def test_a_request_halted_in_place_goes_on_under_another_version(
    live_server: LiveServer, reference: LlamaForCausalLM
) -> None:
    """Its spans say where the version changed; the cache cannot be flushed while it runs, halted or not."""

    async def use(client: ServerClient) -> None:
        version = await client.weight_version()
        requests = [
            asyncio.create_task(client.generate(PROMPT, Sampling(400, ignore_eos=True)))
            for _ in range(4)
        ]
        try:
            while True:
                (load,) = (await client._call("/v1/loads", None))["loads"]
                if load["num_running_reqs"] == 4:
                    break
                await asyncio.sleep(0.02)
            await client.pause("in_place", 30)
            with pytest.raises(ServerError, match=r"/flush_cache: HTTP 400"):
                await client.flush_cache(30)
            await client.set_weight_version("another", 30)
            await client.continue_generation()
            with pytest.raises(ServerError, match=r"/flush_cache: HTTP 400"):
                await client.flush_cache(30)
            for (output,) in await asyncio.gather(*requests):
                first, second = output.versions
                assert (first.version, second.version) == (version, "another")
                assert 0 == first.start < first.end == second.start < second.end == 400
                expected = logprobs(reference, [*PROMPT, *output.tokens.tolist()])
                assert output.logprobs == pytest.approx(expected[len(PROMPT) - 1 :], abs=1e-4)
        finally:
            await client.continue_generation()
            await client.set_weight_version(version, 30)

    with_client(live_server, use)


def test_pool_generates_groups_and_continues_aborted_ones(live_server: LiveServer) -> None:
    config = server_config(group_size=4, max_response_tokens=400, max_in_flight=8).rollout

    async def use(client: ServerClient) -> None:
        async with RolloutPool([client], config, decode=lambda tokens, _: str(len(tokens))) as pool:
            await pool.wait_alive(seconds=60)
            (server,) = pool.servers
            await pool.mark_ready(server, "1.0.x")
            prompt = made.prompt(7, PROMPT, "42")
            groups = [asyncio.create_task(pool.generate_group(prompt)) for _ in range(3)]
            while not server.in_flight:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            assert server.in_flight == 8  # two groups of four; the third waits
            await pool.close_dispatch()
            await pool.drain([server], 30)
            assert server.in_flight == 0
            assert not any(group.done() for group in groups)
            await pool.open_dispatch()
            for group in await asyncio.gather(*groups):
                assert [s.sample_id for s in group.samples] == [f"g000000007.{i}" for i in range(4)]
                for sample in group.samples:
                    assert sample.finish_reason in ("stop", "length")
                    assert sample.text == str(len(sample.response_tokens))
                    assert sample.truncated == (sample.response_tokens[-1] != 2)
            greedy_group = await pool.sample(prompt)
            again = await pool.sample(prompt)
            assert (
                greedy_group.samples[0].response_tokens.tolist()
                == again.samples[0].response_tokens.tolist()
            )

    with_client(live_server, use)


def greedy(model: LlamaForCausalLM, prompt: list[int], count: int) -> list[int]:
    import torch

    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]
