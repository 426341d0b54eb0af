"""No unexplained wait: every blocking call runs under a name and a deadline.

``with waiting("publish: broadcast of stage 0", 60):`` records the current phase of this process (read by heartbeats
and reports) and, for asyncio code, ``async with waiting_async(...)`` also enforces the deadline. Synchronous code
passes ``seconds`` on to the call that blocks and turns its timeout into ``WaitExpired`` by raising inside the block.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass


class WaitExpired(TimeoutError):
    """A named wait passed its deadline."""

    def __init__(self, name: str, seconds: float, detail: str = "") -> None:
        self.name, self.seconds = name, seconds
        super().__init__(f"waited {seconds:.1f} s for {name}" + (f" ({detail})" if detail else ""))


@dataclass(frozen=True)
class Phase:
    """A thing that this process waits for or does, and since when (``time.time()``)."""

    name: str
    since: float
    deadline: float | None = None


_lock = threading.Lock()
_open: dict[
    int, Phase
] = {}  # in the order they were opened; thousands of requests may wait at once
_numbers = itertools.count()
_last = ""


def current_phase() -> Phase:
    """Return the innermost open phase of this process; "idle" when there is none."""
    with _lock:
        return next(reversed(_open.values())) if _open else Phase("idle", time.time())


def open_phases() -> list[Phase]:
    """List everything that this process does or waits for, oldest first."""
    with _lock:
        return list(_open.values())


def last_finished() -> str:
    """Name the phase that ended last; "" when there was none. For a rank that hangs it is the last it got through."""
    with _lock:
        return _last


@contextmanager
def waiting(name: str, seconds: float | None = None) -> Iterator[Phase]:
    """Record ``name`` as a phase. A ``TimeoutError`` from inside becomes ``WaitExpired`` with the name."""
    now = time.time()
    phase = Phase(name, now, None if seconds is None else now + seconds)
    number = next(_numbers)
    with _lock:
        _open[number] = phase
    try:
        yield phase
    except WaitExpired:
        raise
    except TimeoutError as error:
        raise WaitExpired(name, time.time() - now, str(error)) from error
    finally:
        global _last
        with _lock:
            del _open[number]
            _last = name


@asynccontextmanager
async def waiting_async(name: str, seconds: float) -> AsyncIterator[Phase]:
    """Record a phase like ``waiting``; after ``seconds`` the block is cancelled and ``WaitExpired`` raised."""
    with waiting(name, seconds) as phase:
        async with asyncio.timeout(seconds):
            yield phase
