"""The controller's event loop in real time: CPU seconds of dispatching very many groups, and how long it is blocked
while 64 servers answer."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any
from unittest.mock import patch

import aiohttp
import numpy as np
from aiohttp import web
from benchmarks.fleet.servers import prompt_at

from agpo_megatron.config.schema import RolloutConfig
from agpo_megatron.rollout.client import Generation, Sampling, ServerClient, server_connector
from agpo_megatron.rollout.pool import RolloutPool
from agpo_megatron.samples import VersionSpan

SERVERS, VERSION = 64, "0.1."
FRAGMENT = 2048


@dataclass(frozen=True)
class Lag:
    """Seconds by which a timer of the loop fired late, which the load of the machine adds to. ``longest``: CPU seconds
    of the longest call from the loop, which it does not. ``cpu``: seconds per fragment."""

    p50: float
    p99: float
    most: float
    longest: float
    cpu: float
    tokens_per_s: float


class Instant:
    """A server that answers at once."""

    def __init__(self, number: int) -> None:
        self.url = f"http://instant-{number}"
        tokens, span = np.zeros(8, np.int32), VersionSpan(VERSION, 0, 8)
        self._answer = Generation(tokens, np.zeros(8, np.float32), "stop", (span,))

    async def generate(
        self, tokens: Any, sampling: Sampling, n: int = 1, cache: str = "", seeds: Any = None
    ) -> list[Generation]:
        await asyncio.sleep(0)
        return [self._answer] * n


async def _dispatch(groups: int) -> float:
    clients: Any = [Instant(number) for number in range(SERVERS)]
    pool = RolloutPool(clients, RolloutConfig(max_in_flight=128))
    for server in pool.servers:
        await pool.mark_ready(server, VERSION)
    started = time.process_time()
    await asyncio.gather(*(pool.generate_group(prompt_at(p)) for p in range(groups)))
    return time.process_time() - started


def dispatch_seconds(groups: int = 12_800) -> float:
    """Return the CPU seconds of rolling out ``groups`` of 8 on 8,192 slots, all asked for at once."""
    return asyncio.run(_dispatch(groups))


def _answer() -> bytes:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 100_000, FRAGMENT).tolist()
    logprobs = (-rng.exponential(size=FRAGMENT)).tolist()
    meta = {
        "output_token_logprobs": [[p, t, None] for p, t in zip(logprobs, tokens, strict=True)],
        "finish_reason": {"type": "length"},
        "weight_version": VERSION,
        "weight_versions": [{"version": VERSION, "start": 0, "end": FRAGMENT}],
    }
    # Without blanks, as SGLang writes: what has some is parsed several times as slowly (rollout/numbers.py).
    answer = {"output_ids": tokens, "meta_info": meta}
    return json.dumps(answer, separators=(",", ":")).encode()


def serve(seconds: float, ports: Connection) -> None:
    """Serve on ``SERVERS`` free ports, each request answered after ``seconds``, until the process is ended."""
    body = _answer()

    async def generate(request: web.Request) -> web.Response:
        await request.read()
        await asyncio.sleep(seconds)
        return web.Response(body=body, content_type="application/json")

    async def main() -> None:
        app = web.Application(client_max_size=2**30)
        app.router.add_post("/generate", generate)
        runner = web.AppRunner(app)
        await runner.setup()
        for _ in range(SERVERS):
            await web.TCPSite(runner, "127.0.0.1", 0).start()
        ports.send([address[1] for address in runner.addresses])
        await asyncio.Event().wait()

    asyncio.run(main())


async def _lag(ports: list[int], rate: int, at_once: int, seconds: float) -> Lag:
    late: list[float] = []
    async with aiohttp.ClientSession(connector=server_connector()) as session:
        clients = [ServerClient(f"http://127.0.0.1:{port}", session) for port in ports]
        pool = RolloutPool(
            clients, RolloutConfig(max_in_flight=128, max_response_tokens=4 * FRAGMENT)
        )
        for server in pool.servers:
            await pool.mark_ready(server, VERSION)

        async def ask(number: int) -> None:
            await asyncio.sleep(number * FRAGMENT / rate)
            while True:
                await pool.sample(prompt_at(number), max_tokens=4 * FRAGMENT)

        askers = [asyncio.create_task(ask(number)) for number in range(at_once)]
        await asyncio.sleep(2 * at_once * FRAGMENT / rate)  # until answers come evenly
        started, cpu = time.monotonic(), time.process_time()
        counted = _counted(clients)
        with _calls_timed() as calls:
            while (now := time.monotonic()) < started + seconds:
                await asyncio.sleep(0.005)
                late.append(time.monotonic() - now - 0.005)
        took, used = time.monotonic() - started, time.process_time() - cpu
        answered = counted()
        for asker in askers:
            asker.cancel()
        await asyncio.gather(*askers, return_exceptions=True)
    p50, p99 = np.percentile(late, [50, 99])
    return Lag(
        float(p50),
        float(p99),
        max(late),
        max(calls),
        used / max(answered, 1),
        answered * FRAGMENT / took,
    )


@contextmanager
def _calls_timed() -> Iterator[list[float]]:
    """Note the CPU seconds of each call that a loop makes."""
    run: Any = asyncio.Handle._run
    seconds: list[float] = []

    def timed(handle: asyncio.Handle) -> None:
        before = time.thread_time()
        run(handle)
        seconds.append(time.thread_time() - before)

    with patch.object(asyncio.Handle, "_run", timed):
        yield seconds


def _counted(clients: list[ServerClient]) -> Any:
    """Count answers from here on; return what tells the number."""
    count = 0
    for client in clients:
        generate = client.generate

        async def counting(*args: Any, ask: Any = generate) -> list[Generation]:
            nonlocal count
            found: list[Generation] = await ask(*args)
            count += len(found)
            return found

        client.generate = counting  # type: ignore[method-assign]
    return lambda: count


def loop_lag(rate: int, at_once: int = 640, seconds: float = 15.0) -> Lag:
    """Return the loop's lag while ``at_once`` responses are generated in fragments, ``rate`` tokens/s in all at
    most."""
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=serve, args=(at_once * FRAGMENT / rate, there))
    process.start()
    try:
        return asyncio.run(_lag(here.recv(), rate, at_once, seconds))
    finally:
        process.terminate()
        process.join()
