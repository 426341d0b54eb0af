"""A local server whose tokens follow from their prefix alone: any cutting into requests gives the same response."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import made
import numpy as np
from aiohttp import web
from fake_sglang import FakeServer

from agpo_megatron.samples import Ints, Prompt

compact = partial(json.dumps, separators=(",", ":"))


def prompt(position: int, length: int) -> Prompt:
    """A prompt whose response has ``length`` tokens: the first two tokens say where it begins and ends."""
    return made.prompt(position, [3, length, 5 + position], "0")


def next_token(ids: Sequence[int], sample: int) -> int:
    """``sample``: of a request for several, which begin differently."""
    return 3 + zlib.crc32(repr((ids, sample)).encode()) % 997


def response(of: Prompt, index: int, limit: int = 10**6) -> list[int]:
    """The tokens of sample ``index`` of a group, as one request would generate them."""
    ids: list[int] = of.tokens.tolist()
    length = min(ids[1], limit)
    while len(ids) < 3 + length:
        ids.append(next_token(ids, index if len(ids) == 3 else 0))
    return ids[3:]


def decode(tokens: Ints, special: bool) -> str:
    """One letter for each token."""
    return "".join(chr(0x100 + t) for t in tokens)


class GeneratingServer(FakeServer):
    """Generates one token after the other for the prompts above; log-prob -token/100. ``halt_at``: before this token of
    a response it waits for ``go_on``, or for an abort. Pauses and aborts as SGLang does."""

    def __init__(self) -> None:
        super().__init__()
        self.halt_at = -1
        self.halted = self.aborts = 0
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.going = asyncio.Event()
        self.going.set()
        self.answers: list[list[int]] = []

    def halt(self, at: int) -> None:
        self.halt_at = at
        self.go_on.clear()

    async def _abort(self, request: web.Request) -> web.Response:
        self.controls.append(("abort_request", await request.json()))
        self.aborts += 1
        self.go_on.set()
        return web.Response()

    async def _ok(self, request: web.Request) -> web.Response:
        self.controls.append(("continue_generation", {}))
        self.going.set()
        return await super()._ok(request)

    async def _control(self, request: web.Request) -> web.Response:
        answer = await super()._control(request)
        if request.match_info["control"] == "pause_generation":
            self.going.clear()
            if (await request.json())["mode"] == "abort":
                self.aborts += 1
                self.go_on.set()
        return answer

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        sampling, prefix = body["sampling_params"], body["input_ids"]
        if isinstance(sampling, list):  # of samples with a seed each
            asked = list(zip(prefix, sampling, strict=True))
        else:
            asked = [(prefix, sampling)] * sampling.get("n", 1)
        if "return_logprob" not in body or not asked[0][1]["max_new_tokens"]:
            return await super()._generate(request)
        self.requests.append(body)
        if self.behave and (answer := await self.behave(body)) is not None:
            return answer
        n = len(asked)
        self.busy += n
        self.most_busy = max(self.busy, self.most_busy)
        try:
            outputs = await asyncio.gather(
                *(self._respond(ids, i, of_one) for i, (ids, of_one) in enumerate(asked))
            )
        finally:
            self.busy -= n
        alone = isinstance(sampling, dict) and n == 1
        return web.json_response(outputs[0] if alone else outputs, dumps=compact)

    async def _respond(
        self, prefix: list[int], sample: int, sampling: dict[str, Any]
    ) -> dict[str, Any]:
        aborts, ids, reason = self.aborts, list(prefix), ""
        spans: list[dict[str, Any]] = []
        while not reason:
            await self.going.wait()
            if len(ids) - 3 == self.halt_at and not self.go_on.is_set():
                self.halted += 1
                await self.go_on.wait()
                self.halted -= 1
            await self.going.wait()
            count = len(ids) - len(prefix)
            if self.aborts != aborts:
                reason = "abort"
                break
            ids.append(next_token(ids, 0 if count else sample))
            spans.append({"version": self.version, "start": count, "end": count + 1})
            text = decode(np.array(ids[len(prefix) :], np.int32), True)
            if len(ids) - 3 >= ids[1] or any(stop in text for stop in sampling["stop"]):
                reason = "stop"
            elif len(ids) - len(prefix) == sampling["max_new_tokens"]:
                reason = "length"
        tokens = ids[len(prefix) :]
        self.answers.append(tokens)
        meta = {
            "finish_reason": {"type": reason},
            "weight_version": self.version,
            "weight_versions": spans,
            "output_token_logprobs": [[-t / 100, t, None] for t in tokens],
        }
        return {"output_ids": tokens, "meta_info": meta}
