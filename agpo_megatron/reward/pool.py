"""Scores the responses to a problem: worker processes for functions, HTTP for remote ones, parts summed by weight."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

from agpo_megatron.config.task import PartConfig, RewardConfig
from agpo_megatron.reward.contract import Problem, Response
from agpo_megatron.reward.loading import REMOTE, RewardError
from agpo_megatron.reward.process import Answers, Lost, Task, WorkerProcess
from agpo_megatron.reward.remote import RemoteReward
from agpo_megatron.wait import waiting

log = logging.getLogger(__name__)
BATCH = 64  # answers in one message
WINDOW, FEWEST = (
    1024,
    64,
)  # last answers whose errors are compared with max_error_frac, and how many it takes


@dataclass(frozen=True)
class Verdict:
    """The worth of a response, with ``correct`` settled. ``cause``: "" or the kind of ``error`` that a part ended in
    (timeout, died, memory, recursion, exception, http); that part then counts as wrong, and so does the response."""

    value: float
    correct: bool
    parts: Mapping[str, float] = field(default_factory=dict)
    cause: str = ""
    error: str = ""

    @property
    def reward_error(self) -> str:
        """Why there is no verdict, as samples have it; "" if there is one."""
        return f"{self.cause}: {self.error}" if self.cause else ""


class RewardPool:
    """``async with RewardPool(config) as rewards``; workers end with the block, and with this process."""

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        count = config.workers or max(1, min(16, len(os.sched_getaffinity(0)) // 2))
        self._workers = [WorkerProcess(config.timeout, config.memory_mb) for _ in range(count)]
        self._tasks: asyncio.Queue[Task] = asyncio.Queue()
        self._serving: list[asyncio.Task[None]] = []
        self._remote: dict[str, RemoteReward] = {}
        self._recent: deque[str] = deque(maxlen=WINDOW)
        self._scoring, self._since, self._busy, self._taken = 0, 0.0, 0.0, 0.0

    async def __aenter__(self) -> Self:
        self._serving = [asyncio.create_task(self._serve(worker)) for worker in self._workers]
        return self

    async def __aexit__(self, *_: object) -> None:
        for serving in self._serving:
            serving.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        for worker in self._workers:
            await worker.kill()
        for remote in self._remote.values():
            await remote.close()

    async def check(self, rewards: Sequence[Sequence[PartConfig]]) -> None:
        """Load every function once, so that a wrong name ends the run before it generates. Raises RewardError."""
        for part in {p.model_dump_json(): p for parts in rewards for p in parts}.values():
            if part.name in REMOTE:
                self._remote_reward(part)
            else:
                (result,) = await self._ask(part, Problem([], "0"), [Response("")])
                _refuse_unloaded(part, result)

    async def score(
        self, problem: Problem, responses: Sequence[Response], parts: Sequence[PartConfig]
    ) -> list[Verdict]:
        """One verdict per response, all of them side by side.

        Raises RewardError when a function cannot be loaded, or when more than ``max_error_frac`` of the last answers
        ended in errors.
        """
        with self._busy_while(), waiting("rewards of a group"):
            found = await asyncio.gather(*(self._part(part, problem, responses) for part in parts))
        verdicts = [self._combined(parts, results) for results in zip(*found, strict=True)]
        for verdict, response in zip(verdicts, responses, strict=True):
            self._count(verdict, response)
        return verdicts

    def take_busy_seconds(self) -> float:
        """Wall seconds since the last call in which at least one group was being scored."""
        busy, self._busy = self._busy, 0.0
        self._taken += busy
        return busy

    @property
    def busy_seconds(self) -> float:
        """Wall seconds since the start in which at least one group was being scored."""
        now = time.monotonic() - self._since if self._scoring else 0.0
        return self._taken + self._busy + now

    @contextmanager
    def _busy_while(self) -> Iterator[None]:
        if self._scoring == 0:
            self._since = time.monotonic()
        self._scoring += 1
        try:
            yield
        finally:
            self._scoring -= 1
            if self._scoring == 0:
                self._busy += time.monotonic() - self._since

    def _combined(self, parts: Sequence[PartConfig], results: Sequence[Any]) -> Verdict:
        """The weighted sum of the parts; correct if none of them says it is not, and one says it is or the value is
        high enough."""
        value, said, named = 0.0, [], {}
        cause = error = ""
        for part, name, result in zip(parts, _metric_names(parts), results, strict=True):
            if isinstance(result, dict):
                cause, error = result["cause"], result["error"]
                value += part.weight * self._config.wrong
                continue
            partial, correct, inner = result
            if partial is None:  # right or wrong, and nothing else
                partial = self._config.correct if correct else self._config.wrong
            value += part.weight * partial
            if correct is not None:
                said.append(correct)
            if name:
                named[name] = partial
            named |= {f"{name}/{key}" if name else key: number for key, number in inner.items()}
        right = all(said) if said else value >= self._config.correct_at
        return Verdict(value, right and not cause, named, cause, error)

    def _count(self, verdict: Verdict, response: Response) -> None:
        self._recent.append(verdict.cause)
        if not verdict.cause:
            return
        log.warning("reward: %s: %s; response %.200r", verdict.cause, verdict.error, response.text)
        errors = Counter(cause for cause in self._recent if cause)
        share = errors.total() / len(self._recent)
        if len(self._recent) >= FEWEST and share > self._config.max_error_frac:
            raise RewardError(
                f"{share:.0%} of the last {len(self._recent)} answers ended in an error of the reward "
                f"({dict(errors)}), more than reward.max_error_frac {self._config.max_error_frac:g}; "
                f"the last one: {verdict.error}"
            )

    async def _part(
        self, part: PartConfig, problem: Problem, responses: Sequence[Response]
    ) -> list[Any]:
        if part.name in REMOTE:
            return await self._remote_reward(part).score(problem, responses)
        results = await self._ask(part, problem, responses)
        for result in results:
            _refuse_unloaded(part, result)
        return results

    def _remote_reward(self, part: PartConfig) -> RemoteReward:
        key = part.model_dump_json()
        if key not in self._remote:
            self._remote[key] = RemoteReward(part.name, part.options)
        return self._remote[key]

    async def _ask(
        self, part: PartConfig, problem: Problem, responses: Sequence[Response]
    ) -> list[Any]:
        function = json.dumps([part.name, dict(part.options)])
        shown = json.dumps(
            {
                "messages": list(problem.messages),
                "answer": problem.answer,
                "source": problem.source,
                "fields": problem.fields,
            },
            default=str,
        )
        asked = Answers(len(responses), asyncio.get_running_loop().create_future())
        tasks = [
            Task(function, shown, json.dumps([r.text, r.tokens, r.finish_reason]), asked)
            for r in responses
        ]
        for task in tasks:
            self._tasks.put_nowait(task)
        await asked.ready
        return [task.result for task in tasks]

    async def _serve(self, worker: WorkerProcess) -> None:
        """Give ``worker`` its share of what waits, again and again."""
        while True:
            tasks = [await self._tasks.get()]
            share = min(BATCH, math.ceil((self._tasks.qsize() + 1) / len(self._workers)))
            while len(tasks) < share and not self._tasks.empty():
                tasks.append(self._tasks.get_nowait())
            tasks = [task for task in tasks if task.wanted]
            try:
                if tasks:
                    await worker.ask(tasks)
            except Lost as lost:
                self._settle(tasks, lost)

    def _settle(self, tasks: Sequence[Task], lost: Lost) -> None:
        """The answer that a worker was lost on has its error; the others of its batch are asked again."""
        blamed = tasks if lost.blamed is None else [tasks[lost.blamed]]
        for task in blamed:
            task.settle({"cause": "load" if lost.load else lost.cause, "error": lost.error})
        for task in tasks:
            if task.wanted:
                self._tasks.put_nowait(task)


def _metric_names(parts: Sequence[PartConfig]) -> list[str]:
    """Name of each part in the metrics: "" for a reward of one part; those of one function are numbered from 1."""
    if len(parts) == 1:
        return [""]
    names = [part.name.rpartition(":")[2] for part in parts]
    return [
        name if names.count(name) == 1 else f"{name}{names[: i + 1].count(name)}"
        for i, name in enumerate(names)
    ]


def _refuse_unloaded(part: PartConfig, result: Any) -> None:
    if isinstance(result, dict) and result["cause"] == "load":
        raise RewardError(f"reward {part.name}: {result['error']}")
