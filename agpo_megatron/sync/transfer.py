"""One pass of a publish over some servers: who is still part of it, and how long each call may take."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from agpo_megatron.rollout.client import ServerError
from agpo_megatron.rollout.pool import RolloutPool
from agpo_megatron.rollout.servers import Server
from agpo_megatron.samples import WeightVersion
from agpo_megatron.sync.messages import PublishReport

log = logging.getLogger(__name__)
CALL_SHARE = 1 / 3
"""Part of the pass's remaining time for one call, so that a server that hangs in it leaves time for the others."""


@dataclass
class Transfer:
    """``version``: what is sent. ``deadline``: of the pass, monotonic seconds. ``keep_running``: nothing is aborted.
    ``failed``: server -> why; such a one takes no further part, and is QUARANTINED or DEAD."""

    pool: RolloutPool
    servers: list[Server]
    version: WeightVersion
    deadline: float
    keep_running: bool = False
    failed: dict[Server, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    report: PublishReport | None = None
    probe_diff: float = 0.0

    @property
    def left(self) -> list[Server]:
        return [s for s in self.servers if s not in self.failed]

    @property
    def seconds_left(self) -> float:
        return max(0.1, self.deadline - time.monotonic())

    @property
    def call_seconds(self) -> float:
        return max(0.1, CALL_SHARE * self.seconds_left)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    async def each(self, call: Callable[[Server], Awaitable[object]]) -> None:
        """``call(server)`` on all servers left, at once; one that fails leaves the transfer."""

        async def guarded(server: Server) -> None:
            try:
                await call(server)
            except ServerError as error:
                await self.fail(server, str(error), dead=error.status == 0)

        await asyncio.gather(*(guarded(server) for server in self.left))

    async def fail(self, server: Server, reason: str, dead: bool = False) -> None:
        log.error("publish: %s leaves the transfer: %s", server.url, reason)
        self.failed[server] = reason
        server.torn += 1
        await (self.pool.give_up if dead else self.pool.quarantine)(server, reason)
