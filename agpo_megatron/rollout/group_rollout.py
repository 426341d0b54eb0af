"""The rollout of one group: responses made of requests of a bounded number of tokens, each continued by its prefix.

The first request asks for all samples of the group, which share the prompt's prefill; what is unfinished after it goes
on sample by sample, on the same server or another. A server that dies, a publish that aborts, or a controller that is
killed costs at most the fragments under way.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from agpo_megatron.rollout.client import Generation, Sampling, ServerError
from agpo_megatron.rollout.servers import Server
from agpo_megatron.rollout.slots import Slots
from agpo_megatron.rollout.stop_texts import stop_across_border
from agpo_megatron.samples import Fragment, Group, Ints, Prompt, Sample, VersionSpan

log = logging.getLogger(__name__)


class RolloutError(RuntimeError):
    """A group could not be generated; the message lists the errors of its last attempts."""


@dataclass
class Counts:
    """The outcome of a pool's requests. ``fragments``: returned by servers; ``resumed``: of them, those that
    continued a response which a publish, a stop or a failure had interrupted; ``tokens_lost``: asked for and never
    received, at most, the last one of each aborted response, and those cut off behind a stop text."""

    fragments: int = 0
    resumed: int = 0
    tokens_lost: int = 0


@dataclass(frozen=True)
class Terms:
    """The way in which groups of one kind are generated. ``sampling.max_new_tokens``: of a whole response.
    ``decode(tokens, special)``: text of tokens, with or without special tokens. ``mark_dead(server, reason)``.
    ``seed``: what samples are drawn from, on servers that infer deterministically; None: whatever they draw."""

    sampling: Sampling
    fragment_tokens: int
    attempts: int
    slots: Slots
    decode: Callable[[Ints, bool], str]
    mark_dead: Callable[[Server, str], Coroutine[Any, Any, None]]
    counts: Counts
    seed: int | None = None
    keep: Callable[[Fragment], None] = lambda fragment: None


@dataclass(eq=False)
class Member:
    """A sample of the group as far as it is generated. ``interrupted``: its last request did not come to its end.
    ``server``: the one that has its prefix in the cache."""

    index: int
    fragments: list[Fragment] = field(default_factory=list)
    interrupted: bool = False
    server: Server | None = None

    @property
    def length(self) -> int:
        return self.fragments[-1].end if self.fragments else 0

    @property
    def finish_reason(self) -> str:
        return self.fragments[-1].finish_reason if self.fragments else ""

    def tokens(self) -> Ints:
        return np.concatenate([np.zeros(0, np.int32), *(f.tokens for f in self.fragments)])


async def roll_out(prompt: Prompt, n: int, terms: Terms, known: Sequence[Fragment] = ()) -> Group:
    """Generate the ``n`` samples of a prompt. ``known``: fragments of an earlier attempt, which are continued; those
    that do not fit the settings of this one (fewer samples, a lower limit) are left out.

    Raises RolloutError after ``terms.attempts`` failures without progress in between, ServerError for a request that
    no server would take (4xx), NonFiniteLogprob, WaitExpired when no server becomes ready.
    """
    responses = [Member(index) for index in range(n)]
    limit = terms.sampling.max_new_tokens
    for fragment in sorted(known, key=lambda f: f.start):
        if fragment.index >= n or fragment.end + (not fragment.finish_reason) > limit:
            continue
        response = responses[fragment.index]
        if fragment.start == response.length and not response.finish_reason:
            response.fragments.append(fragment)
            response.interrupted = not fragment.finish_reason
    one = _Rollout(prompt, terms)
    if not any(response.fragments for response in responses):
        await one.until_finished(responses)
    rest = [response for response in responses if not response.finish_reason]
    await _all([one.until_finished([response]) for response in rest])
    return Group(prompt, [one.sample(response) for response in responses])


class _Rollout:
    """``cache``: the weight version that the group began under. Its prefix cache is shared by what began under the same
    weights: where publishes keep the cache, a prompt's is not that of a group of long ago."""

    def __init__(self, prompt: Prompt, terms: Terms) -> None:
        self.prompt, self.terms = prompt, terms
        self.cache = ""

    async def until_finished(self, responses: Sequence[Member]) -> None:
        """Request fragments of the responses, which have equal prefixes, until a single one is finished, or several
        have tokens of their own."""
        failures: list[tuple[Server, ServerError]] = []
        while not responses[0].finish_reason:
            before = [response.length for response in responses]
            await self._request(responses, failures)
            if [response.length for response in responses] != before:
                failures.clear()
                if len(responses) > 1:
                    return
            elif len(failures) >= self.terms.attempts:
                met = "; ".join(str(error) for _, error in failures)
                raise RolloutError(
                    f"group {self.prompt.group_id}: {self._name(responses)} failed {len(failures)} times without "
                    f"progress (rollout.attempts={self.terms.attempts}): {met}"
                )

    def _name(self, responses: Sequence[Member]) -> str:
        which = f"sample {responses[0].index}" if len(responses) == 1 else "all samples"
        return f"{which} at token {responses[0].length}"

    async def _request(
        self, responses: Sequence[Member], failures: list[tuple[Server, ServerError]]
    ) -> None:
        """Make one request; append what it returns to ``responses``, or why it failed to ``failures``."""
        terms, first, count = self.terms, responses[0], len(responses)
        room = terms.sampling.max_new_tokens - first.length
        asked = min(terms.fragment_tokens, room)
        server = await terms.slots.acquire(
            count,
            (self.prompt.position, first.index),
            avoid=[server for server, _ in failures],
            prefer=first.server,
        )
        self.cache = self.cache or server.version
        torn = server.torn
        try:
            outputs = await server.client.generate(
                np.concatenate([self.prompt.tokens, first.tokens()]),
                replace(terms.sampling, max_new_tokens=asked),
                count,
                self.cache,
                self._seeds(responses),
            )
        except ServerError as error:
            if not error.retryable:
                raise
            log.warning("group %s: %s: %s", self.prompt.group_id, self._name(responses), error)
            self._lose(responses, asked)
            failures.append((server, error))
            if error.status == 0:
                await terms.mark_dead(server, f"{self.prompt.group_id}: {error}")
            return
        finally:
            terms.slots.release(server, count)
        if server.torn != torn:
            self._lose(responses, asked)
            return
        for response, output in zip(responses, outputs, strict=True):
            self._add(response, output, server)
        if not server.draining and all(o.finish_reason == "abort" for o in outputs):
            text = "aborted by the server itself"
            failures.append((server, ServerError(server.url, "/generate", 200, text)))

    def _seeds(self, responses: Sequence[Member]) -> list[int] | None:
        """A seed for each sample of the run. A continued response keeps its own, so that it goes on as if it had not
        been interrupted."""
        if self.terms.seed is None:
            return None
        names = (f"{self.terms.seed} {self.prompt.position} {r.index}" for r in responses)
        return [zlib.crc32(name.encode()) for name in names]

    def _lose(self, responses: Sequence[Member], asked: int) -> None:
        self.terms.counts.tokens_lost += asked * len(responses)
        for response in responses:
            response.interrupted = True

    def _add(self, response: Member, output: Generation, server: Server) -> None:
        terms, counts, start = self.terms, self.terms.counts, response.length
        tokens, reason = output.tokens, output.finish_reason
        if reason == "abort" and len(tokens):
            # Of an aborted request SGLang does not look whether its last token ends the response (EOS, a stop text).
            tokens = tokens[:-1]
            counts.tokens_lost += 1
        before = response.tokens()
        cut = stop_across_border(
            before, tokens, terms.sampling.stop, lambda t: terms.decode(t, True)
        )
        if cut is not None:
            counts.tokens_lost += len(tokens) - cut
            tokens, reason = tokens[:cut], "stop"
        elif reason != "stop":
            reason = "length" if start + len(tokens) >= terms.sampling.max_new_tokens else ""
        if not len(tokens):
            response.interrupted = True
            return
        fragment = Fragment(
            position=self.prompt.position,
            index=response.index,
            start=start,
            tokens=tokens,
            logprobs=output.logprobs[: len(tokens)],
            versions=_shifted(output.versions, start, start + len(tokens)),
            finish_reason=reason,
        )
        counts.fragments += 1
        counts.resumed += response.interrupted
        response.interrupted = output.finish_reason == "abort"
        # What was aborted finds no prefix in the cache: the publish that did it empties that.
        response.server = None if response.interrupted else server
        response.fragments.append(fragment)
        terms.keep(fragment)

    def sample(self, response: Member) -> Sample:
        tokens = response.tokens()
        spans = [span for fragment in response.fragments for span in fragment.versions]
        return Sample(
            group_id=self.prompt.group_id,
            index=response.index,
            prompt_tokens=self.prompt.tokens,
            response_tokens=tokens,
            rollout_logprobs=np.concatenate([f.logprobs for f in response.fragments]),
            loss_mask=np.ones(len(tokens), np.uint8),
            versions=_joined(spans),
            finish_reason=response.finish_reason,
            text=self.terms.decode(tokens, False),
        )


def _shifted(spans: Sequence[VersionSpan], start: int, end: int) -> tuple[VersionSpan, ...]:
    """The spans by place in the response, up to ``end``."""
    moved = [VersionSpan(s.version, s.start + start, min(s.end + start, end)) for s in spans]
    return tuple(span for span in moved if span.start < span.end)


def _joined(spans: Sequence[VersionSpan]) -> tuple[VersionSpan, ...]:
    """The spans with neighbours of one version as one."""
    found: list[VersionSpan] = []
    for span in spans:
        if found and found[-1].version == span.version:
            span = VersionSpan(span.version, found.pop().start, span.end)
        found.append(span)
    return tuple(found)


async def _all(parts: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run all; the first error cancels the others and is raised."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
