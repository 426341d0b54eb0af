"""Simulated rollout servers: how long responses are, and how fast a server of so many sequences generates them.

The model of a 70B model on eight H100 a server: a decode iteration takes ``T0 + TB * sequences + KV * context`` seconds
and gives each running sequence a token; a prefill halts decoding. A continued response needs no prefill on the server
that has its prefix in the cache, which a publish with ``recompute`` empties. One simulated token stands for ``UNIT``
real ones, in lengths, rates and limits alike.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from agpo_megatron.rollout.client import Generation, Sampling
from agpo_megatron.samples import Ints, Prompt, VersionSpan

UNIT = 16
PROMPT = 304 // UNIT
LIMIT = 16384 // UNIT
T0, TB, KV = 0.013 * UNIT, 2.0e-5 * UNIT, 41e3 / 2.6e12 * UNIT * UNIT
PREFILL = 15000 / UNIT
STEP = 5.0
"""Seconds for which a decode rate is taken as constant, though the contexts grow."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of the responses: lognormal, a share of the log-variance that of the prompt."""

    samples: int = 8
    median: float = 3500 / UNIT
    sigma: float = 0.9
    prompts_share: float = 0.5
    limit: int = LIMIT
    seed: int = 1

    @cache  # noqa: B019 - one of them in a run
    def of_group(self, position: int) -> tuple[int, ...]:
        rng = np.random.default_rng((self.seed, position))
        return tuple(self._drawn(rng, 1)[0].tolist())

    @cache  # noqa: B019
    def mean(self) -> float:
        return float(self._drawn(np.random.default_rng(self.seed), 50_000).mean())

    def _drawn(self, rng: np.random.Generator, groups: int) -> Ints:
        common = rng.normal(size=(groups, 1))
        own = rng.normal(size=(groups, self.samples))
        z = math.sqrt(self.prompts_share) * common + math.sqrt(1 - self.prompts_share) * own
        drawn = self.median * np.exp(self.sigma * z)
        return np.clip(drawn, 1, self.limit).astype(np.int32)


def prompt_at(position: int) -> Prompt:
    """A prompt whose first token is its position, by which a server knows it."""
    return Prompt(position, np.full(PROMPT, position, np.int32), "")


@dataclass(eq=False)
class _Request:
    outputs: list[Generation | None]
    done: asyncio.Future[list[Generation | None]]


@dataclass(eq=False)
class _Running:
    """``began``: the server's ``_decoded`` at its first token. ``versions``: (version, tokens before it)."""

    request: _Request
    place: int
    index: int
    position: int
    prefix: int
    began: float
    tokens: int
    last: bool
    versions: list[tuple[str, int]] = field(default_factory=list)


class SimulatedServer:
    """Stands for ``ServerClient`` and the server behind it."""

    def __init__(self, number: int, lengths: Lengths, loop: asyncio.AbstractEventLoop) -> None:
        self.url = f"http://simulated-{number}"
        self._lengths, self._loop = lengths, loop
        self.version = "0.1."
        self.generated = self.decoding = self.prefilling = 0.0
        self.aborted = 0  # responses that had tokens
        self._running: dict[_Running, None] = {}
        self._ends: list[tuple[float, int, _Running]] = []
        self._numbers = itertools.count()
        self._cached: set[tuple[int, int]] = set()
        self._decoded = self._context = self._at = self._prefill = 0.0
        self._paused = False
        self._timer: asyncio.TimerHandle | asyncio.Handle | None = None

    # What the pool calls

    async def generate(
        self,
        prompt_tokens: Sequence[int] | Ints,
        sampling: Sampling,
        n: int = 1,
        cache: str = "",
        seeds: Sequence[int] | None = None,
    ) -> list[Generation]:
        position, prefix = int(prompt_tokens[0]), len(prompt_tokens) - PROMPT
        assert (n == 1) == (prefix > 0), "a group's first request is the one without a prefix"
        indices = [int(prompt_tokens[-1])] if prefix else list(range(n))
        self._advance()
        request = _Request([None] * n, self._loop.create_future())
        for place, index in enumerate(indices):
            left = self._lengths.of_group(position)[index] - prefix
            one = _Running(
                *(request, place, index, position, prefix, self._decoded),
                tokens=min(left, sampling.max_new_tokens),
                last=left <= sampling.max_new_tokens,
                versions=[(self.version, 0)],
            )
            self._running[one] = None
            heapq.heappush(self._ends, (self._decoded + one.tokens, next(self._numbers), one))
            self._context += PROMPT + prefix
        if not (prefix and (position, indices[0]) in self._cached):
            self._prefill += (PROMPT + prefix) / PREFILL
        self._plan()
        outputs = await request.done
        assert all(outputs)
        return outputs  # type: ignore[return-value]

    async def abort_all(self, timeout: float = 30.0) -> None:
        self._advance()
        for one in list(self._running):
            tokens = int(self._decoded - one.began)
            self.aborted += tokens > 0
            self._end(one, tokens, "abort")
        self._ends.clear()
        self._plan()

    async def ready(self, timeout: float = 30.0) -> None:
        pass

    async def weight_version(self, timeout: float = 30.0) -> str:
        return self.version

    # What a publish does

    def pause(self) -> None:
        self._advance()
        self._paused = True
        self._plan()

    def take_weights(self, version: str, flush: bool) -> None:
        self._advance()
        self.version, self._paused = version, False
        for one in self._running:
            one.versions.append((version, int(self._decoded - one.began)))
        if flush:
            self._cached.clear()
        self._plan()

    # Decoding

    def _rate(self, context: float) -> float:
        return 1.0 / (T0 + TB * len(self._running) + KV * context)

    def _advance(self) -> None:
        """Go on to now: prefills first, then steps of decoding."""
        now = self._loop.time()
        if self._paused or not self._running:
            self._at = now
            return
        prefill = min(self._prefill, now - self._at)
        self._prefill -= prefill
        self.prefilling += prefill
        self._at += prefill
        while self._at < now - 1e-9:
            seconds = min(STEP, now - self._at)
            decoded = self._rate(self._context) * seconds
            self._decoded += decoded
            self._context += decoded * len(self._running)
            self.decoding += seconds
            self._at += seconds

    def _next(self) -> float:
        """When the next sequence will be done."""
        at, context, left = (
            self._at + self._prefill,
            self._context,
            self._ends[0][0] - self._decoded,
        )
        while True:
            rate = self._rate(context)
            if left <= rate * STEP:
                return at + max(left, 0.0) / rate
            left -= rate * STEP
            context += rate * STEP * len(self._running)
            at += STEP

    def _plan(self) -> None:
        """Set the timer, once all that happens now has happened."""
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_soon(self._set_timer)

    def _set_timer(self) -> None:
        self._timer = None
        if self._ends and not self._paused:
            self._timer = self._loop.call_at(self._next(), self._finish)

    def _finish(self) -> None:
        self._timer = None
        self._advance()
        while self._ends and self._ends[0][0] <= self._decoded + 1e-6:
            one = heapq.heappop(self._ends)[2]
            self._end(one, one.tokens, "stop" if one.last else "length")
        self._plan()

    def _end(self, one: _Running, tokens: int, reason: str) -> None:
        del self._running[one]
        self._context -= PROMPT + one.prefix + self._decoded - one.began
        self._cached.add((one.position, one.index))
        self.generated += tokens
        edges = [*(min(start, tokens) for _, start in one.versions), tokens]
        spans = (
            VersionSpan(version, start, end)
            for (version, _), start, end in zip(one.versions, edges, edges[1:], strict=False)
        )
        one.request.outputs[one.place] = Generation(
            np.full(tokens, one.index, np.int32),
            np.zeros(tokens, np.float32),
            reason,
            tuple(span for span in spans if span.start < span.end),
        )
        if all(one.request.outputs) and not one.request.done.done():
            one.request.done.set_result(one.request.outputs)


def total(servers: Sequence[SimulatedServer], what: str) -> float:
    values: list[Any] = [getattr(server, what) for server in servers]
    return sum(values)
