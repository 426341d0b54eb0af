"""Deterministic inference: a sample depends on weights, prompt and seed, on nothing that shares its batch."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import aiohttp
import made
import pytest
from live_server import LiveServer, serve, server_config, tiny_llama, write_tokenizer

from agpo_megatron.rollout.client import ServerClient
from agpo_megatron.rollout.pool import RolloutPool
from agpo_megatron.rollout.server import sampling_seed
from agpo_megatron.samples import Group, Prompt

pytestmark = pytest.mark.full
CONFIG = server_config(
    server_args={"enable_deterministic_inference": True}, group_size=4, max_in_flight=32
)
PROMPTS = [made.prompt(i, [3 + token % 60 for token in range(3 + 17 * i)], "42") for i in range(6)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("seeded")
    tiny_llama(seed=1).save_pretrained(folder / "model")
    write_tokenizer(folder / "model")
    yield from serve(folder / "model", folder / "server.log", CONFIG)


def generated(server: LiveServer, *batches: list[Prompt], fragment: int = 2048) -> list[Group]:
    """The groups of ``batches``, all prompts of a batch at once."""

    async def all_of() -> list[Group]:
        config = CONFIG.rollout.model_copy(update={"fragment_tokens": fragment})
        async with aiohttp.ClientSession() as session:
            client = ServerClient(server.url, session)
            async with RolloutPool([client], config, seed=sampling_seed(CONFIG)) as pool:
                pool.serve_as_started()
                groups: list[Group] = []
                for prompts in batches:
                    groups += await asyncio.gather(*map(pool.generate_group, prompts))
                return groups

    return asyncio.run(all_of())


def as_bytes(groups: list[Group]) -> dict[int, list[tuple[bytes, bytes]]]:
    return {
        group.prompt.position: [
            (s.response_tokens.tobytes(), s.rollout_logprobs.tobytes()) for s in group.samples
        ]
        for group in groups
    }


def test_a_sample_is_the_same_alone_and_in_any_company(server: LiveServer) -> None:
    together = as_bytes(generated(server, PROMPTS))
    alone = as_bytes(generated(server, *([p] for p in PROMPTS)))
    in_parts = as_bytes(generated(server, PROMPTS[4:], PROMPTS[:3], PROMPTS[3:4]))
    assert together == alone == in_parts
    texts = [tokens for samples in together.values() for tokens, _ in samples]
    assert len(set(texts)) == len(texts), "each sample has a seed of its own"


def test_fragments_draw_what_one_request_draws(server: LiveServer) -> None:
    whole, cut = (as_bytes(generated(server, PROMPTS, fragment=f)) for f in (2048, 7))
    for position, samples in whole.items():
        assert [tokens for tokens, _ in samples] == [tokens for tokens, _ in cut[position]]
