"""Controller and trainer rank over real HTTP: exactly once, authenticated, failures and silence named."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import requests

from agpo_megatron.cluster.processes import free_port
from agpo_megatron.controller.trainer_client import TrainerClient, TrainerError
from agpo_megatron.trainer.channel import Channel, ControllerLost
from agpo_megatron.wait import WaitExpired

TOKEN = "secret"


def serve(scenario: Callable, heartbeat_timeout: float = 60.0) -> None:
    """Run ``scenario(client, url)`` with a started client."""

    async def body() -> None:
        client = TrainerClient(2, TOKEN, 7, heartbeat_timeout, command_timeout=20.0)
        port = free_port()
        await client.start("127.0.0.1", port)
        try:
            await scenario(client, f"http://127.0.0.1:{port}")
        finally:
            await client.close()

    asyncio.run(body())


def test_a_trainer_that_outlived_its_controller_takes_the_next_ones_first_command() -> None:
    seen: list[tuple[int, int]] = []

    def rank_zero(url: str) -> None:
        channel = Channel(url, TOKEN, 0, patience=5.0)
        command = None
        while command is None:  # 40 commands into the attempt before
            command = channel.next_command(6, 40)
        seen.append((command.attempt, command.seq))
        channel.deliver(replace(command, attempt=6, seq=40), [{"late": "of the one before"}])
        channel.deliver(command, [{"rank": 0}, {"rank": 1}])

    async def scenario(client: TrainerClient, url: str) -> None:
        thread = threading.Thread(target=rank_zero, args=(url,))
        thread.start()
        assert await client.call("load", checkpoint=None, step=0) == [{"rank": 0}, {"rank": 1}]
        await asyncio.to_thread(thread.join)

    serve(scenario)
    assert seen == [(7, 1)]


def test_a_command_is_carried_out_once_and_all_results_come_back() -> None:
    seen: list[tuple[int, str, dict]] = []

    def rank_zero(url: str) -> None:
        channel = Channel(url, TOKEN, 0, patience=5.0)
        last = 0
        while len(seen) < 2:
            command = channel.next_command(7, last)
            if command is None:
                continue
            seen.append((command.seq, command.name, command.args))
            last = command.seq
            channel.deliver(command, [{"rank": 0}, {"rank": 1}])
            channel.deliver(command, [{"late": "duplicate"}])

    async def scenario(client: TrainerClient, url: str) -> None:
        thread = threading.Thread(target=rank_zero, args=(url,))
        thread.start()
        assert await client.call("update", step=3) == [{"rank": 0}, {"rank": 1}]
        assert await client.call("save", path="x") == [{"rank": 0}, {"rank": 1}]
        await asyncio.to_thread(thread.join)

    serve(scenario)
    assert seen == [(1, "update", {"step": 3}), (2, "save", {"path": "x"})]


def test_numbers_that_are_not_finite_reach_the_controller() -> None:
    """JSON has none of them, and requests refuses them: the guards want to see them all the same."""

    def rank_zero(url: str) -> None:
        channel, command = Channel(url, TOKEN, 0, patience=5.0), None
        while command is None:
            command = channel.next_command(7, 0)
        channel.deliver(command, [{"loss/policy": math.nan, "grad_norm": math.inf}])

    async def scenario(client: TrainerClient, url: str) -> None:
        thread = threading.Thread(target=rank_zero, args=(url,))
        thread.start()
        (result,) = await client.call("update", step=3)
        assert math.isnan(result["loss/policy"]) and result["grad_norm"] == math.inf
        await asyncio.to_thread(thread.join)

    serve(scenario)


def test_requests_without_the_token_are_refused() -> None:
    async def scenario(client: TrainerClient, url: str) -> None:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            answer = await asyncio.to_thread(
                requests.get, url + "/command?after=0", headers=headers
            )
            assert answer.status_code == 401

    serve(scenario)


def test_the_first_failing_rank_is_named() -> None:
    async def scenario(client: TrainerClient, url: str) -> None:
        channel = Channel(url, TOKEN, 1, patience=5.0)
        call = asyncio.create_task(client.call("update"))
        await asyncio.to_thread(channel.report_failure, "update", "loss is NaN")
        await asyncio.to_thread(channel.report_failure, "update", "because rank 1 left")
        with pytest.raises(TrainerError, match="rank 1 failed in update: loss is NaN"):
            await call

    serve(scenario)


def test_a_silent_rank_is_named_with_its_last_phase() -> None:
    async def scenario(client: TrainerClient, url: str) -> None:
        body = {"rank": 1, "phase": "update: backward", "since": 0.0, "last": "", "device_bytes": 7}
        headers = {"Authorization": f"Bearer {TOKEN}"}
        await asyncio.to_thread(requests.post, url + "/heartbeat", json=body, headers=headers)
        assert client.ranks[1].device_bytes == 7
        with pytest.raises(TrainerError, match=r"\[1\] sent no heartbeat.*update: backward"):
            await client.call("update")

    serve(scenario, heartbeat_timeout=0.5)


def test_a_deadline_tells_what_was_waited_for_and_where_everyone_is() -> None:
    async def scenario(client: TrainerClient, url: str) -> None:
        with pytest.raises(WaitExpired, match="trainer command publish.*rank 0: never heard"):
            await client.call("publish", timeout=0.5)

    serve(scenario)


def test_a_rank_gives_up_on_a_controller_that_is_gone() -> None:
    channel = Channel(f"http://127.0.0.1:{free_port()}", TOKEN, 3, patience=0.5)
    with pytest.raises(ControllerLost, match="rank 3: no answer from the controller"):
        channel.next_command(7, 0)
