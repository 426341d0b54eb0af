"""All rollout servers of a run: their states, the dispatch of groups to them, and the handling of failures.

States of a server::

    STARTING ──generated once──► QUARANTINED ──full publish──► READY
       ▲                            ▲   │                       │
       │                 new weights│   │no answer              │publish begins (weights are written in place),
       │                  are needed│   ▼                       │or it came back with other weights
       └── (new process)          DEAD ◄──no answer─────────────┘──► QUARANTINED

* STARTING: launched, has not generated yet.
* QUARANTINED: alive, but its weights are not known to be the current version. It serves nothing until it has received
  all of them.
* READY: serves.
* DEAD: a request got no answer. It is probed with a real generation; it comes back as READY if it still reports the
  weight version it had and no publish has begun since, else as QUARANTINED.

``Server.version`` is the current weight version or "": a publish begins by clearing it on every server
(``retire_versions``), whatever its state, and only a complete transfer sets it again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Self

import numpy as np

from agpo_megatron.config.schema import RolloutConfig
from agpo_megatron.rollout.client import Generation, Sampling, ServerClient, ServerError
from agpo_megatron.samples import Group, Ints, Prompt, Sample
from agpo_megatron.wait import WaitExpired, waiting, waiting_async

log = logging.getLogger(__name__)
PROBE_SECONDS = 0.5
PROBE_SECONDS_MAX = 5.0


class RolloutError(RuntimeError):
    """A group could not be generated; the message lists the error of every attempt."""


class State(Enum):
    """State of a server; see the docstring of the module."""

    STARTING = "starting"
    READY = "ready"
    QUARANTINED = "quarantined"
    DEAD = "dead"


@dataclass(eq=False)
class Server:
    """The pool's record of a server. ``in_flight``: samples. ``version``: current weight version, "" if it lacks it.

    ``drains``: number of drains, to distinguish their aborts from those of the server itself.
    """

    client: ServerClient
    state: State = State.STARTING
    in_flight: int = 0
    version: str = ""
    drains: int = 0
    reason: str = "has not generated yet"
    since: float = field(default_factory=time.monotonic)

    @property
    def url(self) -> str:
        return self.client.url

    @property
    def alive(self) -> bool:
        return self.state in (State.READY, State.QUARANTINED)

    def __str__(self) -> str:
        seconds = time.monotonic() - self.since
        why = f": {self.reason}" if self.reason else ""
        return f"{self.url} {self.state.value} for {seconds:.0f} s{why}"


class RolloutPool:
    """Dispatcher of groups to the servers; ``async with`` starts and ends its probing of servers.

    ``decode`` turns response tokens into the sample's text ("" without it). ``refresh`` (set by the publisher) brings a
    quarantined server up to date between publishes, e.g. after its restart. ``end_hung`` has the process of the server
    of that number killed and started again, for one that would never come back by itself.
    """

    def __init__(
        self,
        clients: Sequence[ServerClient],
        config: RolloutConfig,
        decode: Callable[[Ints], str] | None = None,
    ) -> None:
        self.servers = [Server(client) for client in clients]
        self.refresh: Callable[[Server], Awaitable[None]] | None = None
        self.end_hung: Callable[[int], None] | None = None
        self._config = config
        self._decode: Callable[[Ints], str] = decode or (lambda tokens: "")
        self._changed = asyncio.Condition()
        self._open = True
        self._none_ready_since = time.monotonic()
        self._probes: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._probes = [asyncio.create_task(self._probe(server)) for server in self.servers]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._probes:
            task.cancel()
        await asyncio.gather(*self._probes, return_exceptions=True)

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

    async def generate_group(self, prompt: Prompt) -> Group:
        """Generate ``group_size`` samples at the configured temperature.

        Raises RolloutError after ``attempts`` failures, ServerError for a request that no server would take (4xx),
        NonFiniteLogprob, WaitExpired when no server becomes ready.
        """
        config = self._config
        sampling = Sampling(config.max_response_tokens, config.temperature, stop=tuple(config.stop))
        return await self._group(prompt, sampling, config.group_size)

    async def sample(
        self,
        prompt: Prompt,
        n: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_tokens: int | None = None,
    ) -> Group:
        """Generate ``n`` samples for an evaluation, greedy by default; ``max_tokens`` None: as in training.

        Raises as ``generate_group``.
        """
        config = self._config
        limit = max_tokens or config.max_response_tokens
        sampling = Sampling(limit, temperature, stop=tuple(config.stop), top_p=top_p)
        return await self._group(prompt, sampling, n)

    async def _group(self, prompt: Prompt, sampling: Sampling, n: int) -> Group:
        outputs = await self._generate(prompt, sampling, n)
        samples = [
            Sample(
                group_id=prompt.group_id,
                index=index,
                prompt_tokens=prompt.tokens,
                response_tokens=output.tokens,
                rollout_logprobs=output.logprobs,
                loss_mask=np.ones(len(output.tokens), np.uint8),
                versions=output.versions,
                finish_reason=output.finish_reason,
                text=self._decode(output.tokens),
            )
            for index, output in enumerate(outputs)
        ]
        return Group(prompt, samples)

    async def _generate(self, prompt: Prompt, sampling: Sampling, n: int) -> list[Generation]:
        """Generate all ``n`` samples in one request, so that they share the prefix; retry elsewhere if it fails."""
        failures: list[ServerError] = []
        while True:
            async with self._slot(n, avoid=[error.url for error in failures]) as server:
                drains = server.drains
                try:
                    outputs = await server.client.generate(prompt.tokens, sampling, n)
                except ServerError as error:
                    if not error.retryable:
                        raise
                    failures.append(error)
                    if error.status == 0:
                        await self.mark_dead(server, str(error))
                    log.warning("group %s: %s", prompt.group_id, error)
                else:
                    # If one was aborted (a publish), generate all again: the finished ones are the short ones, and
                    # keeping only those would bias the group towards short responses.
                    if all(output.finish_reason != "abort" for output in outputs):
                        return outputs
                    log.info("group %s was aborted; generating it again", prompt.group_id)
                    if server.drains == drains:
                        failures.append(
                            ServerError(
                                server.url, "/generate", 200, "aborted by the server itself"
                            )
                        )
            if len(failures) >= self._config.attempts:
                met = "; ".join(str(error) for error in failures)
                raise RolloutError(
                    f"group {prompt.group_id} failed {len(failures)} times "
                    f"(rollout.attempts={self._config.attempts}): {met}"
                )

    @asynccontextmanager
    async def _slot(self, n: int, avoid: Sequence[str]) -> AsyncIterator[Server]:
        """Reserve room for ``n`` samples on the least loaded READY server, preferably not in ``avoid``."""
        server = await self._acquire(n, avoid)
        try:
            yield server
        finally:
            async with self._changed:
                server.in_flight -= n
                self._changed.notify_all()

    async def _acquire(self, n: int, avoid: Sequence[str]) -> Server:
        limit = self._config.max_in_flight
        async with self._changed:
            while True:
                ready = [s for s in self.servers if s.state is State.READY]
                candidates = [s for s in ready if s.url not in avoid] or ready
                best = min(candidates, key=lambda s: s.in_flight, default=None)
                # A group larger than the limit goes to an idle server.
                if self._open and best and (best.in_flight + n <= limit or not best.in_flight):
                    best.in_flight += n
                    return best
                await self._wait_for_change(anyone_ready=bool(ready))

    async def _wait_for_change(self, anyone_ready: bool) -> None:
        """Wait for a slot, for dispatch to open, or for a server. Only the last has a deadline here: the others end
        with requests and publishes, which have their own."""
        seconds = None
        name = "room on a rollout server"
        if self._open and not anyone_ready:
            name = "a rollout server to become ready"
            seconds = self._none_ready_since + self._config.start_timeout - time.monotonic()
            if seconds <= 0:
                raise WaitExpired(name, self._config.start_timeout, self.report())
        with waiting(name, seconds):
            await self._within(seconds)  # then the caller looks again, and raises with the report

    async def _within(self, seconds: float | None) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    # Dispatch, which a publish closes

    async def close_dispatch(self) -> None:
        """Hold all new requests until ``open_dispatch``; those in flight go on."""
        await self._set_open(False)

    async def open_dispatch(self) -> None:
        await self._set_open(True)

    async def _set_open(self, value: bool) -> None:
        async with self._changed:
            self._open = value
            self._none_ready_since = max(self._none_ready_since, time.monotonic())
            self._changed.notify_all()

    async def drain(self, servers: Sequence[Server], seconds: float) -> None:
        """Abort the running samples of ``servers`` (they are generated again); return when nothing is in flight there.

        Repeated aborts catch requests that were on their way at the first one. A server that does not end its samples
        within ``seconds`` is then DEAD, so that it cannot block a publish.
        """
        for server in servers:
            server.drains += 1
        try:
            async with waiting_async("samples in flight to end before a publish", seconds):
                while busy := [s for s in servers if s.in_flight and s.alive]:
                    await asyncio.gather(*(self._abort(server, seconds / 2) for server in busy))
                    async with self._changed:
                        await self._within(0.1)
        except WaitExpired as expired:
            for server in servers:
                if server.in_flight and server.alive:
                    await self.mark_dead(server, str(expired))

    async def _abort(self, server: Server, seconds: float) -> None:
        try:
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
