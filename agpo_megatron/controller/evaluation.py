"""Evaluation on sets of problems: generated and scored, every sample kept, scored again without generating."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa

from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.config.task import EvalSetConfig
from agpo_megatron.controller.eval_scores import SAMPLES_SCHEMA, set_scores
from agpo_megatron.controller.run import Run
from agpo_megatron.data.problems import DataError, ProblemSet, problem_id
from agpo_megatron.data.rows import read_arrow
from agpo_megatron.data.stream import PromptStream, prompts_in_order
from agpo_megatron.files import write_durably
from agpo_megatron.journal.records import encode_table
from agpo_megatron.observe.summary import HELD_OUT_KEYS
from agpo_megatron.reward import Problem, Response
from agpo_megatron.reward.rewards import Rewards
from agpo_megatron.rollout.pool import RolloutPool
from agpo_megatron.samples import Group, Prompt

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class EvalSet:
    """One set. ``source``: its place among the sources that ``Rewards`` was given. ``max_tokens``: of a response."""

    config: EvalSetConfig
    problems: ProblemSet
    source: int
    max_tokens: int

    @property
    def name(self) -> str:
        return self.config.shown


@dataclass
class Rollouts:
    """The sources of groups: servers, rewards, prompts to train on, and sets to evaluate."""

    pool: RolloutPool
    rewards: Rewards
    stream: PromptStream
    sets: Sequence[EvalSet]


async def evaluate(run: Run, rollouts: Rollouts, step: int) -> dict[str, float] | None:
    """Evaluate every set with the weights of ``step``, once: what is there is read. The scores of the first set that a
    run's summary shows; None without sets, or if those weights are gone."""
    if not rollouts.sets:
        return None
    path = run.folder.evaluation(step)
    if not path.exists():
        if run.version.step != step:
            return None  # not measured at that step, and its weights are gone
        with run.phase(f"evaluate step {step}", {}, ""):
            await measure(rollouts, run.folder, step)
    scores: dict[str, float] = json.loads(path.read_text())["scores"]
    return scores


class Evaluations:
    """The evaluations on schedule: where generation and training take turns, another turn; else beside both, with slots
    of their own. Publishes go on then, so the scores state from which to which weights they are (``weights``)."""

    def __init__(self, run: Run, rollouts: Rollouts) -> None:
        self._run, self._rollouts = run, rollouts
        self._every = run.config.eval.every if rollouts.sets else 0
        self._beside = run.config.train.max_staleness > 0
        self._begun: set[int] = set()
        self._next: int | None = None
        self._task: asyncio.Task[None] | None = None

    async def due(self, step: int) -> None:
        """Evaluate the weights of ``step`` if that is due. Raises what ended an evaluation beside training."""
        if not self._every:
            return
        if not self._beside:
            if step % self._every == 0:
                await evaluate(self._run, self._rollouts, step)
            return
        if self._task and self._task.done():
            self._task.result()
        # After a resume it may be one that was killed: it is made up for, under later weights.
        latest = step - step % self._every
        if latest in self._begun or self._run.folder.evaluation(latest).exists() or not latest:
            return
        self._begun.add(latest)
        if self._next is not None:
            log.warning(
                "evaluation at step %d is left out: those before it took too long", self._next
            )
        self._next = latest
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())

    async def _work(self) -> None:
        while self._next is not None:
            step, self._next = self._next, None
            await measure(self._rollouts, self._run.folder, step, beside=True)

    async def finish(self) -> None:
        if self._task:
            with self._run.phase("evaluation beside training to end", {}, ""):
                await self._task

    async def cancel(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


@asynccontextmanager
async def evaluating(run: Run, rollouts: Rollouts) -> AsyncIterator[Evaluations]:
    """Evaluations of a run; on leaving, those under way end first, or are cancelled by an error."""
    evaluations = Evaluations(run, rollouts)
    try:
        yield evaluations
        await evaluations.finish()
    finally:
        await evaluations.cancel()


async def measure(
    rollouts: Rollouts, folder: RunFolder, step: int, beside: bool = False
) -> dict[str, dict[str, Any]]:
    """Generate and score every set; keep samples and scores under ``step``. A set whose samples are there already, from
    an attempt that was killed, is not generated again. ``beside``: training goes on meanwhile."""
    scores = {}
    for eval_set in rollouts.sets:
        path = samples_path(folder, step, eval_set.name)
        if path.exists():
            samples = read_arrow(path)
        else:
            samples = await sampled(rollouts, eval_set, beside)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(path, encode_table(samples))
        scores[eval_set.name] = set_scores(samples, eval_set.max_tokens)
        log.info("evaluation at step %d of %s: %s", step, eval_set.name, scores[eval_set.name])
    write_scores(folder, step, scores)
    return scores


async def sampled(rollouts: Rollouts, eval_set: EvalSet, beside: bool) -> pa.Table:
    """The samples of a set, as ``SAMPLES_SCHEMA``."""
    config = eval_set.config

    async def one(prompt: Prompt) -> list[dict[str, Any]]:
        group = await rollouts.pool.sample(
            prompt, config.n, config.temperature, config.top_p, eval_set.max_tokens, beside
        )
        problem = eval_set.problems.problem(prompt.position)
        return rows_of(await rollouts.rewards.score_group(group, problem, eval_set.source), problem)

    prompts = prompts_in_order(eval_set.problems, config.max_prompts)
    found = await asyncio.gather(*(one(prompt) for prompt in prompts))
    return pa.Table.from_pylist([row for rows in found for row in rows], SAMPLES_SCHEMA)


def rows_of(group: Group, problem: Problem) -> list[dict[str, Any]]:
    return [
        {
            "problem": group.prompt.position,
            "problem_id": problem_id(problem.messages),
            "sample": sample.index,
            "prompt": problem.text,
            "answer": problem.answer,
            "response": sample.text,
            "tokens": len(sample.response_tokens),
            "finish_reason": sample.finish_reason,
            "value": sample.raw_reward,
            "correct": sample.correct,
            "parts": json.dumps(dict(sample.reward_parts)),
            "error": sample.reward_error,
            "prompt_tokens": sample.prompt_tokens,
            "response_tokens": sample.response_tokens,
            "rollout_logprobs": sample.rollout_logprobs,
            "versions": json.dumps([asdict(span) for span in sample.versions]),
        }
        for sample in group.samples
    ]


def samples_path(folder: RunFolder, step: int, name: str) -> Path:
    """The samples of one set: another name is another file."""
    return folder.evaluation(step).with_suffix(f".{quote(name, safe='')}.arrow")


def write_scores(folder: RunFolder, step: int, scores: Mapping[str, Mapping[str, Any]]) -> None:
    """``{"scores": what the summary shows of the first set, "sets": {name: all of its scores}}``."""
    first = next(iter(scores.values()))
    content = {"scores": {key: first[key] for key in HELD_OUT_KEYS}, "sets": scores}
    path = folder.evaluation(step)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, json.dumps(content, indent=1).encode())


async def rescore(
    folder: RunFolder, sets: Sequence[EvalSet], rewards: Rewards
) -> dict[int, dict[str, dict[str, Any]]]:
    """Score the stored samples of every evaluation in ``folder`` with today's reward; write samples and scores anew.

    Returns the scores by step and set. Raises DataError if there are no samples, or if they are not of these problems.
    """
    steps = sorted(
        {
            int(path.name.split(".")[0].removeprefix("step-"))
            for path in folder.evaluations.glob("step-*.arrow")
        }
    )
    if not steps:
        raise DataError(
            f"{folder.evaluations} holds no samples to score again; run `agpo-megatron eval` first"
        )
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for step in steps:
        for eval_set in sets:
            path = samples_path(folder, step, eval_set.name)
            if path.exists():
                samples = await rescored(read_arrow(path), eval_set, rewards)
                write_durably(path, encode_table(samples))
                scores = set_scores(samples, eval_set.max_tokens)
                found.setdefault(step, {})[eval_set.name] = scores
        if step in found:
            write_scores(folder, step, found[step])
    return found


async def rescored(samples: pa.Table, eval_set: EvalSet, rewards: Rewards) -> pa.Table:
    """The same samples with new verdicts. Raises DataError."""
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in samples.to_pylist():
        groups.setdefault(row["problem"], []).append(row)

    async def one(index: int, rows: list[dict[str, Any]]) -> None:
        problem = eval_set.problems.problem(index) if index < len(eval_set.problems) else None
        if problem is None or problem_id(problem.messages) != rows[0]["problem_id"]:
            raise DataError(
                f"eval set {eval_set.name}: the stored samples of problem {index} are of another problem; the data has "
                "changed since, so generate again"
            )
        responses = [Response(r["response"], r["tokens"], r["finish_reason"]) for r in rows]
        verdicts = await rewards.score(problem, responses, eval_set.source)
        for row, verdict in zip(rows, verdicts, strict=True):
            row |= {
                "answer": problem.answer,
                "value": verdict.value,
                "correct": verdict.correct,
                "parts": json.dumps(dict(verdict.parts)),
                "error": verdict.reward_error,
            }

    await asyncio.gather(*(one(index, rows) for index, rows in groups.items()))
    return pa.Table.from_pylist([row for rows in groups.values() for row in rows], SAMPLES_SCHEMA)
