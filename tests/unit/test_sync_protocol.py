"""Order of a publish and what happens to several servers when one fails; one real server is in tests/e2e."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import made
import pytest
from fake_sglang import FakeServer

from agpo_megatron.config.schema import RolloutConfig
from agpo_megatron.conversion.shape import TensorSpec
from agpo_megatron.rollout.client import ServerClient
from agpo_megatron.rollout.excerpts import excerpt_digest
from agpo_megatron.rollout.pool import RolloutPool
from agpo_megatron.rollout.servers import State
from agpo_megatron.samples import WeightVersion
from agpo_megatron.sync.messages import PublishReport, StageReport
from agpo_megatron.sync.proof import differing, majority
from agpo_megatron.sync.protocol import Publisher, PublishError

pytestmark = pytest.mark.processes

PLAN = [
    [[TensorSpec("a", (2,), "float32")], [TensorSpec("b", (3,), "float32")]],
    [[TensorSpec("c", (1,), "float32")]],
]
NAMES = [["a"], ["b"], ["c"]]


class FakeTrainer:
    """Two stages that send nothing; the fake servers receive nothing.

    ``step`` it holds (None: the one asked for); ``at_open`` and ``at_send``: what else happens there, the latter given
    its seconds; ``error``: of stage 1, once. All values of a tensor are the length of its name.
    """

    def __init__(self) -> None:
        self.opened: list[tuple[str, int]] = []
        self.sent = 0
        self.checksums: Mapping[str, str] | None = {"w": "1"}
        self.logprob = -1.0
        self.digest = "d"
        self.step: int | None = None
        self.scored_step = 1
        self.error = ""
        self.at_open: Callable[[], Awaitable[None]] | None = None
        self.at_send: Callable[[float], Awaitable[None]] | None = None

    async def publish_open(
        self, epoch: str, world_size: int, seconds: float
    ) -> dict[int, tuple[str, int]]:
        assert seconds > 0
        self.opened.append((epoch, world_size))
        if self.at_open:
            await self.at_open()
        return {0: ("10.0.0.1", 5000), 1: ("10.0.0.2", 5001)}

    async def publish_send(
        self, version: WeightVersion, seconds: float, excerpts: Mapping[str, int]
    ) -> PublishReport:
        self.sent += 1
        self.excerpts = dict(excerpts)
        if self.at_send:
            await self.at_send(seconds)
        read = {name: excerpt_digest([float(len(name))] * rows) for name, rows in excerpts.items()}
        stage = StageReport(self.digest, 10, 0.1, self.checksums, read)
        stages = {0: stage, 1: replace(stage, error=self.error)}
        self.error = ""
        return PublishReport(version.step if self.step is None else self.step, stages)

    async def score_tokens(self, tokens: list[int], seconds: float) -> tuple[int, list[float]]:
        assert seconds > 0
        return self.scored_step, [self.logprob] * (len(tokens) - 1)


@asynccontextmanager
async def publishing(
    count: int,
    timeout: float = 60,
    refresh: bool = False,
    keep_running: bool = False,
    kind: type[FakeServer] = FakeServer,
    readable: Mapping[str, int] | None = None,
    **config: Any,
) -> AsyncIterator[tuple[Publisher, RolloutPool, list[Any], FakeTrainer]]:
    fakes = [kind() for _ in range(count)]
    for fake in fakes:
        await fake.start()
    async with aiohttp.ClientSession() as session:
        clients = [ServerClient(fake.url, session, timeout=30) for fake in fakes]
        pool = RolloutPool(clients, RolloutConfig(**{"start_timeout": 30.0, **config}))
        trainer = FakeTrainer()
        publisher = Publisher(
            pool, trainer, PLAN, server_ranks=2 if count > 1 else 1, backend="gloo",
            probe_tokens=[3, 1, 2], probe_tolerance=1e-3, timeout=timeout, keep_running=keep_running,
            readable=readable,
        )  # fmt: skip
        if not refresh:
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
            group = await pool.generate_group(made.prompt(0, [1], ""))
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
        async with publishing(3) as (publisher, pool, fakes, trainer):
            trainer.checksums = None
            fakes[1].checksums = {"w": "2"}
            result = await publisher.publish(WeightVersion(1, 1))
            assert result.servers == [fakes[0].url, fakes[2].url]
            assert len(received(fakes[1])) == 6  # again alone, and compared with the others' hashes
            assert pool.servers[1].state is State.QUARANTINED
            assert "checksums differ from those of most servers: w" in pool.servers[1].reason
            await publisher._refresh(pool.servers[1])  # still wrong
            assert pool.servers[1].state is State.QUARANTINED
            fakes[1].checksums = {"w": "1"}
            await publisher._refresh(pool.servers[1])
            assert pool.servers[1].state is State.READY
            for fake in fakes:  # other weights, other hashes
                fake.checksums = {"w": "3"}
            assert len((await publisher.publish(WeightVersion(2, 1))).servers) == 3
            for fake, server in list(zip(fakes, pool.servers, strict=True))[1:]:
                await fake.stop()
                await pool.mark_dead(server, "test")
            fakes[0].checksums = {"w": "4"}  # what the absent ones reported before says nothing
            assert (await publisher.publish(WeightVersion(3, 1))).servers == [fakes[0].url]

    asyncio.run(run())


def test_without_the_trainers_hashes_a_server_alone_is_compared_with_itself() -> None:
    async def run() -> None:
        async with publishing(1) as (publisher, pool, (fake,), trainer):
            trainer.checksums = None
            await publisher.publish(WeightVersion(1, 1))
            await pool.quarantine(pool.servers[0], "test")
            fake.checksums = {"w": "2"}
            await publisher._refresh(pool.servers[0])
            assert pool.servers[0].state is State.QUARANTINED

    asyncio.run(run())


def test_two_servers_that_differ_are_both_not_believed() -> None:
    async def run() -> None:
        async with publishing(2) as (publisher, pool, fakes, trainer):
            trainer.checksums = None
            fakes[1].checksums = {"w": "2"}
            with pytest.raises(PublishError, match="checksums differ, and no majority agrees"):
                await publisher.publish(WeightVersion(1, 1))
            assert all(server.state is State.QUARANTINED for server in pool.servers)
            assert not any("update_weight_version" in dict(fake.controls) for fake in fakes)

            async def heal(_: float) -> None:
                if trainer.sent == 4:  # both together, the first alone, the second alone
                    fakes[1].checksums = {"w": "1"}

            trainer.sent, trainer.at_send = 1, heal
            result = await publisher.publish(WeightVersion(1, 1))
            assert result.servers == [fakes[1].url]
            await publisher._refresh(pool.servers[0])
            assert pool.servers[0].state is State.READY

    asyncio.run(run())


def test_a_server_that_misses_a_publish_receives_it_before_it_serves() -> None:
    async def run() -> None:
        async with publishing(2, refresh=True) as (publisher, pool, (good, away), trainer):
            first = await publisher.publish(WeightVersion(1, 1))
            await away.stop()
            await pool.mark_dead(pool.servers[1], "test: connection lost")
            trainer.digest, trainer.scored_step = "e", 2
            trainer.checksums = good.checksums = away.checksums = {"w": "2"}
            second = await publisher.publish(WeightVersion(2, 1))
            assert second.servers == [good.url]
            await away.start()
            assert away.version == str(first.version)  # what it still reports
            served: list[str] = []
            async with asyncio.timeout(30):
                while pool.servers[1].state is not State.READY:
                    await asyncio.sleep(0.05)
                    group = await pool.generate_group(made.prompt(0, [1], ""))
                    served += [s.versions[0].version for s in group.samples]
            assert set(served) == {str(second.version)}
            assert away.version == str(second.version)
            assert received(away) == NAMES * 2
            # nothing but the publishes' probes
            assert {r["sampling_params"]["max_new_tokens"] for r in away.requests} == {0}

    asyncio.run(run())


def test_refresh_only_where_it_is_needed() -> None:
    async def run() -> None:
        async with publishing(2) as (publisher, pool, fakes, trainer):
            await publisher._refresh(pool.servers[0])  # nothing was published yet
            assert (trainer.opened, fakes[0].controls) == ([], [])
            first = await publisher.publish(WeightVersion(1, 1))
            fakes[0].controls.clear()
            await publisher._refresh(pool.servers[0])  # READY: a publish reached it meanwhile
            assert fakes[0].controls == []
            await pool.quarantine(pool.servers[0], "test")
            fakes[1].controls.clear()
            await publisher._refresh(pool.servers[0])
            assert pool.servers[0].state is State.READY
            assert pool.servers[0].version == pool.servers[1].version == str(first.version)
            assert received(fakes[0]) == NAMES
            assert fakes[1].controls == []  # it serves meanwhile
            await pool.quarantine(pool.servers[0], "test")
            trainer.digest = "other"  # these would be other weights under the same version
            await publisher._refresh(pool.servers[0])
            assert pool.servers[0].state is State.QUARANTINED
            assert "as before" in pool.servers[0].reason

    asyncio.run(run())


def test_scores_of_another_step_are_not_compared() -> None:
    async def run() -> None:
        async with publishing(1) as (publisher, pool, _, trainer):

            async def changes_after(_: float) -> None:
                trainer.logprob = -7.0  # an update right after the send

            trainer.at_send = changes_after
            await publisher.publish(WeightVersion(1, 1))
            assert pool.servers[0].state is State.READY
            with pytest.raises(PublishError, match="log-probs of fixed tokens"):
                await publisher.publish(WeightVersion(1, 1))
            trainer.scored_step = 2
            await publisher.publish(WeightVersion(1, 1))
            assert pool.servers[0].state is State.READY

    asyncio.run(run())


def test_a_trainer_that_does_not_send_is_named() -> None:
    async def run() -> None:
        async with publishing(1) as (publisher, pool, (fake,), trainer):
            trainer.step = 3
            with pytest.raises(
                PublishError, match="did not send: the trainer holds step 3, not 4"
            ) as raised:
                await publisher.publish(WeightVersion(4, 1))
            assert fake.url in str(raised.value)
            assert pool.servers[0].state is State.QUARANTINED
            assert "update_weight_version" not in dict(fake.controls)
            trainer.step, trainer.error = (
                None,
                "cable",
            )  # then once, and the transfer alone goes well
            fake.controls.clear()
            await publisher.publish(WeightVersion(4, 1))
            assert received(fake) == NAMES * 2
            names = [name for name, _ in fake.controls]
            assert names.count("update_weight_version") == 1
            assert (
                names.count("init_weights_update_group") == 4
            )  # after the error, both stages anew

    asyncio.run(run())


def test_nothing_is_dispatched_during_a_publish_and_all_is_afterwards() -> None:
    async def run() -> None:
        async with publishing(1) as (publisher, pool, (fake,), _):
            fake.release.clear()
            publish = asyncio.create_task(publisher.publish(WeightVersion(1, 1)))
            while "update_weight_version" not in dict(fake.controls):
                await asyncio.sleep(0.005)
            group = asyncio.create_task(pool.generate_group(made.prompt(0, [1], "")))
            await asyncio.sleep(0.05)
            assert [r["sampling_params"]["max_new_tokens"] for r in fake.requests] == [
                0
            ]  # the probe
            fake.release.set()
            await asyncio.gather(publish, group)
            assert len(fake.requests) == 2

    asyncio.run(run())


def test_differing() -> None:
    sent, found = {"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "x", "z": "0"}
    assert differing([sent], [found]) == ["b", "c"]
    assert differing([sent, sent], [sent, {**sent, "a": "2"}]) == ["a"]


def test_majority_is_more_than_half() -> None:
    one, two = [{"w": "1"}], [{"w": "2"}]
    assert majority([one]) == one
    assert majority([one, two]) is None
    assert majority([two, one, two]) == two
    assert majority([two, one, two, one]) is None
    assert majority([]) is None
