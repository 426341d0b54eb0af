"""One SGLang server over its public HTTP API (0.5.23): token ids in, token ids with log-probs out, weight updates.

Log-probs of generated tokens are those of ``softmax(logits / temperature)``; those of prompt tokens (``score``) are at
temperature 1 whatever the request says. All methods raise ``ServerError``; ``status`` 0 means that no answer came
(refused, reset, timed out).
"""

from __future__ import annotations

import errno
import math
import os
import resource
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
import numpy as np
from aiohttp.connector import AddrInfoType

from agpo_megatron.rollout.numbers import read_logprobs, read_tokens
from agpo_megatron.samples import Floats, Ints, VersionSpan
from agpo_megatron.wait import waiting

GONE_SECONDS = 30
"""Time without an acknowledgement from a server's machine after which its requests fail."""


def server_connector() -> aiohttp.TCPConnector:
    """Return a connector without a connection limit that detects a lost node.

    A node that loses power does not reset its connections: a request would wait for its whole timeout. With keep-alive
    probes it fails after ``GONE_SECONDS``.
    """
    # SGLang closes a connection that was idle for 5 s, perhaps just as it is used.
    return aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0, socket_factory=_probed_socket)


def _probed_socket(address: AddrInfoType) -> socket.socket:
    family, kind, protocol, _, _ = address
    connection = socket.socket(family, kind, protocol)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, GONE_SECONDS // 3)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, GONE_SECONDS // 3)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, GONE_SECONDS * 1000)
    return connection


class ServerError(RuntimeError):
    """A rollout server refused a request or could not be reached."""

    def __init__(self, url: str, endpoint: str, status: int, message: str) -> None:
        self.url, self.endpoint, self.status, self.message = url, endpoint, status, message
        what = f"HTTP {status}" if status else "no answer"
        super().__init__(f"rollout server {url}: {endpoint}: {what}: {message}")

    @property
    def retryable(self) -> bool:
        """Return whether a retry may succeed: false for a 4xx, which means that the request is wrong."""
        return not 400 <= self.status < 500


class NoDescriptor(RuntimeError):
    """This machine has no file descriptor left for a connection; no server is to blame."""

    def __init__(self, url: str) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        super().__init__(
            f"no file descriptor left for a connection to {url}: the controller may open {soft} (hard limit {hard}); "
            "raise the hard limit (`ulimit -Hn`, or LimitNOFILE of slurmd), or lower rollout.max_in_flight"
        )


def _for_want_of_a_descriptor(error: Exception) -> bool:
    """Return whether a connection failed because this process may open no more files. A host name cannot be looked up
    then either, and the resolver says that it is unknown."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        try:
            os.close(os.dup(0))
        except OSError as found:
            error = found
    return getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE)


class NonFiniteLogprob(ServerError):
    """A generated token has a NaN or infinite log-prob: the server's weights or numerics are broken."""

    def __init__(self, url: str, position: int, value: object, version: str) -> None:
        super().__init__(
            url,
            "/generate",
            200,
            f"log-prob of response token {position} is {value!r} under weight version {version}; "
            "the published weights, or the server's precision, are broken",
        )

    @property
    def retryable(self) -> bool:
        return False


class _Span(msgspec.Struct):
    version: str
    start: int
    end: int


class _Finish(msgspec.Struct):
    type: str = "unknown"


class _Meta(msgspec.Struct):
    output_token_logprobs: msgspec.Raw = msgspec.Raw(b"[]")
    finish_reason: _Finish | None = None
    weight_version: str = ""
    weight_versions: list[_Span] = []


class _Output(msgspec.Struct):
    """The fields of an answer to ``/generate`` that are decoded; the others are skipped."""

    output_ids: msgspec.Raw
    meta_info: _Meta


_OUTPUTS = msgspec.json.Decoder(list[_Output] | _Output)


@dataclass(frozen=True, eq=False)
class Generation:
    """The n tokens that one request generated of a response. ``tokens`` [n] int32; ``logprobs`` [n] float32, finite;
    ``finish_reason``: stop, length (of the request), or abort, which may come before the first token. ``versions``: by
    place among these tokens."""

    tokens: Ints
    logprobs: Floats
    finish_reason: str
    versions: tuple[VersionSpan, ...]


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. ``temperature`` 0: greedy; ``stop``: texts that end a response (their tokens stay in it);
    ``top_p``: nucleus."""

    max_new_tokens: int
    temperature: float = 1.0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    top_p: float = 1.0


def _covers(spans: Sequence[VersionSpan], count: int) -> bool:
    """Return whether ``spans``, one after the other, name the weight version of each of ``count`` tokens."""
    edges = [0, *(span.end for span in spans)]
    return edges[-1] == count and all(
        span.version and edge == span.start <= span.end
        for edge, span in zip(edges, spans, strict=False)
    )


class ServerClient:
    """Client of one server. ``url``: http://host:port. ``session``: owned by the caller, needs no limit."""

    def __init__(self, url: str, session: aiohttp.ClientSession, timeout: float = 600.0) -> None:
        self.url = url.rstrip("/")
        self._session = session
        self._timeout = timeout

    async def generate(
        self,
        prompt_tokens: Sequence[int] | Ints,
        sampling: Sampling,
        n: int = 1,
        cache: str = "",
        seeds: Sequence[int] | None = None,
    ) -> list[Generation]:
        """Generate ``n`` samples of one prompt, which is prefilled once. ``cache``: requests use cached prefixes of
        requests with the same name only. ``seeds`` [n]: a server that infers deterministically draws each token of a
        sample from its seed and the token's place in the sequence, and from nothing else; it prefills each by itself.
        """
        tokens = np.asarray(prompt_tokens).tolist()
        params: dict[str, object] = {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "ignore_eos": sampling.ignore_eos,
            "skip_special_tokens": False,
            "stop": list(sampling.stop),
        }
        body: dict[str, object] = {
            "input_ids": tokens,
            "sampling_params": params | {"n": n},
            "return_logprob": True,
            **({"extra_key": cache} if cache else {}),
        }
        if seeds is not None:  # samples that SGLang makes of one prompt would share one
            body["input_ids"] = [tokens] * n
            body["sampling_params"] = [params | {"sampling_seed": seed} for seed in seeds]
        answer = await self._request("/generate", body)
        try:
            parsed = _OUTPUTS.decode(answer)
            outputs = parsed if isinstance(parsed, list) else [parsed]
            if len(outputs) != n:
                raise ServerError(self.url, "/generate", 200, f"{len(outputs)} outputs for n={n}")
            return [self._generation(output) for output in outputs]
        except msgspec.MsgspecError as error:
            raise ServerError(self.url, "/generate", 200, f"unexpected answer: {error}") from error

    def _generation(self, output: _Output) -> Generation:
        meta = output.meta_info
        finish = (meta.finish_reason or _Finish()).type
        spans = tuple(VersionSpan(s.version, s.start, s.end) for s in meta.weight_versions)
        tokens = read_tokens(output.output_ids)
        if finish not in ("stop", "length", "abort"):
            raise ServerError(self.url, "/generate", 200, f"unexpected finish_reason {finish!r}")
        logprobs, echoed = read_logprobs(meta.output_token_logprobs)
        if finish == "abort" and len(tokens) != len(echoed):
            # It was still in SGLang's queue: whatever it names was not generated.
            return Generation(tokens[:0], logprobs[:0], finish, ())
        if finish != "abort" and not len(tokens):
            raise ServerError(self.url, "/generate", 200, f"no tokens, finish_reason {finish!r}")
        if not np.array_equal(tokens, echoed):
            raise ServerError(self.url, "/generate", 200, "log-probs are not of the output tokens")
        if (broken := np.flatnonzero(~np.isfinite(logprobs))).size:
            first = int(broken[0])
            raise NonFiniteLogprob(self.url, first, float(logprobs[first]), meta.weight_version)
        # Without them nobody could tell how stale the tokens are.
        if not _covers(spans, len(tokens)):
            raise ServerError(
                self.url,
                "/generate",
                200,
                f"weight_versions {spans} do not cover {len(tokens)} tokens",
            )
        return Generation(tokens, logprobs, finish, spans)

    async def score(
        self,
        tokens: Sequence[int] | Ints,
        start: int = 1,
        timeout: float | None = None,
    ) -> list[float]:
        """Score ``tokens[start:]``: log-probs at temperature 1, each given all before it; nothing is generated."""
        if not 1 <= start < len(tokens):
            raise ValueError(f"score: start {start} is outside 1..{len(tokens) - 1}")
        body = {
            "input_ids": np.asarray(tokens).tolist(),
            "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": start - 1,  # the first entry is always null
        }
        answer = await self._call("/generate", body, timeout)
        entries = answer["meta_info"]["input_token_logprobs"][1:]
        # The echoed id of the vocabulary's last token is 0 (SGLang 0.5.23, logprob_result_processor.py:54).
        echoed = [entry[1] or token for entry, token in zip(entries, tokens[start:], strict=False)]
        if echoed != list(tokens[start:]):
            raise ServerError(self.url, "/generate", 200, "scores are not of the given tokens")
        return [math.nan if entry[0] is None else entry[0] for entry in entries]

    async def ready(self, timeout: float = 30.0) -> None:
        """Wait for a real generation; also resume a server that an earlier controller left paused."""
        await self.continue_generation(timeout=timeout)
        body = {
            "input_ids": [0],
            "sampling_params": {"max_new_tokens": 1, "ignore_eos": True},
        }
        await self._call("/generate", body, timeout)

    async def abort_all(self, timeout: float = 30.0) -> None:
        """Abort running requests; they return their tokens so far, with finish_reason abort."""
        await self._call("/abort_request", {"abort_all": True}, timeout)

    async def model_info(self, timeout: float = 30.0) -> dict[str, Any]:
        """Return ``weight_version``, ``model_path`` and further fields."""
        info: dict[str, Any] = await self._call("/model_info", None, timeout)
        return info

    async def weight_version(self, timeout: float = 30.0) -> str:
        return str((await self.model_info(timeout))["weight_version"])

    # Weights: the order of these calls is decided in sync/.

    async def init_group(
        self,
        name: str,
        address: tuple[str, int],
        rank_offset: int,
        world_size: int,
        backend: str,
        timeout: float,
    ) -> None:
        """Join an update group; return when all members have joined. ``backend``: gloo or nccl."""
        body = {
            "master_address": address[0],
            "master_port": address[1],
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": name,
            "backend": backend,
        }
        await self._call("/init_weights_update_group", body, timeout)

    async def destroy_group(self, name: str, timeout: float = 30.0) -> None:
        await self._call("/destroy_weights_update_group", {"group_name": name}, timeout)

    async def pause(self, mode: str, timeout: float) -> None:
        """Pause generation: ``abort`` ends running requests, polling once a second; ``in_place`` halts them where they
        are, to go on with ``continue_generation`` and, after an update, with new weights on the old cache."""
        await self._call("/pause_generation", {"mode": mode}, timeout)

    async def continue_generation(self, timeout: float = 30.0) -> None:
        await self._call("/continue_generation", {}, timeout)

    async def begin_update(self, timeout: float) -> None:
        """Open a weight-update session. One left open by a broken transfer is closed first."""
        try:
            await self._call("/begin_weight_update", {}, timeout)
        except ServerError as error:
            if "already open" not in error.message:
                raise
            await self.end_update(timeout)
            await self._call("/begin_weight_update", {}, timeout)

    async def receive_bucket(
        self,
        group: str,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        timeout: float,
    ) -> None:
        """Take part in one broadcast of the concatenated bytes of these tensors and load them, in place."""
        body = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(shape) for shape in shapes],
            "group_name": group,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        await self._call("/update_weights_from_distributed", body, timeout)

    async def end_update(self, timeout: float) -> None:
        await self._call("/end_weight_update", {}, timeout)

    async def checksums(self, timeout: float) -> list[dict[str, str]]:
        """Return the hash of every weight, by SGLang's name, per tensor-parallel rank of the server."""
        answer = await self._call("/weights_checker", {"action": "checksum"}, timeout)
        return [rank["checksums"] for rank in answer["ranks"]]

    async def leading_rows(self, name: str, rows: int, timeout: float) -> list[Any]:
        """The first rows of a weight, by Hugging Face name, as the server holds it; see ``rollout.excerpts``."""
        body = {"name": name, "truncate_size": rows}
        answer: list[Any] = await self._call("/get_weights_by_name", body, timeout)
        return answer

    async def flush_cache(self, timeout: float) -> None:
        """Drop the prefix cache. The server refuses while requests run."""
        await self._call("/flush_cache", {}, timeout)

    async def set_weight_version(self, version: str, timeout: float) -> None:
        body = {"new_version": version, "abort_all_requests": False}
        await self._call("/update_weight_version", body, timeout)

    async def _call(
        self, endpoint: str, body: Mapping[str, Any] | None, timeout: float | None = None
    ) -> Any:
        """POST ``body`` (GET when None); return the parsed JSON answer, or None when it is empty."""
        data = await self._request(endpoint, body, timeout)
        answer = msgspec.json.decode(data) if data else None
        if isinstance(answer, dict) and answer.get("success") is False:
            raise ServerError(self.url, endpoint, 400, str(answer.get("message")))
        return answer

    async def _request(
        self, endpoint: str, body: Mapping[str, Any] | None, timeout: float | None = None
    ) -> bytes:
        """Send a request; return the bytes of a JSON answer, b"" for any other answer."""
        seconds = timeout or self._timeout
        method = "GET" if body is None else "POST"
        limit = aiohttp.ClientTimeout(total=seconds)
        try:
            with waiting(f"{endpoint} of {self.url}", seconds):
                async with self._session.request(
                    method, self.url + endpoint, json=body, timeout=limit
                ) as response:
                    answer = await response.read()
                    if response.status != 200:
                        text = answer[:1000].decode(errors="replace")
                        raise ServerError(self.url, endpoint, response.status, text)
                    return answer if response.content_type == "application/json" else b""
        except TimeoutError as error:
            message = f"nothing within {seconds:.0f} s"
            raise ServerError(self.url, endpoint, 0, message) from error
        except (aiohttp.ClientError, OSError) as error:
            if _for_want_of_a_descriptor(error):
                raise NoDescriptor(self.url) from error
            raise ServerError(self.url, endpoint, 0, repr(error)) from error
