"""A server that does not hold what was sent is refused within one publish, also when it is the only one."""

from __future__ import annotations

import asyncio
import logging

import numpy as np
import pytest
import torch
from fake_sglang import FakeServer
from test_sync_protocol import FakeTrainer, publishing

from agpo_megatron.rollout.excerpts import AT_ONCE, chosen, excerpt_digest, readable_rows
from agpo_megatron.rollout.servers import State
from agpo_megatron.samples import WeightVersion
from agpo_megatron.sync.protocol import Publisher, PublishError

pytestmark = pytest.mark.processes


def test_a_server_that_ignores_updates_is_caught_at_once_and_alone() -> None:
    async def run() -> None:
        async with publishing(1) as (publisher, pool, (fake,), trainer):
            trainer.checksums = None
            first = await publisher.publish(WeightVersion(1, 1))
            # Unchanged weights, of a closed gate for instance: nothing to prove.
            unchanged = await publisher.publish(WeightVersion(2, 1))
            assert unchanged.version.digest == first.version.digest
            trainer.digest = "e"
            with pytest.raises(
                PublishError,
                match=f"ignored the update: rank 0 .* of weights {first.version.digest}",
            ):
                await publisher.publish(WeightVersion(3, 1))
            assert trainer.sent == 4  # all of it was sent a second time
            assert pool.servers[0].state is State.QUARANTINED
            assert fake.version == str(unchanged.version)
            fake.checksums = {"w": "2"}
            await publisher.publish(WeightVersion(3, 1))
            # Started anew it reports other hashes; the initial ones again, and it has ignored this one too.
            fake.checksums, trainer.digest = {"w": "3"}, "f"
            await publisher.publish(WeightVersion(4, 1))
            fake.checksums, trainer.digest = {"w": "1"}, "g"
            with pytest.raises(PublishError, match="ignored the update"):
                await publisher.publish(WeightVersion(5, 1))
            trainer.digest = "d"  # the first weights again: now these are their hashes
            await publisher.publish(WeightVersion(6, 1))

    asyncio.run(run())


def test_every_rank_must_take_the_update_and_no_majority_may_ignore_it() -> None:
    async def run() -> None:
        async with publishing(3) as (publisher, pool, fakes, trainer):
            trainer.checksums = None
            for fake in fakes:
                fake.second_rank = {"w": "b1"}
            await publisher.publish(WeightVersion(1, 1))
            trainer.digest = "e"
            fakes[0].checksums, fakes[0].second_rank = {"w": "2"}, {"w": "b2"}
            fakes[1].checksums = {"w": "2"}  # its second rank and the third server do nothing
            result = await publisher.publish(WeightVersion(2, 1))
            assert result.servers == [fakes[0].url]
            assert "ignored the update: rank 1" in pool.servers[1].reason
            assert "ignored the update: rank 0" in pool.servers[2].reason
            fakes[1].second_rank = {"w": "b2"}
            await publisher._refresh(pool.servers[1])
            await publisher._refresh(pool.servers[2])
            states = [server.state for server in pool.servers]
            assert states == [State.READY, State.READY, State.QUARANTINED]

    asyncio.run(run())


def warnings_of_a_second_publish(moved: bool, digest: str, log: pytest.LogCaptureFixture) -> int:
    async def run(publisher: Publisher, fake: FakeServer, trainer: FakeTrainer) -> None:
        trainer.checksums = None
        await publisher.publish(WeightVersion(1, 1), moved=True)
        if digest != trainer.digest:
            trainer.digest, fake.checksums = digest, {"w": "2"}
        await publisher.publish(WeightVersion(2, 1), moved=moved)

    async def served() -> None:
        async with publishing(1) as (publisher, _, (fake,), trainer):
            await run(publisher, fake, trainer)

    log.clear()
    with log.at_level(logging.WARNING):
        asyncio.run(served())
    return sum("bit for bit what was published before" in m for m in log.messages)


def test_a_gradient_that_changes_nothing_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    assert warnings_of_a_second_publish(True, "d", caplog) == 1
    assert warnings_of_a_second_publish(False, "d", caplog) == 0
    assert warnings_of_a_second_publish(True, "e", caplog) == 0


def test_excerpts_are_read_back_and_compared_exactly() -> None:
    readable = dict.fromkeys(("a", "bb", "ccc", "dddd", "eeeee", "ffffff"), 2)

    async def run() -> None:
        async with publishing(1, readable=readable) as (publisher, pool, (fake,), trainer):
            trainer.checksums = None
            fake.weights = {name: [float(len(name))] * 5 for name in readable}
            asked: set[str] = set()
            for step in (1, 2):
                fake.controls.clear()
                await publisher.publish(WeightVersion(step, 1))
                bodies = [b for name, b in fake.controls if name == "get_weights_by_name"]
                assert {b["name"]: b["truncate_size"] for b in bodies} == trainer.excerpts
                assert len(bodies) == AT_ONCE
                asked |= set(trainer.excerpts)
            assert asked == set(readable)
            wrong = next(iter(chosen(readable, 3)))
            fake.weights[wrong][1] = np.nextafter(np.float32(len(wrong)), np.float32(9)).item()
            with pytest.raises(PublishError, match=f"{wrong} read back is not what was sent"):
                await publisher.publish(WeightVersion(3, 1))
            assert pool.servers[0].state is State.QUARANTINED
            del fake.weights[wrong]
            with pytest.raises(PublishError, match="get_weights_by_name"):
                await publisher.publish(WeightVersion(3, 1))
            fake.weights[wrong] = [[1.0], "x"]
            with pytest.raises(PublishError, match="get_weights_by_name"):
                await publisher.publish(WeightVersion(3, 1))

    asyncio.run(run())


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SHAPES = {
    "model.embed_tokens.weight": (70, 64),
    "model.layers.0.input_layernorm.weight": (64,),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.self_attn.k_proj.weight": (32, 64),
    "model.layers.0.self_attn.o_proj.weight": (64, 64),
    "model.layers.0.mlp.up_proj.weight": (96, 64),
}
Q, K, UP = (name for name in SHAPES if "q_proj" in name or "k_proj" in name or "up_proj" in name)


def test_what_a_server_gives_back_exactly() -> None:
    """With one rank, and with two, as tests/e2e/test_publish.py finds it on real servers."""
    assert readable_rows(LLAMA, SHAPES, 1) == {name: shape[0] for name, shape in SHAPES.items()}
    assert readable_rows(LLAMA, SHAPES, 2) == {
        "model.embed_tokens.weight": 35,
        "model.layers.0.input_layernorm.weight": 64,
        Q: 32,
        K: 16,
        "model.layers.0.self_attn.o_proj.weight": 64,
    }  # up: 48 rows a rank, which SGLang may pad
    # The endpoint miscounts heads of another size, and those of which ranks hold copies.
    assert not {Q, K} & set(readable_rows({**LLAMA, "head_dim": 32}, SHAPES, 1))
    assert not {Q, K} & set(readable_rows(LLAMA, SHAPES, 4))
    assert readable_rows({**LLAMA, "architectures": ["Qwen2ForCausalLM"]}, SHAPES, 1) == {}


def test_excerpts_of_a_large_model_cost_the_server_little() -> None:
    shapes = {K: (1024, 8192), Q: (8192, 8192), "model.norm.weight": (8192,)}
    large = {**LLAMA, "hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8}
    assert readable_rows(large, shapes, 4) == {K: 2, "model.norm.weight": 8192}


def test_the_choice_goes_through_all_and_is_a_function_of_the_step() -> None:
    readable = {f"t{i}": i + 1 for i in range(10)}
    windows = [chosen(readable, step) for step in range(5)]
    assert [len(window) for window in windows] == [AT_ONCE] * 5
    assert set().union(*windows[:3]) == set(readable)
    assert windows[0] != windows[1] and windows[3] == chosen(dict(reversed(readable.items())), 3)
    assert all(readable[name] == rows for window in windows for name, rows in window.items())
    assert chosen({"t": 1}, 7) == {"t": 1} and chosen({}, 7) == {}


def test_the_digest_is_of_the_bits_as_fp32() -> None:
    rows = torch.randn(3, 4).bfloat16()
    assert excerpt_digest(rows.float()) == excerpt_digest(rows.float().tolist())
    assert excerpt_digest([0.0]) != excerpt_digest([-0.0])
    assert excerpt_digest([1.0]) != excerpt_digest([1.0, 0.0])
    with pytest.raises(ValueError, match="could not convert"):
        excerpt_digest(["x"])
    with pytest.raises(ValueError, match="inhomogeneous"):
        excerpt_digest([[1.0], [1.0, 2.0]])
