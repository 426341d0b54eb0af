"""Dynamic sampling: which prompts a step takes, with a real journal and prompt stream and a scripted pool."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import made
import pytest
from test_journal import make_group

from agpo_megatron.config import load_config
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.controller.evaluation import Rollouts
from agpo_megatron.controller.live import Collected, collect
from agpo_megatron.controller.run import Recipe, Run
from agpo_megatron.journal import Journal
from agpo_megatron.observe.metrics import MetricsWriter
from agpo_megatron.observe.progress import Progress
from agpo_megatron.reward import Problem
from agpo_megatron.samples import Group, Prompt

SIZE = 4


class Pool:
    """Generates groups whose variance is known by position: even positions are mixed, odd ones all wrong."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    async def generate_group(self, prompt: Prompt) -> Group:
        self.asked.append(prompt.position)
        await asyncio.sleep(0.001 * (prompt.position % 3))  # they finish in another order
        group = make_group(prompt.position)
        if prompt.position % 2 == 0:
            return group
        samples = [replace(s, raw_reward=0.0, correct=False) for s in group.samples]
        return Group(group.prompt, samples)


def run_in(folder: Path, *overrides: str) -> tuple[Run, Pool, Rollouts]:
    path = folder / "c.yaml"
    path.write_text("model: {path: m}\ndata: {path: d}\n")
    config = load_config(
        path, ["algorithm.preset=dapo", f"train.prompts_per_batch={SIZE}", *overrides], str(folder)
    )
    with Progress(1, "test") as progress:
        run = Run(
            config,
            RunFolder(folder),
            Journal(folder / "journal"),
            SimpleNamespace(),  # type: ignore[arg-type]
            MetricsWriter(folder, tensorboard=False),
            progress,
            Recipe(1.0, 0, 1),
            64,
        )
    pool: Any = Pool()

    async def as_is(group: Group, problem: Problem, source: int) -> Group:
        assert (problem.answer, source) == (str(group.prompt.position), 0)
        return group

    pool_of_workers = SimpleNamespace(take_busy_seconds=lambda: 0.5)
    rewards: Any = SimpleNamespace(score_group=as_is, pool=pool_of_workers)
    stream: Any = SimpleNamespace(
        prompt_at=lambda p: made.prompt(p, [1, 2, 3 + p], str(p)),
        problem_at=lambda p: (0, Problem([], str(p))),
    )
    return run, pool, Rollouts(pool, rewards, stream, [])


def collected(run: Run, rollouts: Rollouts, cursor: int) -> Collected:
    pending = run.journal.pending_groups()
    return asyncio.run(collect(run, rollouts, cursor, pending, {}))


def positions(groups: list[Any]) -> list[int]:
    return [j.group.prompt.position for j in groups]


def test_uniform_groups_are_replaced_by_those_of_the_next_prompts(tmp_path: Path) -> None:
    run, pool, rollouts = run_in(tmp_path)
    got = collected(run, rollouts, 0)
    # rounds: 0-3 keeps 0, 2; 4-5 keeps 4; 6 keeps 6
    assert positions(got.groups) == [0, 2, 4, 6]
    assert positions(got.discarded) == [1, 3, 5]
    assert (got.cursor, got.rounds) == (7, 3)
    assert sorted(pool.asked) == list(range(7))


def test_the_rounds_are_bounded_and_the_step_is_full_all_the_same(tmp_path: Path) -> None:
    run, _, rollouts = run_in(tmp_path, "algorithm.advantage.resample_rounds=2")
    got = collected(run, rollouts, 0)
    assert positions(got.groups) == [0, 2, 4, 1], "the earliest uniform group fills the step"
    assert positions(got.discarded) == [3, 5]
    assert (got.cursor, got.rounds) == (6, 2)


def test_a_restart_takes_the_same_prompts_and_generates_none_again(tmp_path: Path) -> None:
    run, _, rollouts = run_in(tmp_path)
    first = collected(run, rollouts, 0)
    again, pool, others = run_in(tmp_path)
    second = collected(again, others, 0)
    assert pool.asked == []
    assert (positions(second.groups), second.cursor) == (positions(first.groups), first.cursor)


@pytest.mark.parametrize("preset", ["agpo", "grpo"])
def test_without_it_a_step_takes_its_prompts_as_they_come(tmp_path: Path, preset: str) -> None:
    run, _, rollouts = run_in(tmp_path, f"algorithm.preset={preset}")
    got = collected(run, rollouts, 8)
    assert positions(got.groups) == [8, 9, 10, 11]
    assert (got.discarded, got.cursor, got.rounds) == ([], 12, 1)
