"""Status of all processes as the controller knows it, for ``agpo-megatron status`` and the report of a failure."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

from agpo_megatron.cluster.start_folder import StartFolder, write_json
from agpo_megatron.controller.trainer_client import TrainerClient
from agpo_megatron.rollout.pool import RolloutPool
from agpo_megatron.wait import open_phases

WRITE_SECONDS = 2.0
PHASES_SHOWN = 8


class StatusWriter:
    """Writer of the start folder's ``status.json``, every few seconds; after a failure the last status before it stays.

    ``pool`` is set later than the trainers, and not in every mode.
    """

    def __init__(self, start: StartFolder, trainers: TrainerClient) -> None:
        self.pool: RolloutPool | None = None
        self._start, self._trainers = start, trainers
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._write_forever())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if error is None:
            await self._write()

    async def _write_forever(self) -> None:
        while True:
            await self._write()
            await asyncio.sleep(WRITE_SECONDS)

    async def _write(self) -> None:
        await asyncio.to_thread(write_json, self._start.status, self.snapshot())

    def snapshot(self) -> dict[str, Any]:
        """Return the status; times are seconds since the epoch."""
        now, clock = time.time(), time.monotonic()
        return {
            "time": now,
            "phases": [asdict(phase) for phase in open_phases()[:PHASES_SHOWN]],
            "command": self._trainers.command_under_way,
            "ranks": {
                str(rank): {
                    "phase": status.phase,
                    "since": status.since,
                    "last": status.last,
                    "heard": now - (clock - status.seen),
                }
                for rank, status in sorted(self._trainers.ranks.items())
            },
            "servers": [
                {
                    "url": server.url,
                    "state": server.state.value,
                    "since": now - (clock - server.since),
                    "in_flight": server.in_flight,
                    "reason": server.reason,
                }
                for server in (self.pool.servers if self.pool else [])
            ],
        }
