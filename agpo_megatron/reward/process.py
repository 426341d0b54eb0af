"""One reward worker as its owner sees it: started, asked, and killed when it hangs."""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from agpo_megatron.reward.worker import IDLE, LOADING, PROGRESS

LINE_LIMIT = 2**26  # bytes of one reply
GRACE = 1.0  # seconds behind the worker's own alarm, which works where Python runs
LOOK_SECONDS = 0.25
LOAD_SECONDS = (
    300.0  # for a worker to start, and for a function to be imported (it may load a model)
)


@dataclass(slots=True)
class Answers:
    """The answers asked about together. ``ready`` is set once none of them is open."""

    open: int
    ready: asyncio.Future[None]


@dataclass(slots=True)
class Task:
    """One answer for one function. ``function`` and ``problem``: JSON, which tasks of a batch share. ``response``: JSON
    list of text, tokens, finish_reason. ``result``: what the worker answered; None while it is open."""

    function: str
    problem: str
    response: str
    asked: Answers
    result: Any = None

    @property
    def wanted(self) -> bool:
        """Return whether it is open and somebody still waits for it."""
        return self.result is None and not self.asked.ready.done()

    def settle(self, result: Any) -> None:
        if self.result is None:
            self.result = result
            self.asked.open -= 1
            if self.asked.open == 0 and not self.asked.ready.done():
                self.asked.ready.set_result(None)


@dataclass
class Lost(Exception):
    """A worker that hung or died. ``blamed``: the task it was on, if one is known. ``load``: it was importing."""

    cause: str
    error: str
    blamed: int | None
    load: bool = False


def encode(tasks: Sequence[Task]) -> bytes:
    """One batch as the line that worker.serve reads."""
    functions: dict[str, int] = {}
    problems: dict[str, int] = {}
    rows = [
        f"[{functions.setdefault(t.function, len(functions))},"
        f"{problems.setdefault(t.problem, len(problems))},{t.response[1:]}"
        for t in tasks
    ]
    parts = (",".join(names) for names in (functions, problems, rows))
    return '{{"functions":[{}],"problems":[{}],"tasks":[{}]}}\n'.format(*parts).encode()


@dataclass
class WorkerProcess:
    """A child that scores batches; it ends with ``kill``, and with this process. ``seconds``: limit of one answer."""

    seconds: float
    memory_mb: int
    _process: asyncio.subprocess.Process | None = field(default=None, init=False)
    _progress: mmap.mmap = field(init=False)

    async def ask(self, tasks: Sequence[Task]) -> None:
        """Set the result of every task. Raises Lost, the worker killed, when it hangs or dies."""
        try:
            if self._process is None:
                self._process = await self._start()
            await self._ask(self._process, tasks)
        except (ConnectionError, EOFError, ValueError) as error:
            index, _ = PROGRESS.unpack_from(self._progress)
            await self.kill()
            said = f" ({error})" if str(error) else ""
            blamed = index if 0 <= index < len(tasks) else None
            raise Lost("died", f"the worker died{said}", blamed, index == LOADING) from error
        except BaseException:
            await self.kill()  # cancelled half-way: its replies would be taken for the next batch's
            raise

    async def _start(self) -> asyncio.subprocess.Process:
        descriptor = os.memfd_create("reward-progress")
        try:
            os.ftruncate(descriptor, PROGRESS.size)
            self._progress = mmap.mmap(descriptor, PROGRESS.size)
            return await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "agpo_megatron.reward.worker",
                str(descriptor),
                str(self.seconds),
                str(self.memory_mb),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=LINE_LIMIT,
                pass_fds=(descriptor,),
            )
        finally:
            os.close(descriptor)

    async def _ask(self, process: asyncio.subprocess.Process, tasks: Sequence[Task]) -> None:
        assert process.stdin is not None and process.stdout is not None
        PROGRESS.pack_into(self._progress, 0, IDLE, time.monotonic())
        process.stdin.write(encode(tasks))
        open_tasks = set(range(len(tasks)))
        while open_tasks:
            for index, result in json.loads(await self._line(process.stdout)):
                open_tasks.discard(index)
                tasks[index].settle(result)

    async def _line(self, replies: asyncio.StreamReader) -> bytes:
        """The next reply. Raises Lost once the task under way is over its limit, EOFError when the worker died."""
        reading = asyncio.ensure_future(replies.readline())
        try:
            while True:
                index, begun = PROGRESS.unpack_from(self._progress)
                limit = LOAD_SECONDS if index in (IDLE, LOADING) else self.seconds + GRACE
                left = begun + limit - time.monotonic()
                if left <= 0:
                    error = f"no verdict in {self.seconds:g} s"
                    if index < 0:
                        error = f"not loaded in {limit:g} s"
                    raise Lost("timeout", error, index if index >= 0 else None, index == LOADING)
                # A worker that starts or loads may be on its first task, under another limit, a moment later.
                look = min(left, LOOK_SECONDS) if index < 0 else left
                done, _ = await asyncio.wait([reading], timeout=look)
                if done:
                    if not reading.result():
                        raise EOFError
                    return reading.result()
        finally:
            reading.cancel()

    async def kill(self) -> None:
        """End the worker, if there is one; the next ``ask`` starts another."""
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()
