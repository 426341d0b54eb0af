"""Room for samples on the servers, given out one request after the other: the lowest priority number first.

A request that finds no room waits as one future in a heap; whoever makes room hands it on. Nobody polls, and a change
wakes only those who can go on: with thousands of groups waiting, each costs a few microseconds.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agpo_megatron.rollout.servers import Server

BESIDE_SHARE = 8
"""An evaluation beside training has slots of its own: this part of ``rollout.max_in_flight``, in addition to it."""
Priority = tuple[int, int]
"""(prompt position, index of the sample): the request that a batch needs first comes first."""


def slots_beside(max_in_flight: int) -> int:
    """Slots of a server for an evaluation beside training."""
    return -(-max_in_flight // BESIDE_SHARE)


@dataclass(order=True)
class _Waiter:
    priority: Priority
    number: int
    samples: int = field(compare=False)
    avoid: Collection[Server] = field(compare=False)
    prefer: Server | None = field(compare=False)
    room: asyncio.Future[Server] = field(compare=False)


class Slots:
    """``limit``: samples at once on each server; a request for more goes to an idle server. ``ready``: lists the
    servers that may be given out now, none while dispatch is closed. ``none_ready``: called when somebody waits
    while there are none."""

    def __init__(
        self,
        limit: int,
        ready: Callable[[], Collection[Server]],
        none_ready: Callable[[], None],
    ) -> None:
        self.limit = limit
        self._ready, self._none_ready = ready, none_ready
        self._used: dict[Server, int] = {}
        self._waiters: list[_Waiter] = []
        self._numbers = itertools.count()
        self._offering = False
        self._since = time.monotonic()
        self._slot_seconds = self._server_seconds = self._taken = 0.0

    async def acquire(
        self,
        samples: int,
        priority: Priority,
        *,
        avoid: Collection[Server] = (),
        prefer: Server | None = None,
    ) -> Server:
        """Reserve room for ``samples`` on ``prefer`` if it has some, else on the least loaded server, not in
        ``avoid`` if possible. Each call needs one ``release``."""
        room: asyncio.Future[Server] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(priority, next(self._numbers), samples, avoid, prefer, room)
        heapq.heappush(self._waiters, waiter)
        self._offer_soon()
        if not room.done() and not self._ready():
            self._none_ready()
        try:
            return await room
        except asyncio.CancelledError:
            if room.done() and not room.cancelled() and room.exception() is None:
                self.release(room.result(), samples)
            else:
                self.offer()  # it may have been the first, in front of a smaller one that fits
            raise

    def release(self, server: Server, samples: int) -> None:
        self._count(server, -samples)
        self._offer_soon()

    def used(self, server: Server) -> int:
        """Number of samples in flight on ``server``."""
        return self._used.get(server, 0)

    @property
    def waiting(self) -> int:
        return len(self._waiters)

    def offer(self) -> None:
        """Hand room to those who wait, in order; to be called whenever a server may have become available."""
        ready = self._ready()
        while self._waiters and ready:
            waiter = self._waiters[0]
            if not waiter.room.done():
                server = self._choose(waiter, ready)
                if server is None:
                    return
                self._count(server, waiter.samples)
                waiter.room.set_result(server)
            heapq.heappop(self._waiters)

    def _offer_soon(self) -> None:
        """Offer when those who were just given an answer have asked for more: a response goes on where its prefix is in
        the cache, before a later one takes that room. All samples of a group ask within two turns of the loop."""
        if not self._offering:
            self._offering = True
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, self._offer_now)

    def _offer_now(self) -> None:
        self._offering = False
        self.offer()

    def fail(self, error: Exception) -> None:
        """Let every waiting ``acquire`` raise ``error``."""
        for waiter in self._waiters:
            if not waiter.room.done():
                waiter.room.set_exception(error)
        self._waiters.clear()

    def take_usage(self) -> tuple[float, float]:
        """Return seconds since the last call, summed: of samples in flight, and of servers with any in flight."""
        self._integrate()
        self._taken += self._server_seconds
        usage, self._slot_seconds, self._server_seconds = (
            (self._slot_seconds, self._server_seconds),
            0.0,
            0.0,
        )
        return usage

    @property
    def busy_seconds(self) -> float:
        """Seconds since the start, summed, of servers with any samples in flight."""
        self._integrate()
        return self._taken + self._server_seconds

    def _choose(self, waiter: _Waiter, ready: Collection[Server]) -> Server | None:
        def fits(server: Server) -> bool:
            used = self.used(server)
            return used + waiter.samples <= self.limit or not used

        candidates = [s for s in ready if s not in waiter.avoid] or list(ready)
        best = min(candidates, key=self.used)
        own = waiter.prefer
        # It has the prefix in its cache; but a server that has come back must not stay idle beside a full one.
        if own in candidates and fits(own) and self.used(own) <= 2 * self.used(best) + 1:
            return own
        return best if fits(best) else None

    def _count(self, server: Server, samples: int) -> None:
        self._integrate()
        self._used[server] = self.used(server) + samples
        server.in_flight += samples

    def _integrate(self) -> None:
        now = time.monotonic()
        used = self._used.values()
        self._slot_seconds += sum(used) * (now - self._since)
        self._server_seconds += sum(map(bool, used)) * (now - self._since)
        self._since = now
