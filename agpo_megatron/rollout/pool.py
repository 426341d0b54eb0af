"""All rollout servers of a run: their states (servers.py), the dispatch of requests to them, and publishes' hold on it.

A publish begins by clearing the weight version of every server (``retire_versions``), whatever its state; only a
complete transfer sets it again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from typing import Self

from agpo_megatron.config.schema import RolloutConfig
from agpo_megatron.rollout.client import Sampling, ServerClient, ServerError
from agpo_megatron.rollout.group_rollout import Counts, Terms, roll_out
from agpo_megatron.rollout.servers import Server, State
from agpo_megatron.rollout.slots import Slots, slots_beside
from agpo_megatron.samples import Fragment, Group, Ints, Prompt
from agpo_megatron.wait import WaitExpired, waiting_async

log = logging.getLogger(__name__)
PROBE_SECONDS = 0.5
PROBE_SECONDS_MAX = 5.0


class RolloutPool:
    """Dispatcher of groups to the servers; ``async with`` starts and ends its probing of servers.

    ``decode(tokens, special)`` turns response tokens into text ("" without it), with or without special tokens.
    ``seed``: of all sampling, where servers infer deterministically.
    ``refresh`` (set by the publisher) brings a quarantined server up to date between publishes, e.g. after its
    restart. ``end_hung`` has the process of the server of that number killed and started again, for one that would
    never come back by itself.
    """

    def __init__(
        self,
        clients: Sequence[ServerClient],
        config: RolloutConfig,
        decode: Callable[[Ints, bool], str] | None = None,
        seed: int | None = None,
    ) -> None:
        self.servers = [Server(client) for client in clients]
        self.refresh: Callable[[Server], Awaitable[None]] | None = None
        self.end_hung: Callable[[int], None] | None = None
        self.counts = Counts()
        beside = slots_beside(config.max_in_flight)
        self.slots = Slots(config.max_in_flight, self._ready, self._watch_over)
        self.slots_beside = Slots(beside, self._ready, self._watch_over)
        self._config = config
        self._changed = asyncio.Condition()
        self._open = True
        self._none_ready_since = time.monotonic()
        self._watch: asyncio.TimerHandle | None = None
        self._probes: list[asyncio.Task[None]] = []
        self._terms = Terms(
            Sampling(config.max_response_tokens, config.temperature, stop=tuple(config.stop)),
            config.fragment_tokens,
            config.attempts,
            self.slots,
            decode or (lambda tokens, special: ""),
            self.mark_dead,
            self.counts,
            seed,
        )

    async def __aenter__(self) -> Self:
        self._probes = [asyncio.create_task(self._probe(server)) for server in self.servers]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._probes:
            task.cancel()
        await asyncio.gather(*self._probes, return_exceptions=True)
        if self._watch:
            self._watch.cancel()

    def report(self) -> str:
        """Return one line with the state of every server and its reason."""
        return "; ".join(str(server) for server in self.servers)

    async def wait_alive(self, at_least: int | None = None, seconds: float | None = None) -> None:
        """Wait until ``at_least`` servers (default: all) have generated; WaitExpired lists those that have not."""
        wanted = len(self.servers) if at_least is None else at_least
        seconds = self._config.start_timeout if seconds is None else seconds
        name = f"{wanted} of {len(self.servers)} rollout server(s) to generate"
        try:
            async with waiting_async(name, seconds), self._changed:
                await self._changed.wait_for(lambda: sum(s.alive for s in self.servers) >= wanted)
        except WaitExpired:
            raise WaitExpired(name, seconds, self.report()) from None

    def serve_as_started(self) -> None:
        """Let servers serve the weights they were started with, without a publisher (evaluation of a checkpoint)."""

        async def trust(server: Server) -> None:
            await self.mark_ready(server, await server.client.weight_version())

        self.refresh = trust

    # Generation

    async def generate_group(
        self,
        prompt: Prompt,
        known: Sequence[Fragment] = (),
        keep: Callable[[Fragment], None] = lambda fragment: None,
    ) -> Group:
        """Generate ``group_size`` samples at the configured temperature, from ``known`` fragments on. ``keep`` is
        called with each new one. Raises as ``roll_out``."""
        terms = replace(self._terms, keep=keep)
        return await roll_out(prompt, self._config.group_size, terms, known)

    async def sample(
        self,
        prompt: Prompt,
        n: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_tokens: int | None = None,
        beside: bool = False,
    ) -> Group:
        """Generate ``n`` samples for an evaluation, greedy by default; ``max_tokens`` None: as in training. ``beside``:
        training goes on meanwhile, so use the slots kept for this. Raises as ``roll_out``."""
        limit = max_tokens or self._config.max_response_tokens
        sampling = replace(
            self._terms.sampling, max_new_tokens=limit, temperature=temperature, top_p=top_p
        )
        slots = self.slots_beside if beside else self.slots
        terms = replace(self._terms, sampling=sampling, slots=slots, counts=Counts())
        return await roll_out(prompt, n, terms)

    def _ready(self) -> Collection[Server]:
        if not self._open:
            return ()
        return [server for server in self.servers if server.state is State.READY]

    def _offer(self) -> None:
        """Hand out what room there is now."""
        self._watch_over()
        self.slots.offer()
        self.slots_beside.offer()

    def _watch_over(self) -> None:
        """See to it that nobody waits for ever for a server to become ready. Other waits have no deadline here: they
        end with requests and publishes, which have their own."""
        if self._watch:
            self._watch.cancel()
            self._watch = None
        if self._open and not self._ready():
            left = self._none_ready_since + self._config.start_timeout - time.monotonic()
            self._watch = asyncio.get_running_loop().call_later(max(0.0, left), self._give_up)

    def _give_up(self) -> None:
        name = "a rollout server to become ready"
        error = WaitExpired(name, self._config.start_timeout, self.report())
        self.slots.fail(error)
        self.slots_beside.fail(error)

    # Dispatch, which a publish closes

    @property
    def dispatch_open(self) -> bool:
        return self._open

    async def close_dispatch(self) -> None:
        """Hold all new requests until ``open_dispatch``; those in flight go on."""
        await self._set_open(False)

    async def open_dispatch(self) -> None:
        await self._set_open(True)

    async def _set_open(self, value: bool) -> None:
        async with self._changed:
            self._open = value
            self._none_ready_since = max(self._none_ready_since, time.monotonic())
            self._offer()

    async def drain(self, servers: Sequence[Server], seconds: float) -> None:
        """Abort the running requests of ``servers`` (their samples are continued later); return when nothing is in
        flight.

        Repeated aborts catch requests that were on their way at the first one. A server that does not end its samples
        within ``seconds`` is then DEAD, so that it cannot block a publish.
        """
        for server in servers:
            server.draining = True
        try:
            async with waiting_async("requests in flight to end", seconds):
                while busy := [s for s in servers if s.in_flight and s.alive]:
                    await asyncio.gather(*(self._abort(server, seconds / 2) for server in busy))
                    await self._until_empty(busy)
        except WaitExpired as expired:
            for server in servers:
                if server.in_flight and server.alive:
                    await self.mark_dead(server, str(expired))
        finally:
            for server in servers:
                server.draining = False

    async def _until_empty(self, servers: Sequence[Server]) -> None:
        """Wait a tenth of a second at most."""
        for _ in range(20):
            if not any(server.in_flight for server in servers):
                return
            await asyncio.sleep(0.005)

    async def _abort(self, server: Server, seconds: float) -> None:
        try:
            if server.paused:
                await server.client.continue_generation(seconds)
                server.paused = False
            await server.client.abort_all(seconds)
        except ServerError as error:
            if error.status == 0:
                await self.mark_dead(server, str(error))

    # States

    async def retire_versions(self, reason: str) -> None:
        """Clear all versions for new weights: no server, not even a DEAD one, serves before it has received them."""
        async with self._changed:
            for server in self.servers:
                if server.state is State.READY:
                    self._set(server, State.QUARANTINED, reason, "")
                server.version = ""

    async def quarantine(self, server: Server, reason: str) -> None:
        await self._move(server, State.QUARANTINED, reason, version="")

    async def mark_ready(self, server: Server, version: str) -> None:
        """Set READY: all weights of ``version`` are in place."""
        await self._move(server, State.READY, "", version=version)

    async def mark_dead(self, server: Server, reason: str) -> None:
        await self._move(server, State.DEAD, reason, version=server.version)

    async def give_up(self, server: Server, reason: str) -> None:
        """DEAD, and ended where that can be asked for: it did not answer in the middle of a publish."""
        await self.mark_dead(server, reason)
        if self.end_hung is not None:
            self.end_hung(self.servers.index(server))

    async def _move(self, server: Server, state: State, reason: str, version: str) -> None:
        async with self._changed:
            self._set(server, state, reason, version)

    def _set(self, server: Server, state: State, reason: str, version: str) -> None:
        """Set the state; ``self._changed`` must be held."""
        if server.state is not state:
            log.info("rollout server %s -> %s (%s)", server, state.value, reason)
            server.since = time.monotonic()
            lost = server.state is State.READY
            if lost and sum(s.state is State.READY for s in self.servers) == 1:
                self._none_ready_since = time.monotonic()
        server.state, server.reason, server.version = state, reason, version
        self._changed.notify_all()
        self._offer()

    async def _probe(self, server: Server) -> None:
        """Bring a server that is not READY towards READY, one state at a time, for ever."""
        pause = PROBE_SECONDS
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: server.state is not State.READY)
            try:
                if server.alive:
                    pause = min(2 * pause, PROBE_SECONDS_MAX)
                    if self.refresh is not None:
                        await self.refresh(server)
                else:
                    pause = PROBE_SECONDS
                    await self._revive(server)
            except ServerError as error:
                if server.alive and error.status == 0:
                    await self.mark_dead(server, str(error))
            except Exception:  # in a refresh, e.g. a failed trainer, which ends the run elsewhere
                log.exception("bringing %s up to date failed; trying again", server.url)
            await asyncio.sleep(pause)

    async def _revive(self, server: Server) -> None:
        await server.client.ready()
        held = await server.client.weight_version()
        async with self._changed:  # atomic with the comparison: a publish may begin at any time
            if server.version and held == server.version:
                self._set(server, State.READY, "", held)
            else:
                reason = f"holds weights {held!r}, awaits a publish"
                self._set(server, State.QUARANTINED, reason, "")
