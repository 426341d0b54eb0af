"""Evaluations on schedule: in turn with training, or beside it, with servers that answer when the test lets them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import made
import pytest
from test_eval_scores import held_out
from test_producer import run_in

from agpo_megatron.controller.evaluation import Rollouts, evaluating
from agpo_megatron.controller.run import Run
from agpo_megatron.reward import Problem
from agpo_megatron.samples import Group, Prompt, VersionSpan, WeightVersion


class HeldPool:
    """Samples under the version that the servers hold when ``go_on`` is set. ``beside``: of each request, what it said
    of the slots."""

    def __init__(self, step: int) -> None:
        self.version = WeightVersion(step, 1, "x")
        self.go_on = asyncio.Event()
        self.beside: list[bool] = []
        self.error: Exception | None = None

    async def sample(
        self, prompt: Prompt, n: int, temperature: float, top_p: float, most: int, beside: bool
    ) -> Group:
        self.beside.append(beside)
        begun = str(self.version)
        await self.go_on.wait()
        if self.error:
            raise self.error
        spans = (VersionSpan(begun, 0, 1), VersionSpan(str(self.version), 1, 3))
        return Group(prompt, [made.sample(prompt, i, 3, versions=spans) for i in range(n)])


async def as_is(group: Group, problem: Problem, source: int) -> Group:
    return group


def prepared(folder: Path, pool: HeldPool, staleness: int) -> tuple[Run, Rollouts]:
    run = run_in(folder, f"train.max_staleness={staleness}", "train.steps=8", "eval.every=2")
    run.version = pool.version
    parts: Any = (pool, SimpleNamespace(score_group=as_is), None, [held_out([1, 2])])
    return run, Rollouts(*parts)


def evaluated(run: Run) -> dict[int, list[int]]:
    """Steps of the weights that each evaluation is of, by the step that it is filed under."""
    return {
        int(path.stem.removeprefix("step-")): json.loads(path.read_text())["sets"]["set"]["weights"]
        for path in run.folder.evaluations.glob("step-*.json")
    }


async def turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_in_turn_an_evaluation_ends_before_training_goes_on(tmp_path: Path) -> None:
    async def body() -> None:
        pool = HeldPool(2)
        run, rollouts = prepared(tmp_path, pool, staleness=0)
        async with evaluating(run, rollouts) as evaluations:
            pool.go_on.set()
            await evaluations.due(1)
            assert evaluated(run) == {}
            await evaluations.due(2)
            assert evaluated(run) == {2: [2, 2]}
            await evaluations.due(2)
        assert pool.beside == [False, False], "two problems, once"

    asyncio.run(body())


def test_beside_training_it_holds_nobody_up_and_states_its_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        pool = HeldPool(2)
        run, rollouts = prepared(tmp_path, pool, staleness=1)
        async with evaluating(run, rollouts) as evaluations:
            for step in (2, 3, 4, 5, 6):
                async with asyncio.timeout(5):
                    await evaluations.due(step)
                await turns()
            assert evaluated(run) == {} and pool.beside == [True, True]
            pool.version = WeightVersion(6, 1, "y")
            pool.go_on.set()
        # The one under way ends, and the newest that was due meanwhile.
        assert evaluated(run) == {2: [2, 6], 6: [6, 6]}
        left_out = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
        assert left_out == ["evaluation at step 4 is left out: those before it took too long"]

    asyncio.run(body())


def test_one_that_a_kill_has_cost_is_made_up_for_once(tmp_path: Path) -> None:
    async def body() -> None:
        pool = HeldPool(5)
        run, rollouts = prepared(tmp_path, pool, staleness=1)
        pool.go_on.set()
        for _ in range(2):
            async with evaluating(run, rollouts) as evaluations:
                await evaluations.due(1)
                await evaluations.due(5)
                await evaluations.due(5)
        assert evaluated(run) == {4: [5, 5]}
        assert len(pool.beside) == 2

    asyncio.run(body())


def test_what_ends_one_beside_training_ends_the_run(tmp_path: Path) -> None:
    async def body(again: bool) -> None:
        pool = HeldPool(2)
        run, rollouts = prepared(tmp_path, pool, staleness=1)
        pool.error = RuntimeError("no server today")
        pool.go_on.set()
        async with evaluating(run, rollouts) as evaluations:
            await evaluations.due(2)
            await turns()
            if again:
                await evaluations.due(3)
                pytest.fail("it had failed")

    for again in (True, False):
        with pytest.raises(RuntimeError, match="no server today"):
            asyncio.run(body(again))


def test_an_error_of_the_run_does_not_wait_for_it(tmp_path: Path) -> None:
    async def body() -> None:
        pool = HeldPool(2)
        run, rollouts = prepared(tmp_path, pool, staleness=1)
        async with asyncio.timeout(5), evaluating(run, rollouts) as evaluations:
            await evaluations.due(2)
            await turns()
            raise ValueError("the trainer is gone")

    with pytest.raises(ValueError, match="the trainer is gone"):
        asyncio.run(body())
