"""``python -m agpo_megatron.reward.worker FD SECONDS MEMORY_MB``: scores batches from stdin, one JSON object a line.

A batch is ``{"functions": [[name, options], ...], "problems": [{...}, ...], "tasks": [[function, problem, text,
tokens, finish_reason], ...]}``; the reply is written as lines ``[[index, result], ...]``, where a result is ``[value,
correct, parts]`` (value null: the function returned True or False) or ``{"cause", "error"}``. Which task is under way
since when stands in the memory behind ``FD``, so that the owner, who kills a worker that hangs, knows which answer it
was.

Limits: an alarm ends a task after SECONDS where Python still runs; the owner kills where it does not. MEMORY_MB bounds
private memory. Ends when its owner closes stdin or dies. Imports nothing heavy by itself.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import resource
import signal
import struct
import sys
import time
from typing import Any, TextIO

from agpo_megatron.reward.contract import Problem, Response, as_reward
from agpo_megatron.reward.loading import RewardError, RewardFunction, load_reward

PR_SET_PDEATHSIG = 1
PROGRESS = struct.Struct("=id")
"""Index of the task under way, and when it was begun (time.monotonic, one clock for all processes)."""
IDLE, LOADING = -1, -2  # no task yet (the owner writes it with the batch); importing a function
FLUSH_SECONDS = 0.05  # results are held back this long at most, to be written together


class Expired(BaseException):
    """The alarm. Not an Exception: what is verified here catches those."""


def main() -> None:
    """Serve until stdin ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the owner's to treat
    descriptor, seconds, megabytes = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    limit = megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    sys.set_int_max_str_digits(5000)
    progress = mmap.mmap(descriptor, PROGRESS.size)
    # What a reward function prints goes to the log, not between the replies.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGALRM, _expire)
    functions: dict[str, RewardFunction] = {}
    for line in sys.stdin:
        serve(json.loads(line), functions, seconds, progress, replies)


def _expire(*_: object) -> None:
    raise Expired


def serve(
    batch: dict[str, Any],
    functions: dict[str, RewardFunction],
    seconds: float,
    progress: mmap.mmap,
    replies: TextIO,
) -> None:
    """Score one batch. ``functions``: those loaded so far, by their JSON."""
    problems = [Problem(**problem) for problem in batch["problems"]]
    names = [json.dumps(function) for function in batch["functions"]]
    done: list[tuple[int, Any]] = []
    flushed = time.monotonic()
    for index, (function, problem, *response) in enumerate(batch["tasks"]):
        now = time.monotonic()
        PROGRESS.pack_into(progress, 0, index, now)
        if done and now - flushed > FLUSH_SECONDS:
            _write(replies, done)
            done, flushed = [], now
        name = names[function]
        if name not in functions:
            PROGRESS.pack_into(progress, 0, LOADING, now)
            try:
                functions[name] = load_reward(*batch["functions"][function])
            except RewardError as error:
                done.append((index, {"cause": "load", "error": str(error)}))
                continue
            PROGRESS.pack_into(progress, 0, index, time.monotonic())
        done.append(
            (index, score(functions[name], problems[problem], Response(*response), seconds))
        )
    _write(replies, done)


def _write(replies: TextIO, done: list[tuple[int, Any]]) -> None:
    replies.write(json.dumps(done) + "\n")
    replies.flush()


def score(function: RewardFunction, problem: Problem, response: Response, seconds: float) -> Any:
    """Return the verdict of ``function``, or why there is none, ready for JSON."""
    try:
        # Again and again: the first may meet code that swallows every exception.
        signal.setitimer(signal.ITIMER_REAL, seconds, 0.2)
        try:
            result = function(problem, response)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        reward = as_reward(result)
    except Expired:
        return {"cause": "timeout", "error": f"no verdict in {seconds:g} s"}
    except MemoryError:
        return {"cause": "memory", "error": "the worker's memory limit (reward.memory_mb)"}
    except RecursionError:
        return {"cause": "recursion", "error": "nested too deeply"}
    except Exception as error:
        return {"cause": "exception", "error": f"{type(error).__name__}: {error}"[:500]}
    value = (
        None if isinstance(result, bool) else reward.value
    )  # what a verdict is worth, the owner knows
    return [value, reward.correct, reward.parts]


if __name__ == "__main__":
    main()
