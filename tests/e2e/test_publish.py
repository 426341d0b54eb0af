"""Weight publishing from plain torch to a real SGLang server on CPU."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import made
import pytest
import torch
from live_server import LiveServer, serve, server_config, tiny_llama, write_tokenizer
from plain_trainer import PlainTrainer, changed, logprobs
from transformers import LlamaForCausalLM

from agpo_megatron.rollout.client import ServerClient
from agpo_megatron.rollout.excerpts import readable_rows
from agpo_megatron.rollout.pool import RolloutPool
from agpo_megatron.rollout.servers import State
from agpo_megatron.samples import Sample, WeightVersion
from agpo_megatron.sync.proof import Proof
from agpo_megatron.sync.protocol import Publisher, PublishError

log = logging.getLogger(__name__)
PROMPT = made.prompt(3, [1, 5, 9, 33, 12, 60, 7], "")


@dataclass
class Bench:
    pool: RolloutPool
    publisher: Publisher
    trainer: PlainTrainer


@asynccontextmanager
async def bench(
    server: LiveServer,
    seed: int = 5,
    ranks: int = 1,
    hashes: bool = True,
    keep_running: bool = False,
) -> AsyncIterator[Bench]:
    """``hashes``: the trainer reproduces the server's; else excerpts are read back, and, as in bf16, log-probs may
    differ by 2 nats."""
    config = server_config(group_size=8, max_response_tokens=400, fragment_tokens=16).rollout
    trainer = PlainTrainer(tiny_llama(seed), step=1, hashes=hashes)
    async with aiohttp.ClientSession() as session:
        pool = RolloutPool([ServerClient(server.url, session, timeout=60)], config)
        publisher = Publisher(
            pool,
            trainer,
            trainer.plan,
            server_ranks=ranks,
            backend="gloo",
            probe_tokens=[7919 * i % 70 for i in range(32)],
            probe_tolerance=1e-3 if hashes else 2.0,
            timeout=90,
            keep_running=keep_running,
            readable={} if hashes else readable(trainer, ranks),
        )
        async with pool:
            await pool.wait_alive(seconds=60)
            try:
                yield Bench(pool, publisher, trainer)
            finally:
                trainer.close()


def readable(trainer: PlainTrainer, ranks: int) -> dict[str, int]:
    shapes = {spec.name: spec.shape for stage in trainer.plan for b in stage for spec in b}
    config = trainer.model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    return readable_rows(config, shapes, ranks)


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


async def published_while_generating(b: Bench) -> tuple[list[Sample], list[str]]:
    """Groups of long responses with a publish of changed weights in their middle; and the names of both versions."""
    first = await b.publisher.publish(WeightVersion(1, 1))
    done: dict[tuple[int, int], int] = {}
    prompts = [made.prompt(position, [*PROMPT.tokens, position], "") for position in (3, 4)]
    groups = [
        asyncio.create_task(
            b.pool.generate_group(
                prompt, keep=lambda f: done.update({(f.position, f.index): f.end})
            )
        )
        for prompt in prompts
    ]
    while len(done) < 2 * 8 or max(done.values()) < 48:
        await asyncio.sleep(0.005)
    changed(b.trainer.model, seed=9)
    b.trainer.step = 2
    second = await b.publisher.publish(WeightVersion(2, 1))
    log.warning(
        "publish, samples in flight: %s", {k: round(v, 3) for k, v in second.seconds.items()}
    )
    samples = [sample for group in await asyncio.gather(*groups) for sample in group.samples]
    names = [str(first.version), str(second.version)]
    assert any([span.version for span in sample.versions] == names for sample in samples)
    for sample in samples:
        length = len(sample.response_tokens)
        edges = [0, *(span.end for span in sample.versions)]
        assert [span.start for span in sample.versions] == edges[:-1] and edges[-1] == length
        assert [s.version for s in sample.versions] in (names, names[:1], names[1:])
        assert len(sample.rollout_logprobs) == length
        match sample.finish_reason:
            case "stop":
                assert sample.response_tokens.tolist().index(2) == length - 1
            case reason:
                assert reason == "length" and length == 400
    return samples, names


def test_responses_go_on_under_new_weights_on_a_cache_computed_anew(
    live_server: LiveServer,
) -> None:
    async def run() -> None:
        async with bench(live_server) as b:
            old = copy.deepcopy(b.trainer.model)
            samples, names = await published_while_generating(b)
            models = dict(zip(names, (old, b.trainer.model), strict=True))
            for sample in samples:
                start = len(sample.prompt_tokens) - 1
                tokens = [*sample.prompt_tokens, *sample.response_tokens]
                for span in sample.versions:
                    expected = logprobs(models[span.version], tokens)[start:]
                    found = sample.rollout_logprobs[span.start : span.end]
                    assert found == pytest.approx(expected[span.start : span.end], abs=1e-4)

    asyncio.run(run())


def test_responses_go_on_under_new_weights_on_the_old_cache(live_server: LiveServer) -> None:
    """``keep``: exact spans, which only a cache computed with the weights of before shows."""

    async def run() -> None:
        async with bench(live_server, keep_running=True) as b:
            old = copy.deepcopy(b.trainer.model)
            samples, names = await published_while_generating(b)
            for sample in samples:
                of_old = sum(s.end - s.start for s in sample.versions if s.version == names[0])
                # The token that was being computed at the pause counts as one of the new weights.
                found = [
                    logprobs_across(
                        old,
                        b.trainer.model,
                        [*sample.prompt_tokens, *sample.response_tokens],
                        len(sample.prompt_tokens) + of_old + under_way,
                    )[len(sample.prompt_tokens) - 1 :]
                    for under_way in (0, 1)
                ]
                assert any(
                    sample.rollout_logprobs == pytest.approx(expected, abs=1e-4)
                    for expected in found
                )
            # What begins later has nothing of the old weights, though its prompt was in the cache.
            for sample in (await b.pool.generate_group(made.prompt(9, PROMPT.tokens, ""))).samples:
                expected = logprobs(b.trainer.model, [*PROMPT.tokens, *sample.response_tokens])
                assert sample.rollout_logprobs == pytest.approx(
                    expected[len(PROMPT.tokens) - 1 :], abs=1e-4
                )

    asyncio.run(run())


@torch.no_grad()
def logprobs_across(
    old: LlamaForCausalLM, new: LlamaForCausalLM, tokens: list[int], border: int
) -> list[float]:
    """Log-probs of ``tokens[1:]``, those before ``border`` by ``old``, the others by ``new`` on the keys and values of
    ``old``: the last of the tokens before the border is the first that ``new`` reads."""
    ids = torch.tensor([tokens])
    before = old(ids[:, : border - 1], use_cache=True)
    logits = [before.logits]
    if border < len(tokens):
        logits.append(new(ids[:, border - 1 :], past_key_values=before.past_key_values).logits)
    found = torch.cat(logits, 1)[0, : len(tokens) - 1].log_softmax(-1)
    return found.gather(1, ids[0, 1:, None])[:, 0].tolist()


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


async def a_server_that_ignores_an_update_is_refused(server: LiveServer, ranks: int) -> None:
    """Without the trainer's hashes; and every excerpt that is asked for is exact."""
    async with bench(server, ranks=ranks, hashes=False) as b:
        (role,) = b.pool.servers
        await b.publisher.publish(WeightVersion(1, 1))
        listed, tensors = readable(b.trainer, ranks), b.trainer.model.state_dict()
        assert len(listed) == 20  # all
        for name, rows in listed.items():
            answer = torch.tensor(await role.client.leading_rows(name, rows, 30))
            assert torch.equal(answer, tensors[name][:rows]), name
        changed(b.trainer.model, seed=9)
        b.trainer.step, b.trainer.stale = 2, True
        with pytest.raises(PublishError, match="ignored the update: rank 0"):
            await b.publisher.publish(WeightVersion(2, 1))
        # Where no hashes are known of before, the excerpts tell.
        unknowing = Proof(ranks, listed)
        b.publisher._proof = unknowing
        with pytest.raises(PublishError, match="read back is not what was sent"):
            await b.publisher.publish(WeightVersion(2, 1))
        # The allowance of bf16 would not have told.
        unknowing._readable = {}
        done = await b.publisher.publish(WeightVersion(2, 1))
        assert 0.05 < done.probe_diff_max < 2.0
        b.trainer.stale, unknowing._readable = False, listed
        done = await b.publisher.publish(WeightVersion(2, 1))
        assert done.probe_diff_max < 1e-4


def test_a_server_that_ignores_an_update_is_refused(live_server: LiveServer) -> None:
    asyncio.run(a_server_that_ignores_an_update_is_refused(live_server, 1))


@pytest.mark.full
def test_a_server_of_two_ranks_that_ignores_an_update_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_llama(seed=1).save_pretrained(model)
    write_tokenizer(model)
    two = server_config(tensor_parallel=2)
    binding = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}  # two ranks on one NUMA node
    serving = contextmanager(serve)(model, tmp_path / "log", two, env=binding)
    with serving as server:
        asyncio.run(a_server_that_ignores_an_update_is_refused(server, 2))
