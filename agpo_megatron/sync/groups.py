"""The controller's end of the update groups: one per pipeline stage, of the trainer's source and all servers' ranks."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping, Sequence

from agpo_megatron.rollout.client import ServerError
from agpo_megatron.rollout.servers import Server
from agpo_megatron.sync.messages import TrainerPublishing, group_name
from agpo_megatron.sync.transfer import Transfer

log = logging.getLogger(__name__)


class UpdateGroups:
    """Opens groups for exactly the servers of a transfer; they stay open while those stay the same.

    A group never loses or gains a member: other members get groups of another epoch, whose name is part of theirs.
    """

    def __init__(self, trainer: TrainerPublishing, server_ranks: int, backend: str) -> None:
        self._trainer, self._server_ranks, self._backend = trainer, server_ranks, backend
        self._servers: tuple[Server, ...] = ()  # of groups that are open at every end, else none
        self._joined: dict[Server, list[str]] = {}
        self._name = f"publish-{secrets.token_hex(4)}"  # a server never takes a group name twice
        self._epochs = 0

    def name(self, stage: int) -> str:
        return group_name(f"{self._name}-epoch{self._epochs}", stage)

    def forget(self) -> None:
        """One end may have closed its groups: the next transfer opens new ones."""
        self._servers = ()

    async def open(self, run: Transfer) -> None:
        """A server that does not join leaves the transfer, and the others try again without it."""
        if tuple(run.left) == self._servers:
            return
        await run.each(lambda server: self.leave(server, run))
        stuck: dict[asyncio.Task[None], Server] = {}
        tried: list[Server] = []
        try:
            while run.left:
                servers = run.left
                self._epochs += 1
                addresses = await self._trainer.publish_open(
                    f"{self._name}-epoch{self._epochs}", self._world_size(servers), run.seconds_left
                )
                if tried:
                    await self._settle(stuck, run)
                if run.left == tried:
                    for server in tried:
                        await run.fail(server, "its update groups did not open in time")
                elif run.left == servers:
                    tried = servers
                    stuck = await self._join_all(servers, addresses, run)
                    if run.left == servers and not stuck:
                        self._servers = tuple(servers)
                        return
        finally:
            for task in stuck:
                task.cancel()

    async def leave(self, server: Server, run: Transfer) -> None:
        for name in self._joined.pop(server, []):
            try:
                await server.client.destroy_group(name, run.call_seconds)
            except ServerError as error:
                if error.status == 0:
                    raise
                log.debug("publish: %s", error)  # a restarted server does not know the group

    def _world_size(self, servers: Sequence[Server]) -> int:
        return 1 + len(servers) * self._server_ranks

    async def _join_all(
        self, servers: Sequence[Server], addresses: Mapping[int, tuple[str, int]], run: Transfer
    ) -> dict[asyncio.Task[None], Server]:
        """Join stage by stage, until a server fails to; returns the calls that then still wait for it."""
        for stage, address in sorted(addresses.items()):
            joins = {
                asyncio.create_task(self._join(server, index, stage, address, servers, run)): server
                for index, server in enumerate(servers)
            }
            try:
                done, waiting = await asyncio.wait(
                    joins, timeout=run.call_seconds, return_when=asyncio.FIRST_EXCEPTION
                )
            except asyncio.CancelledError:
                for task in joins:
                    task.cancel()
                raise
            failed = False
            for task in done:
                failed |= await self._failed(task, joins[task], run, blame=True)
            if failed or waiting:
                return {task: joins[task] for task in waiting}
        return {}

    async def _join(
        self,
        server: Server,
        index: int,
        stage: int,
        address: tuple[str, int],
        servers: Sequence[Server],
        run: Transfer,
    ) -> None:
        self._joined.setdefault(server, []).append(self.name(stage))
        await server.client.init_group(
            self.name(stage),
            address,
            1 + index * self._server_ranks,
            self._world_size(servers),
            self._backend,
            run.seconds_left,
        )

    async def _settle(self, stuck: dict[asyncio.Task[None], Server], run: Transfer) -> None:
        """After a failed opening: the trainer has closed its end, which releases the servers that waited in vain.

        That is their call's error, and no failure of theirs; one that still does not answer is the one that hangs.
        """
        if stuck:
            done, unanswered = await asyncio.wait(stuck, timeout=run.call_seconds)
            for task in done:
                await self._failed(task, stuck[task], run, blame=False)
            for task in unanswered:
                task.cancel()
                await run.fail(stuck[task], "hangs while it joins its update group", dead=True)
            stuck.clear()
        await run.each(lambda server: self.leave(server, run))

    async def _failed(
        self, task: asyncio.Task[None], server: Server, run: Transfer, blame: bool
    ) -> bool:
        """Return whether the join raised. Its server then leaves the transfer, if to ``blame`` or gone."""
        error = task.exception()
        if error is None:
            return False
        if not isinstance(error, ServerError):
            raise error
        if blame or error.status == 0:
            await run.fail(server, str(error), dead=error.status == 0)
        return True
