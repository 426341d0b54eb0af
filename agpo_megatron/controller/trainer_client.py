"""The controller's end of the command channel to the trainer ranks.

Trainers connect out to this HTTP server (so only the controller's address must be known)::

    GET  /command?attempt=A&after=SEQ   rank 0 long-polls the next command   -> {attempt, seq, name, args} or 204
    POST /result              rank 0 delivers the results of all ranks   {attempt, seq, results: [one per rank]}
    POST /heartbeat           every rank: {rank, phase, since, last, device_bytes}; the death of one hides no other
    POST /failure             any rank: {rank, command, error}           before it exits

Bodies are JSON, never pickle; every request carries the run's bearer token. Commands carry (attempt, seq): rank 0 asks
for the command after the last seq it has executed, so each command is executed once, however often it is fetched.
Trainers outlive a controller that is killed: the next one, of another attempt, counts its commands from 1.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from agpo_megatron.wait import WaitExpired, waiting

POLL_SECONDS = 10.0


class TrainerError(RuntimeError):
    """A trainer rank failed or was lost; the message names rank, command and cause."""


@dataclass
class RankStatus:
    """Last heartbeat of one rank (``seen``: monotonic seconds of this process). ``last``: its last finished phase.
    ``device_bytes``: the most device memory that it had allocated so far; 0 without a device."""

    phase: str
    since: float
    seen: float
    last: str = ""
    device_bytes: int = 0


class TrainerClient:
    """Client for trainer commands, one at a time, each answered by all ranks."""

    def __init__(
        self,
        world_size: int,
        token: str,
        attempt: int,
        heartbeat_timeout: float,
        command_timeout: float,
    ) -> None:
        self.world_size, self.attempt = world_size, attempt
        self.ranks: dict[int, RankStatus] = {}
        self._token = token
        self._heartbeat_timeout, self._command_timeout = heartbeat_timeout, command_timeout
        self._seq = 0
        self._command: dict[str, Any] | None = None
        self._issued = asyncio.Condition()
        self._result: asyncio.Future[list[dict[str, Any]]] | None = None
        self._failure: TrainerError | None = None
        self._one_at_a_time = asyncio.Lock()
        self._runner: web.AppRunner | None = None
        self._closing = False
        self._busy, self._busy_since = 0.0, 0.0

    async def start(self, host: str, port: int) -> None:
        app = web.Application(middlewares=[self._authenticate], client_max_size=2**30)
        app.router.add_get("/command", self._on_command)
        app.router.add_post("/result", self._on_result)
        app.router.add_post("/heartbeat", self._on_heartbeat)
        app.router.add_post("/failure", self._on_failure)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()

    async def close(self) -> None:
        """Answer an open long poll and stop listening."""
        self._closing = True
        async with self._issued:
            self._issued.notify_all()
        if self._runner is not None:
            await self._runner.cleanup()

    async def call(
        self, name: str, *, timeout: float | None = None, **args: Any
    ) -> list[dict[str, Any]]:
        """Execute one command on all ranks; return their results in rank order.

        Raises TrainerError when a rank fails or sends no heartbeat, WaitExpired at the deadline.
        """
        seconds = timeout or self._command_timeout
        async with self._one_at_a_time:
            self._seq += 1
            self._result = asyncio.get_running_loop().create_future()
            async with self._issued:
                self._command = {
                    "attempt": self.attempt,
                    "seq": self._seq,
                    "name": name,
                    "args": args,
                }
                self._issued.notify_all()
            self._busy_since = time.monotonic()
            try:
                with waiting(f"trainer command {name}", seconds):
                    return await self._await_result(name, seconds)
            finally:
                self._busy, self._busy_since = self.busy_seconds, 0.0

    async def _await_result(self, name: str, seconds: float) -> list[dict[str, Any]]:
        assert self._result is not None
        deadline = time.monotonic() + seconds
        while True:
            done, _ = await asyncio.wait({self._result}, timeout=1.0)
            if done:
                return self._result.result()
            if self._failure is not None:
                raise self._failure
            unheard = [
                r
                for r, s in self.ranks.items()
                if time.monotonic() - s.seen > self._heartbeat_timeout
            ]
            if unheard:
                raise TrainerError(
                    f"trainer rank(s) {unheard} sent no heartbeat for {self._heartbeat_timeout:.0f} s "
                    f"during {name}; {self.report()}"
                )
            if time.monotonic() > deadline:
                raise WaitExpired(f"trainer command {name}", seconds, self.report())

    @property
    def command_under_way(self) -> str:
        """The name and number of the command that the trainers have not answered yet; "" when there is none."""
        if self._command is None or self._result is None or self._result.done():
            return ""
        return f"{self._command['name']} ({self._command['seq']})"

    @property
    def busy_seconds(self) -> float:
        """Seconds since the start in which a command was under way."""
        since = self._busy_since
        return self._busy + (time.monotonic() - since if since else 0.0)

    def report(self) -> str:
        """Return one line with the last known phase of every rank."""
        now = time.monotonic()
        seen = [
            f"rank {r}: {s.phase} (heard {now - s.seen:.0f} s ago)"
            for r, s in sorted(self.ranks.items())
        ]
        missing = [f"rank {r}: never heard" for r in range(self.world_size) if r not in self.ranks]
        return "; ".join(seen + missing)

    @web.middleware
    async def _authenticate(self, request: web.Request, handler: Any) -> web.StreamResponse:
        given = request.headers.get("Authorization", "")
        if not hmac.compare_digest(given, f"Bearer {self._token}"):
            raise web.HTTPUnauthorized(text="wrong or missing token")
        response: web.StreamResponse = await handler(request)
        return response

    async def _on_command(self, request: web.Request) -> web.Response:
        known = int(request.query["attempt"]) == self.attempt
        after = int(request.query["after"]) if known else 0
        try:
            async with asyncio.timeout(POLL_SECONDS):
                async with self._issued:
                    await self._issued.wait_for(
                        lambda: self._closing or (self._command and self._command["seq"] > after)
                    )
        except TimeoutError:
            return web.Response(status=204)
        return web.Response(status=204) if self._closing else web.json_response(self._command)

    async def _on_result(self, request: web.Request) -> web.Response:
        body = await request.json()
        expected = (self.attempt, self._seq)
        if (body["attempt"], body["seq"]) == expected and self._result and not self._result.done():
            self._result.set_result(body["results"])
        return web.Response()

    async def _on_heartbeat(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.ranks[int(body["rank"])] = RankStatus(
            body["phase"],
            body["since"],
            time.monotonic(),
            body["last"],
            body["device_bytes"],
        )
        return web.Response()

    async def _on_failure(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self._failure is None:  # the first is the cause of the others
            self._failure = TrainerError(
                f"trainer rank {body['rank']} failed in {body['command']}: {body['error']}"
            )
        return web.Response()
