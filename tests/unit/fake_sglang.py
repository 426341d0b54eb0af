"""A local server that speaks as much of SGLang's API as the pool and the publisher use, and fails on demand."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web


class FakeServer:
    """Answers like SGLang with two tokens a sample. ``behave`` may change or refuse the answer of one request."""

    def __init__(self) -> None:
        self.behave: Callable[[dict[str, Any]], Awaitable[web.Response | None]] | None = None
        self.requests: list[dict[str, Any]] = []
        self.busy = self.most_busy = 0
        self.release = asyncio.Event()
        self.release.set()
        self.aborted = False
        self.version = "1.1.a"
        self.logprob: float | None = -0.5
        self.port = 0
        self.controls: list[tuple[str, dict[str, Any]]] = []
        self.refuse: list[str] = []  # control endpoints that fail once each
        self.drop: list[str] = []  # control endpoints whose connection breaks once each
        self.stall: dict[str, asyncio.Event] = {}  # control endpoints that wait before they answer
        self.checksums = {"w": "1"}
        self.second_rank: dict[str, str] | None = None  # its checksums, where there is one
        self.weights: dict[str, list[Any]] = {}  # what get_weights_by_name knows
        self.spans: list[dict[str, Any]] | None = (
            None  # weight_versions of an answer; None: all of it
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/continue_generation", self._ok)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_get("/model_info", self._info)
        app.router.add_post("/{control}", self._control)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _control(self, request: web.Request) -> web.Response:
        name, body = request.match_info["control"], await request.json()
        self.controls.append((name, body))
        if name in self.stall:
            await self.stall[name].wait()
        if name in self.drop:
            self.drop.remove(name)
            assert request.transport is not None
            request.transport.close()
        if name in self.refuse:
            self.refuse.remove(name)
            return web.json_response({"success": False, "message": f"no {name} today"}, status=400)
        if name == "update_weight_version":
            self.version = body["new_version"]
        if name == "weights_checker":
            ranks = [self.checksums, self.second_rank][: 2 if self.second_rank else 1]
            return web.json_response({"success": True, "ranks": [{"checksums": c} for c in ranks]})
        if name == "get_weights_by_name":
            if body["name"] not in self.weights:
                return web.json_response({"error": {"message": "failed"}}, status=400)
            return web.json_response(self.weights[body["name"]][: body["truncate_size"]])
        return web.json_response({"success": True, "message": "Success"})

    async def _ok(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _info(self, _: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.version})

    async def _abort(self, _: web.Request) -> web.Response:
        if "abort_request" in self.stall:
            await self.stall["abort_request"].wait()
        self.aborted = True
        self.release.set()
        return web.Response()

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        n = body["sampling_params"].get("n", 1)
        if "return_logprob" in body:  # not a probe
            self.requests.append(body)
            if self.behave and (answer := await self.behave(body)) is not None:
                return answer
        self.busy += n
        self.most_busy = max(self.busy, self.most_busy)
        await self.release.wait()
        self.busy -= n
        reason = "abort" if self.aborted else "stop"
        self.aborted = False
        meta = {
            "finish_reason": {"type": reason},
            "weight_version": self.version,
            "weight_versions": self.spans
            if self.spans is not None
            else [{"version": self.version, "start": 0, "end": 2}],
            "input_token_logprobs": [[None, 0, None]]
            + [[-1.0, t, None] for t in body["input_ids"][1:]],
            "output_token_logprobs": [[self.logprob, 7, None], [-0.25, 2, None]],
        }
        outputs = [{"output_ids": [7, 2], "meta_info": meta} for _ in range(n)]
        return web.json_response(outputs if n > 1 else outputs[0])
