"""Order of a publish and what happens to several servers when one fails; one real server is in tests/e2e."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import aiohttp
import pytest
from fake_sglang import FakeServer

from agpo_megatron.config.schema import RolloutConfig
from agpo_megatron.conversion.shape import TensorSpec
from agpo_megatron.rollout.client import ServerClient
from agpo_megatron.rollout.pool import RolloutPool, State
from agpo_megatron.sync.messages import PublishReport, StageReport
from agpo_megatron.sync.protocol import Publisher, PublishError, differing
from agpo_megatron.types import Prompt, WeightVersion

PLAN = [
    [[TensorSpec("a", (2,), "float32")], [TensorSpec("b", (3,), "float32")]],
    [[TensorSpec("c", (1,), "float32")]],
]
NAMES = [["a"], ["b"], ["c"]]


class FakeTrainer:
    """Two stages that send nothing; the fake servers receive nothing."""

    def __init__(self) -> None:
        self.opened: list[tuple[str, int]] = []
        self.checksums: Mapping[str, str] | None = {"w": "1"}
        self.logprob = -1.0

    async def publish_open(self, epoch: str, world_size: int) -> dict[int, tuple[str, int]]:
        self.opened.append((epoch, world_size))
        return {0: ("10.0.0.1", 5000), 1: ("10.0.0.2", 5001)}

    async def publish_send(self, version: WeightVersion) -> PublishReport:
        stage = StageReport("d", 10, 0.1, self.checksums)
        return PublishReport(version.step, {0: stage, 1: stage})

    async def score_tokens(self, tokens: list[int]) -> list[float]:
        return [self.logprob] * (len(tokens) - 1)


@asynccontextmanager
async def publishing(
    count: int,
) -> AsyncIterator[tuple[Publisher, RolloutPool, list[FakeServer], FakeTrainer]]:
    fakes = [FakeServer() for _ in range(count)]
    for fake in fakes:
        await fake.start()
    async with aiohttp.ClientSession() as session:
        clients = [ServerClient(fake.url, session, timeout=5) for fake in fakes]
        pool = RolloutPool(clients, RolloutConfig(start_timeout=5))
        trainer = FakeTrainer()
        publisher = Publisher(
            pool, trainer, PLAN, server_ranks=2 if count > 1 else 1, backend="gloo",
            probe_tokens=[3, 1, 2], probe_tolerance=1e-3, timeout=6,
        )  # fmt: skip
        pool.refresh = None  # only what the tests ask for
        async with pool:
            await pool.wait_alive()
            try:
                yield publisher, pool, fakes, trainer
            finally:
                for fake in fakes:
                    await fake.stop()


def received(fake: FakeServer) -> list[list[str]]:
    return [
        body["names"] for name, body in fake.controls if name == "update_weights_from_distributed"
    ]


def test_order_and_contents() -> None:
    async def run() -> None:
        async with publishing(1) as (publisher, pool, (fake,), trainer):
            result = await publisher.publish(WeightVersion(4, 2))
            assert [name for name, _ in fake.controls] == [
                "pause_generation",
                *["init_weights_update_group"] * 2,
                "begin_weight_update",
                *["update_weights_from_distributed"] * 3,
                "end_weight_update",
                "weights_checker",
                "flush_cache",
                "update_weight_version",
            ]  # continue_generation is not a control of the fake
            bodies = dict(fake.controls)
            assert bodies["pause_generation"] == {"mode": "abort"}
            assert bodies["update_weight_version"] == {
                "new_version": str(result.version),
                "abort_all_requests": False,
            }
            last = bodies["update_weights_from_distributed"]
            assert (last["names"], last["dtypes"], last["shapes"]) == (["c"], ["float32"], [[1]])
            assert last["flush_cache"] is False
            assert "weight_version" not in last
            assert bodies["init_weights_update_group"]["master_address"] == "10.0.0.2"
            assert received(fake) == NAMES
            assert result.bytes == 20
            assert result.servers == [fake.url]
            assert (result.version.step, result.version.attempt) == (4, 2)
            assert len(result.version.digest) == 12
            assert pool.servers[0].state is State.READY
            fake.controls.clear()
            await publisher.publish(WeightVersion(5, 2))
            assert len(trainer.opened) == 1  # same members: the groups stay
            assert "init_weights_update_group" not in dict(fake.controls)

    asyncio.run(run())


def test_ranks_of_two_servers_with_two_gpus() -> None:
    async def run() -> None:
        async with publishing(2) as (publisher, _, fakes, trainer):
            await publisher.publish(WeightVersion(1, 1))
            assert [world for _, world in trainer.opened] == [5]
            offsets = [dict(f.controls)["init_weights_update_group"]["rank_offset"] for f in fakes]
            assert offsets == [1, 3]

    asyncio.run(run())


@pytest.mark.parametrize(
    "endpoint",
    [
        "pause_generation",
        "begin_weight_update",
        "update_weights_from_distributed",
        "end_weight_update",
        "flush_cache",
    ],
)
def test_a_failed_server_gets_everything_again_alone(endpoint: str) -> None:
    async def run() -> None:
        async with publishing(2) as (publisher, pool, (good, bad), trainer):
            bad.refuse.append(endpoint)
            result = await publisher.publish(WeightVersion(1, 1))
            assert result.servers == [good.url, bad.url]
            assert all(server.state is State.READY for server in pool.servers)
            assert received(good) == NAMES  # once
            assert received(bad)[-3:] == NAMES
            assert trainer.opened[-1][1] == 3  # a group of its own: source and two ranks
            await publisher.publish(WeightVersion(2, 1))
            assert trainer.opened[-1][1] == 5  # next time all together, under a new epoch
            assert len({epoch for epoch, _ in trainer.opened}) == len(trainer.opened)

    asyncio.run(run())


def test_a_server_that_dies_is_left_behind_and_the_other_serves() -> None:
    async def run() -> None:
        async with publishing(2) as (publisher, pool, (good, bad), _):
            await bad.stop()
            result = await publisher.publish(WeightVersion(1, 1))
            assert result.servers == [good.url]
            assert [s.state for s in pool.servers] == [State.READY, State.DEAD]
            group = await pool.generate_group(Prompt(0, [1], ""))
            assert len(group.samples) == 8

    asyncio.run(run())


def test_wrong_checksum_or_logprob_keeps_a_server_out() -> None:
    async def run() -> None:
        async with publishing(1) as (publisher, pool, (fake,), trainer):
            fake.checksums = {"w": "2", "rotary": "9"}
            with pytest.raises(PublishError, match="checksums differ from the trainer's: w"):
                await publisher.publish(WeightVersion(1, 1))
            assert pool.servers[0].state is State.QUARANTINED
            assert "update_weight_version" not in dict(fake.controls)
            fake.checksums = {"w": "1", "rotary": "9"}
            trainer.logprob = -1.1
            with pytest.raises(PublishError, match="differ from the trainer's by up to 1.00e-01"):
                await publisher.publish(WeightVersion(1, 1))
            trainer.logprob = float("nan")
            with pytest.raises(PublishError, match="differ from the trainer's by up to nan"):
                await publisher.publish(WeightVersion(1, 1))
            trainer.logprob = -1.0005
            result = await publisher.publish(WeightVersion(1, 1))
            assert result.probe_diff_max == pytest.approx(5e-4)

    asyncio.run(run())


def test_without_the_trainers_hashes_the_odd_server_out_is_found() -> None:
    async def run() -> None:
        async with publishing(3) as (publisher, _, fakes, trainer):
            trainer.checksums = None
            fakes[1].checksums = {"w": "2"}
            result = await publisher.publish(WeightVersion(1, 1))
            # alone there is nothing to compare it with, so the second full transfer is believed
            assert result.servers == [fakes[0].url, fakes[2].url, fakes[1].url]
            assert len(received(fakes[1])) == 6

    asyncio.run(run())


def test_nothing_is_dispatched_during_a_publish_and_all_is_afterwards() -> None:
    async def run() -> None:
        async with publishing(1) as (publisher, pool, (fake,), _):
            fake.release.clear()
            publish = asyncio.create_task(publisher.publish(WeightVersion(1, 1)))
            while "update_weight_version" not in dict(fake.controls):
                await asyncio.sleep(0.005)
            group = asyncio.create_task(pool.generate_group(Prompt(0, [1], "")))
            await asyncio.sleep(0.05)
            assert [r["sampling_params"]["max_new_tokens"] for r in fake.requests] == [
                0
            ]  # the probe
            fake.release.set()
            await asyncio.gather(publish, group)
            assert len(fake.requests) == 2

    asyncio.run(run())


def test_differing() -> None:
    assert differing({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "x", "z": "0"}) == ["b", "c"]
