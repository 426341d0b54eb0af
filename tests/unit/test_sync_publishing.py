"""What the controller asks of the trainers for a publish, and the trainer's part in it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import made
import pytest
import torch
from fake_sglang import FakeServer
from torch import Tensor

from agpo_megatron.config.schema import Config
from agpo_megatron.controller.publishing import make_publisher, probe_tokens, probe_tolerance
from agpo_megatron.conversion.manifest import publish_manifest
from agpo_megatron.rollout.client import ServerClient
from agpo_megatron.rollout.excerpts import excerpt_digest
from agpo_megatron.rollout.pool import RolloutPool
from agpo_megatron.samples import WeightVersion
from agpo_megatron.sync.messages import StageReport
from agpo_megatron.trainer.publishing import PolicyPublisher

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 70,
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "hidden_act": "silu",
}  # fmt: skip


def config(model: Path, policy_dtype: str, server_dtype: str) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(model)},
            "data": {"path": "d"},
            "policy": {"dtype": policy_dtype},
            "rollout": {"dtype": server_dtype},
            "cluster": {"device": "cpu", "command_timeout": 60},
        }
    )


class Trainers:
    """Stands for the trainer's command channel; keeps every call with its timeout."""

    def __init__(self) -> None:
        self.calls: dict[str, dict[str, Any]] = {}
        self.checksums: dict[str, str] | None = {"w": "1"}

    async def call(self, name: str, **args: Any) -> list[dict[str, Any]]:
        self.calls[name] = args
        asked = args.get("excerpts", {})
        read = {name: excerpt_digest([0.0]) for name in asked}
        report = vars(StageReport("d", 1, 0.1, self.checksums, read))
        source = {"stage": 0, "host": "10.0.0.1", "port": 5000, "report": report, "step": 3}
        if name == "score":
            return [{"logprobs": [0.0] + [-1.0] * (len(args["tokens"]) - 1), "step": 3}]
        return [{"stage": None, "step": 3}, source]


@pytest.mark.parametrize(("backend", "ranks"), [("gloo", 1), ("gloo", 2), ("nccl", 1)])
def test_excerpts_are_asked_for_where_the_hashes_are_not_known(
    tmp_path: Path, backend: str, ranks: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    settings = config(tmp_path, "fp32", "float32")
    settings = settings.model_copy(
        update={"rollout": settings.rollout.model_copy(update={"tensor_parallel": ranks})}
    )
    known = (backend, ranks) == ("gloo", 1)

    async def run() -> None:
        fake, trainers = FakeServer(), Trainers()
        trainers.checksums = {"w": "1"} if known else None
        fake.weights = {
            spec.name: [0.0] for spec in publish_manifest(LLAMA, [[0, 1]], "float32")[0]
        }
        await fake.start()
        async with aiohttp.ClientSession() as session:
            pool = RolloutPool([ServerClient(fake.url, session)], settings.rollout)
            publisher = make_publisher(settings, pool, trainers, backend, PROMPTS)
            async with pool:
                await pool.wait_alive()
                await publisher.publish(WeightVersion(3, 1))
        await fake.stop()
        asked = trainers.calls["publish_send"]["excerpts"]
        assert len(asked) == (0 if known else 4)
        read = [body["name"] for name, body in fake.controls if name == "get_weights_by_name"]
        assert read == list(asked)

    asyncio.run(run())


PROMPTS = [made.prompt(i, list(range(8)), "7") for i in range(4)]


def test_the_servers_precision_is_published_within_nested_deadlines(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    settings = config(tmp_path, "fp32", "bfloat16")

    async def run() -> None:
        fake, trainers = FakeServer(), Trainers()
        await fake.start()
        async with aiohttp.ClientSession() as session:
            pool = RolloutPool([ServerClient(fake.url, session)], settings.rollout)
            publisher = make_publisher(settings, pool, trainers, "gloo", PROMPTS)
            async with pool:
                await pool.wait_alive()
                await publisher.publish(WeightVersion(3, 1))
        await fake.stop()
        received = dict(fake.controls)["update_weights_from_distributed"]
        assert set(received["dtypes"]) == {"bfloat16"}
        sent = trainers.calls["publish_send"]
        announced = [spec["dtype"] for stage in sent["plan"] for b in stage for spec in b]
        assert set(announced) == {"bfloat16"}
        assert 5 < sent["seconds"] < 20  # less than one pass's share of the 60 s
        assert sent["timeout"] > sent["seconds"] + 10
        for name in ("publish_open", "score"):
            assert 20 < trainers.calls[name]["timeout"] < 60
        assert len(trainers.calls["score"]["tokens"]) == 32

    asyncio.run(run())


@pytest.mark.parametrize(
    ("policy", "server", "tolerance"),
    [
        ("fp32", "auto", 1e-3),
        ("bf16", "auto", 2.0),
        ("fp32", "bfloat16", 2.0),
        ("bf16", "float32", 2.0),
    ],
)
def test_tolerance_is_that_of_the_coarser_end(policy: str, server: str, tolerance: float) -> None:
    assert probe_tolerance(config(Path("m"), policy, server)) == tolerance


def test_the_probe_is_the_beginning_of_the_tasks_own_text() -> None:
    prompts = [made.prompt(i, [i, i + 100], "7") for i in range(50)]
    tokens = probe_tokens(iter(prompts))
    assert tokens[:4] == [0, 100, 1, 101]
    assert len(tokens) == 32


def test_a_plan_that_does_not_fit_the_policy_still_draws_all_its_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AGPO_ADDRESS", "127.0.0.1")
    drawn: list[str] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in "abc":
            drawn.append(name)
            yield name, torch.zeros(2)

    policy = SimpleNamespace(
        backend=SimpleNamespace(device_type="cpu"),
        layout=SimpleNamespace(publishes=True, pp_rank=0),
        named_hf_tensors=tensors,
    )
    publisher = PolicyPublisher(policy, config(Path("m"), "fp32", "auto"))
    publisher.open("epoch", 2)
    plan = [[[{"name": "z", "shape": [2], "dtype": "float32"}]]]
    answer = publisher.send(plan, seconds=5.0, step=1, excerpts={}, held=1)
    assert "expects z (2,), the policy gives a (2,)" in answer["report"]["error"]
    assert drawn == ["a", "b", "c"]
