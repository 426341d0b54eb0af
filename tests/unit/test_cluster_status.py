"""What a user is told about a run, from files that real writers wrote."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import aiohttp
import pytest

from agpo_megatron.cluster.roles import machine_plan
from agpo_megatron.cluster.start_folder import StartFolder
from agpo_megatron.cluster.status import describe_run, write_report
from agpo_megatron.config import Config, ConfigError
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.controller.status import StatusWriter
from agpo_megatron.controller.trainer_client import RankStatus, TrainerClient
from agpo_megatron.rollout.client import ServerClient
from agpo_megatron.rollout.pool import RolloutPool
from agpo_megatron.wait import last_finished, open_phases, waiting

CONFIG = Config.model_validate(
    {"model": {"path": "m"}, "data": {"path": "d"}, "policy": {"tensor_parallel": 2}}
)


@pytest.fixture
def start(tmp_path: Path) -> StartFolder:
    plan = machine_plan(CONFIG, "localhost", "train")
    return StartFolder.create(RunFolder(tmp_path), "s1", plan, CONFIG)


def write_status(start: StartFolder) -> None:
    async def body() -> None:
        trainers = TrainerClient(2, "token", 1, 60.0, 60.0)
        clock = time.monotonic()
        trainers.ranks[0] = RankStatus("update (command 7)", time.time() - 90, clock, "score")
        trainers.ranks[1] = RankStatus("the next command", time.time() - 80, clock - 70)
        async with aiohttp.ClientSession() as session:
            with waiting("update step 12", 600.0):
                async with StatusWriter(start, trainers) as status:
                    clients = [ServerClient("http://10.0.0.1:1", session)]
                    status.pool = RolloutPool(clients, CONFIG.rollout)

    asyncio.run(body())


def test_status_says_who_does_what_for_how_long(start: StartFolder) -> None:
    write_status(start)
    text = describe_run(RunFolder(start.path.parents[1]))
    assert "start 1 (s1), began 0 s ago, running" in text
    assert "localhost: controller, ranks 0-1, server 0" in text
    assert "controller: update step 12 for 0 s of at most 600 s" in text
    assert "trainer rank 0: update (command 7) for 90 s, after score (heard 0 s before)" in text
    assert "trainer rank 1: the next command for 80 s (heard 70 s before)" in text
    assert "rollout server 0: starting for 0 s, 0 samples in flight, has not generated" in text


def test_a_report_has_the_culprit_and_everybodys_phase(start: StartFolder) -> None:
    write_status(start)
    start.record_exit(
        {
            "role": "trainer rank 1",
            "host": "n2",
            "code": -9,
            "log": "x",
            "restarts": 0,
            "restarted": False,
            "time": time.time(),
        }
    )
    start.end("failed", "x")
    write_report(RunFolder(start.path.parents[1]), start, "trainer rank 1 was killed")
    report = (start.path / "report.txt").read_text()
    assert report.startswith("trainer rank 1 was killed\n")
    assert "failed 0 s ago (trainer rank 1, code -9)" in report
    assert "trainer rank 1 on n2 ended 0 s ago with code -9" in report
    assert "trainer rank 0: update (command 7)" in report


def test_a_folder_without_a_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no start of a run"):
        describe_run(RunFolder(tmp_path))


def test_waits_are_listed_oldest_first_and_the_last_one_is_remembered() -> None:
    with waiting("outer", 5.0):
        with waiting("inner"):
            assert [phase.name for phase in open_phases()][-2:] == ["outer", "inner"]
        assert last_finished() == "inner"
        assert [phase.name for phase in open_phases()][-1] == "outer"
