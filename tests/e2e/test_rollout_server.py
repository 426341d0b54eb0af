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


# What generation beside training rests on: requests that a publish, a stop or a failure cuts short.

LONG = Sampling(400, ignore_eos=True)


async def while_running(
    client: ServerClient, act: Callable[[asyncio.Task[list[Generation]]], Awaitable[None]]
) -> list[Generation]:
    """Call ``act`` while a request of four samples runs: neither before their first tokens nor after their last."""
    seconds = 0.1
    while True:
        request = asyncio.create_task(client.generate(PROMPT, LONG, 4))
        await asyncio.sleep(seconds)
        if request.done():
            seconds /= 2
            continue
        await act(request)
        outputs = await request
        if all(len(output.tokens) for output in outputs):
            return outputs
        seconds *= 2


def expected_logprobs(model: LlamaForCausalLM, before: list[int], tokens: list[int]) -> list[float]:
    return logprobs(model, before + tokens)[len(before) - 1 :]


def test_aborted_requests_return_what_they_have_and_are_continued_from_the_cache(
    live_server: LiveServer, reference: LlamaForCausalLM
) -> None:
    async def use(client: ServerClient) -> None:
        version = await client.weight_version()
        for output in await while_running(client, lambda _: client.abort_all()):
            assert output.finish_reason == "abort"
            tokens = output.tokens.tolist()
            assert 0 < len(tokens) < 400
            expected = expected_logprobs(reference, PROMPT, tokens)
            assert output.logprobs == pytest.approx(expected, abs=1e-4)
            assert output.versions == (VersionSpan(version, 0, len(tokens)),)

            prefix = PROMPT + tokens
            body = {
                "input_ids": prefix,
                "sampling_params": {"max_new_tokens": 20, "ignore_eos": True},
                "return_logprob": True,
            }
            answer = await client._call("/generate", body)
            continued = answer["output_ids"]
            found = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
            assert found == pytest.approx(expected_logprobs(reference, prefix, continued), abs=1e-4)
            # The last sampled token has no keys and values yet, and one token at least is computed anew.
            assert answer["meta_info"]["cached_tokens"] >= len(prefix) - 2

    with_client(live_server, use)


def test_requests_paused_in_place_name_the_version_of_every_token(live_server: LiveServer) -> None:
    async def use(client: ServerClient) -> None:
        before = await client.weight_version()

        async def change(_: object) -> None:
            await client.pause("in_place", 30)
            with pytest.raises(ServerError, match="/flush_cache: HTTP 400"):
                await client.flush_cache(30)
            await client.set_weight_version("later", 30)
            await client.continue_generation()

        try:
            for output in await while_running(client, change):
                assert output.finish_reason == "length" and len(output.tokens) == 400
                border = output.versions[0].end
                assert 0 < border < 400
                assert output.versions == (
                    VersionSpan(before, 0, border),
                    VersionSpan("later", border, 400),
                )
        finally:
            await client.set_weight_version(before, 30)

    with_client(live_server, use)


def test_the_cache_is_not_flushed_while_requests_run(live_server: LiveServer) -> None:
    async def use(client: ServerClient) -> None:
        async def refused(_: object) -> None:
            with pytest.raises(ServerError, match="/flush_cache: HTTP 400"):
                await client.flush_cache(30)
            await client.abort_all()

        await while_running(client, refused)
        await client.flush_cache(30)

    with_client(live_server, use)


def test_requests_paused_in_place_return_nothing_before_they_go_on(live_server: LiveServer) -> None:
    """Not even when they are aborted: a drain continues such a server first."""

    async def use(client: ServerClient) -> None:
        async def abort_paused(request: asyncio.Task[list[Generation]]) -> None:
            await client.pause("in_place", 30)
            late = asyncio.create_task(client.generate(PROMPT, Sampling(4, ignore_eos=True)))
            await client.abort_all()
            done, _ = await asyncio.wait([request, late], timeout=1.5)
            assert not done, "returned while the server was paused"
            await client.continue_generation()
            await client.abort_all()
            await late

        for output in await while_running(client, abort_paused):
            assert output.finish_reason == "abort"
            assert output.logprobs.shape == output.tokens.shape

    with_client(live_server, use)


def test_pool_generates_groups_and_goes_on_with_aborted_ones(live_server: LiveServer) -> None:
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
