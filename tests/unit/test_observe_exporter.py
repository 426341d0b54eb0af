"""Prometheus reads what was written and what is going on, over HTTP; the dashboard asks for nothing else."""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_cluster_status import CONFIG

from agpo_megatron.cluster.processes import free_port
from agpo_megatron.cluster.roles import machine_plan
from agpo_megatron.cluster.start_folder import StartFolder
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.config.schema import ObserveConfig
from agpo_megatron.controller.assembly import metrics_of
from agpo_megatron.controller.schedule import Fate, Window
from agpo_megatron.controller.trainer_client import RankStatus, TrainerClient
from agpo_megatron.controller.vitals import Vitals
from agpo_megatron.observe.exporter import LIVE, ExporterError, metric_name
from agpo_megatron.observe.metrics import METRIC_FAMILIES, METRIC_KEYS
from agpo_megatron.rollout.client import ServerClient
from agpo_megatron.rollout.pool import RolloutPool
from agpo_megatron.wait import waiting

DASHBOARD = Path(__file__).parents[2] / "launch" / "grafana.json"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def config_with(port: int, **observe: Any) -> Any:
    observed = ObserveConfig(prometheus_port=port, writers=[], **observe)
    return CONFIG.model_copy(update={"observe": observed})


@pytest.fixture
def start(tmp_path: Path) -> StartFolder:
    plan = machine_plan(CONFIG, "localhost", "train")
    return StartFolder.create(RunFolder(tmp_path), "s1", plan, CONFIG)


async def scrape(port: int) -> Samples:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}/metrics") as answer,
    ):
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith("text/plain")
        text = await answer.text()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def at(found: Samples, name: str, /, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


def test_every_written_value_is_scraped(tmp_path: Path, start: StartFolder) -> None:
    port = free_port("127.0.0.1")
    row: dict[str, float] = {key: i + 0.5 for i, key in enumerate(METRIC_KEYS)}
    row |= {"step": 7, "grad_norm": math.inf, "source_accuracy/gsm8k": 0.25}

    async def body() -> tuple[Samples, Samples]:
        vitals = Vitals(start, TrainerClient(2, "token", 1, 60.0, 60.0))
        async with metrics_of(config_with(port), RunFolder(tmp_path), vitals) as metrics:
            metrics.write(row)
            first = await scrape(port)
            metrics.write({"step": 8, "lr": 0.125})
        # The next start of the run begins with what is recorded.
        async with metrics_of(config_with(port), RunFolder(tmp_path), vitals):
            return first, await scrape(port)

    first, second = asyncio.run(body())
    for key in METRIC_KEYS:
        if key != "grad_norm":
            assert at(first, metric_name(key)) == row[key], key
    assert math.isnan(at(first, "agpo_grad_norm"))
    assert at(first, "agpo_source_accuracy", name="gsm8k") == 0.25
    assert (at(second, "agpo_step"), at(second, "agpo_lr")) == (8, 0.125)
    assert at(second, "agpo_reward_mean") == row["reward/mean"], "it stands with another update"


def test_what_is_going_on_is_scraped(start: StartFolder, tmp_path: Path) -> None:
    port = free_port("127.0.0.1")
    start.write_memory("n1", {"controller": 5, "trainer rank 0": 70, "rollout server 0": 9})
    start.write_memory("n2", {"trainer rank 1": 80})

    async def body() -> Samples:
        trainers, clock = TrainerClient(2, "token", 1, 60.0, 60.0), time.monotonic()
        trainers.ranks[0] = RankStatus("update (command 7)", time.time() - 90, clock, "score", 11)
        trainers.ranks[1] = RankStatus("the next command", time.time() - 80, clock - 70)
        command = asyncio.create_task(trainers.call("update"))
        vitals = Vitals(start, trainers)
        async with aiohttp.ClientSession() as session:
            clients = [ServerClient(f"http://10.0.0.{i}:1", session) for i in (1, 2)]
            pool = RolloutPool(clients, CONFIG.rollout)
            rewards = SimpleNamespace(pool=SimpleNamespace(busy_seconds=3.0))
            vitals.pool, vitals.rewards = pool, rewards  # type: ignore[assignment]
            vitals.window = Window(2, 1, 5, cursor=0)
            assert vitals.window.admit() == [0, 1, 2, 3]
            vitals.window.finish(2, Fate.ACCEPTED)
            await pool.mark_ready(pool.servers[1], "v")
            taken = await pool.slots.acquire(5, (0, 0))
            assert taken is pool.servers[1]
            await pool.close_dispatch()
            await asyncio.sleep(0.2)
            pool.slots.take_usage()  # as at the end of a batch
            async with metrics_of(config_with(port), RunFolder(tmp_path), vitals):
                with waiting("publish weights 12", 600.0):
                    found = await scrape(port)
            command.cancel()
            return found

    found = asyncio.run(body())
    phase = "agpo_live_phase_seconds"
    assert at(found, phase, role="controller", phase="publish weights N") < 5
    assert at(found, phase, role="controller", phase="trainer command update") >= 0.2
    assert at(found, phase, role="trainer rank 0", phase="update (command N)") >= 90
    assert at(found, phase, role="trainer rank 1", phase="the next command") >= 80
    assert at(found, "agpo_live_heartbeat_age_seconds", rank="1") >= 70
    assert at(found, "agpo_live_device_memory_bytes", rank="0") == 11
    busy = "agpo_live_busy_seconds_total"
    assert 0.2 <= at(found, busy, role="trainer") < 5
    assert 0.1 <= at(found, busy, role="servers") < 2.5, "one of two servers"
    assert at(found, busy, role="rewards") == 3.0
    assert at(found, "agpo_live_memory_bytes", role="trainer") == 80
    assert at(found, "agpo_live_memory_bytes", role="servers") == 9
    assert at(found, "agpo_live_samples_in_flight", server="1") == 5
    assert at(found, "agpo_live_dispatch_open") == 0
    assert at(found, "agpo_live_server_state", server="0", state="starting") == 1
    assert at(found, "agpo_live_server_state", server="1", state="ready") == 1
    assert at(found, "agpo_live_server_state", server="1", state="dead") == 0
    assert at(found, "agpo_live_window_ready_groups") == 1
    assert at(found, "agpo_live_window_open_groups") == 3
    assert {name for name, _ in found} >= set(LIVE), "every gauge of the moment is there"


def test_a_taken_port_is_one_clear_error(start: StartFolder, tmp_path: Path) -> None:
    async def body() -> None:
        vitals = Vitals(start, TrainerClient(1, "token", 1, 60.0, 60.0))
        server = await asyncio.start_server(lambda r, w: None, "0.0.0.0", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            words = rf"observe.prometheus_port {port}: .*in use; set it to a free port, or to 0"
            with pytest.raises(ExporterError, match=words):
                async with metrics_of(config_with(port), RunFolder(tmp_path), vitals):
                    pass

    asyncio.run(body())


def test_the_dashboard_asks_only_for_what_there_is() -> None:
    def expressions(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from (v for k, v in node.items() if k in ("expr", "query") and isinstance(v, str))
            node = list(node.values())
        if isinstance(node, list):
            for each in node:
                yield from expressions(each)

    asked = [e for e in expressions(json.loads(DASHBOARD.read_text())) if e != "prometheus"]
    names = {name for expression in asked for name in re.findall(r"\bagpo_\w+", expression)}
    there = {metric_name(key) for key in METRIC_KEYS} | set(LIVE)
    there |= {metric_name(family.rstrip("/")) for family in METRIC_FAMILIES}
    assert len(names) > 30 and names <= there, names - there
    assert set(LIVE) <= names, "what is exported of the moment is also shown"
    assert all("agpo_" in expression for expression in asked)
