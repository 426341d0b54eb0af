"""Verification in killable worker processes: a hanging answer costs one worker and its deadline, never the run."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

from agpo_megatron.config.schema import RewardConfig
from agpo_megatron.samples import Group
from agpo_megatron.wait import waiting

log = logging.getLogger(__name__)
WORKERS = 2
LINE_LIMIT = 2**24  # bytes of one message


@dataclass(frozen=True)
class Verdict:
    """``error`` is "" unless verification failed, timed out or died; then ``correct`` is False."""

    correct: bool
    error: str = ""


class RewardPool:
    """``async with RewardPool(config) as rewards``; workers end with the block, and with this process."""

    def __init__(
        self, config: RewardConfig, command: Sequence[str] | None = None, workers: int = WORKERS
    ) -> None:
        self._config = config
        self._command = list(command or [sys.executable, "-m", "agpo_megatron.reward.worker"])
        self._idle: asyncio.Queue[asyncio.subprocess.Process | None] = asyncio.Queue()
        for _ in range(workers):
            self._idle.put_nowait(None)  # started when first needed
        self._started: set[asyncio.subprocess.Process] = set()
        self._verifying, self._since, self._busy = 0, 0.0, 0.0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for worker in list(self._started):
            await self._kill(worker)

    async def score_group(self, group: Group) -> Group:
        """The group with ``accuracy`` 1.0 or 0.0 in every sample, and ``reward_error`` where verification failed."""
        with self._busy_while():
            verdicts = [
                await self.verify(group.prompt.answer, sample.text) for sample in group.samples
            ]
        samples = [
            replace(sample, accuracy=float(verdict.correct), reward_error=verdict.error)
            for sample, verdict in zip(group.samples, verdicts, strict=True)
        ]
        return Group(group.prompt, samples)

    @contextmanager
    def _busy_while(self) -> Iterator[None]:
        if self._verifying == 0:
            self._since = time.monotonic()
        self._verifying += 1
        try:
            yield
        finally:
            self._verifying -= 1
            if self._verifying == 0:
                self._busy += time.monotonic() - self._since

    def take_busy_seconds(self) -> float:
        """Wall seconds since the last call in which at least one group was being verified."""
        busy, self._busy = self._busy, 0.0
        return busy

    async def verify(self, answer: str, response: str) -> Verdict:
        """One answer, under ``reward.timeout``; a worker that hangs or dies is replaced."""
        with waiting("a free reward worker"):
            worker = await self._idle.get()
        try:
            if worker is None:
                worker = await self._start()
            task = {"verifier": self._config.verifier, "answer": answer, "response": response}
            with waiting("reward verification", self._config.timeout):
                async with asyncio.timeout(self._config.timeout):
                    reply = await self._ask(worker, json.dumps(task))
        except (TimeoutError, ConnectionError, EOFError, ValueError) as error:
            if worker is not None:
                await self._kill(worker)
            worker = None
            timed_out = isinstance(error, TimeoutError)
            why = f"no verdict in {self._config.timeout} s" if timed_out else "the worker died"
            reply = {"error": why}
        except BaseException:
            # Cancelled half-way: its verdict is still to come, and would be taken for the next answer's.
            if worker is not None:
                worker.kill()
            worker = None
            raise
        finally:
            self._idle.put_nowait(worker)
        if "error" in reply:
            log.warning(
                "reward: %s; the answer scores reward.wrong: %.200r", reply["error"], response
            )
            return Verdict(False, str(reply["error"]))
        return Verdict(bool(reply["correct"]))

    async def _start(self) -> asyncio.subprocess.Process:
        worker = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LINE_LIMIT,
        )
        self._started.add(worker)
        return worker

    async def _ask(self, worker: asyncio.subprocess.Process, line: str) -> dict[str, object]:
        assert worker.stdin is not None and worker.stdout is not None
        worker.stdin.write(line.encode() + b"\n")
        await worker.stdin.drain()
        answer = await worker.stdout.readline()
        if not answer:
            raise EOFError
        reply: dict[str, object] = json.loads(answer)
        return reply

    async def _kill(self, worker: asyncio.subprocess.Process) -> None:
        self._started.discard(worker)
        if worker.returncode is None:
            worker.kill()
        await worker.wait()
