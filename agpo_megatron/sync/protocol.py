"""The controller's end of a publish: the order of calls that gives every rollout server the trainer's weights.

SGLang writes live tensors in place and stages nothing, so a transfer cannot be rolled back. A server is therefore
quarantined from the first byte until all of this held for it:

    stop dispatch -> end what runs -> pause_generation -> [open the update groups, when members changed]
    -> begin_weight_update, the trainer scores fixed tokens -> buckets (no flush, no version) -> end_weight_update
    -> every rank's checksums are others than those of other weights, and the trainer's (sync/proof.py)
    -> flush_cache -> update_weight_version -> continue_generation -> log-probs of fixed tokens equal the trainer's
    -> dispatch again

A server that fails gets everything again through a group of its own; the others go on, next time under a new membership
epoch. A server that hangs costs the time of one call; it is DEAD then, and must receive everything when it comes back:
a publish begins by taking the version from all servers. Deadlines are nested, the trainer's broadcast first, then the
servers' calls, the pass, the trainer's command and the publish, so that one that expires leaves time to go on. Nothing
is generated on a paused server: that call would block.

With ``keep_running`` a publish ends nothing: requests are paused ``in_place`` and go on afterwards, with the new
weights on the cache of the old ones, which is not flushed. What a server returns that leaves such a transfer, or is
part of one that breaks off, is thrown away.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from agpo_megatron.conversion.shape import TensorSpec
from agpo_megatron.rollout.client import ServerError
from agpo_megatron.rollout.pool import RolloutPool
from agpo_megatron.rollout.servers import Server, State
from agpo_megatron.samples import WeightVersion
from agpo_megatron.sync.groups import UpdateGroups
from agpo_megatron.sync.messages import PublishReport, TrainerPublishing
from agpo_megatron.sync.proof import Proof
from agpo_megatron.sync.transfer import Transfer
from agpo_megatron.wait import waiting_async

log = logging.getLogger(__name__)
TRANSFER_SHARE = 1 / 3
"""Part of the publish's remaining time for one pass, so that a hung server leaves time to retry the healthy ones."""
SEND_SHARE = 0.6
"""Part of the pass's remaining time for the trainer to send."""
RECEIVE_SHARE = 0.8
"""The same for the servers to receive: longer, so that the trainer's end decides."""
UNMOVED = (
    "publish: %s is bit for bit what was published before, although the optimizer stepped on a gradient; either the "
    "learning rate is below what the servers' precision resolves, or the trainer's steps do not reach its weights"
)


class PublishError(RuntimeError):
    """No server holds the trainer's weights, or the trainer itself could not send them."""


@dataclass(frozen=True)
class Publication:
    """Result of a publish. ``seconds`` by phase; ``bytes`` per server; ``servers``: urls that now serve ``version``."""

    version: WeightVersion
    servers: list[str]
    bytes: int
    seconds: dict[str, float]
    probe_diff_max: float


class Publisher:
    """Publishes to the servers of ``pool``, and, between publishes, to one that comes back with other weights.

    ``plan``: by pipeline stage, the buckets that the trainer sends (``conversion.manifest``). ``server_ranks``: tensor
    parallel size of a server. ``backend``: gloo or nccl. ``probe_tokens``: sequence whose log-probs server and trainer
    must agree on within ``probe_tolerance``. ``timeout``: seconds for one publish, all included. ``keep_running``: see
    the module; the first publish ends what an earlier controller has left running all the same. ``readable``: as of
    ``sync.proof.Proof``.
    """

    def __init__(
        self,
        pool: RolloutPool,
        trainer: TrainerPublishing,
        plan: Sequence[Sequence[Sequence[TensorSpec]]],
        *,
        server_ranks: int,
        backend: str,
        probe_tokens: Sequence[int],
        probe_tolerance: float,
        timeout: float,
        keep_running: bool = False,
        readable: Mapping[str, int] | None = None,
    ) -> None:
        self._pool, self._trainer, self._plan = pool, trainer, plan
        self._probe_tokens, self._probe_tolerance = list(probe_tokens), probe_tolerance
        self._timeout = timeout
        self._keep_running, self._is_first = keep_running, True
        self._groups = UpdateGroups(trainer, server_ranks, backend)
        self._version: WeightVersion | None = (
            None  # None: a publish waits for its turn, or there was none
        )
        self._proof = Proof(server_ranks, readable or {})
        self._digest = ""  # of the last publish that reached a server
        self._one_at_a_time = asyncio.Lock()
        pool.refresh = self._refresh

    async def publish(self, version: WeightVersion, *, moved: bool = False) -> Publication:
        """Bring every living server to ``version`` (the trainer's current step); waits for one if none lives.

        ``moved``: a step with a gradient lies between it and the version before; that not one published bit has
        changed is then worth a warning. Returns when at least one server has it; its version carries the digest.
        Raises PublishError, WaitExpired.
        """
        self._version = None  # no server needs the weights of before any more
        name = f"publish of weights {version.step}"
        async with self._turn(name) as deadline, self._dispatch_closed():
            self._version = replace(version, digest="")
            self._proof.begin()
            # Also of servers that are dead now: they miss this publish.
            await self._pool.retire_versions(f"awaits weights {version.step}")
            while True:
                await self._pool.wait_alive(1, deadline - time.monotonic())
                targets = [s for s in self._pool.servers if s.alive]
                keep = self._keep_running and not self._is_first
                transfers = [await self._transfer(targets, self._version, deadline, keep)]
                transfers += [
                    await self._transfer([s], self._version, deadline)
                    for s in transfers[0].failed
                    if s.alive
                ]
                if any(transfer.left for transfer in transfers):
                    self._is_first = False
                    publication = _publication(transfers)
                    if moved and publication.version.digest == self._digest:
                        log.warning(UNMOVED, publication.version)
                    self._digest = publication.version.digest
                    return publication
                why = "; ".join(f"{s.url}: {t.failed[s]}" for t in transfers for s in t.failed)
                if any(server.alive for server in self._pool.servers):
                    raise PublishError(f"no rollout server holds weights {version.step}: {why}")
                log.warning("publish: lost every rollout server (%s); waiting for one", why)

    async def _refresh(self, server: Server) -> None:
        """Give one quarantined server the current weights while the others serve; not while a publish is under way.

        To wait for its turn here would hold up the probe, and with it the revival that the publish may wait for.
        """
        if self._one_at_a_time.locked():
            return
        async with self._turn(f"publish to {server.url} alone") as deadline:
            if self._version is None or server.state is not State.QUARANTINED:
                return
            transfer = await self._transfer([server], self._version, deadline)
            if transfer.failed:
                log.warning("publish to %s alone failed: %s", server.url, transfer.failed[server])

    @asynccontextmanager
    async def _turn(self, name: str) -> AsyncIterator[float]:
        """One publish at a time; yields its deadline (monotonic seconds), which begins with its turn."""
        async with waiting_async(f"the turn of the {name}", self._timeout):
            await self._one_at_a_time.acquire()
        try:
            async with waiting_async(name, self._timeout):
                yield time.monotonic() + self._timeout
        finally:
            self._one_at_a_time.release()

    @asynccontextmanager
    async def _dispatch_closed(self) -> AsyncIterator[None]:
        await self._pool.close_dispatch()
        try:
            yield
        finally:
            await self._pool.open_dispatch()

    # One pass

    async def _transfer(
        self,
        servers: Sequence[Server],
        version: WeightVersion,
        deadline: float,
        keep_running: bool = False,
    ) -> Transfer:
        """The whole order for ``servers``. Afterwards each is READY or named in ``failed`` (QUARANTINED or DEAD)."""
        now = time.monotonic()
        until = now + TRANSFER_SHARE * (deadline - now)
        run = Transfer(self._pool, list(servers), version, until, keep_running)
        try:
            await self._execute(run)
        except BaseException:
            self._groups.forget()
            for server in run.left:  # what runs there may go on with weights that are half written
                server.torn += 1
            raise
        if run.failed:
            self._groups.forget()
        if run.left and self._version is not None:
            self._version = run.version
        return run

    async def _execute(self, run: Transfer) -> None:
        if not run.keep_running:
            with run.phase("drain"):
                await self._pool.drain(run.servers, run.call_seconds)
        with run.phase("pause"):
            for server in run.servers:
                if server.alive:
                    await self._pool.quarantine(server, "receives new weights")
                else:
                    run.failed[server] = server.reason
            await run.each(lambda s: self._pause(s, run))
        with run.phase("open"):
            await self._groups.open(run)
        with run.phase("begin"):
            # The trainer scores what it is about to send: afterwards an update may have changed its weights.
            expected, _ = await asyncio.gather(
                self._expected_logprobs(run),
                run.each(lambda s: s.client.begin_update(run.call_seconds)),
            )
        with run.phase("send"):
            await self._send(run)
        with run.phase("end"):
            await run.each(lambda s: s.client.end_update(run.call_seconds))
        with run.phase("check"):
            await self._proof.check(run)
        with run.phase("resume"):
            await run.each(lambda s: self._resume(s, run))
        with run.phase("probe"):
            await run.each(lambda s: self._probe(s, expected, run))
        for server in run.left:
            await self._pool.mark_ready(server, str(run.version))

    async def _send(self, run: Transfer) -> None:
        """Trainer and servers at the same time. The trainer gives up first, which releases the servers that wait with
        it for one that hangs; that one's call then ends at its own deadline, and the pass has time left."""
        if not run.left:
            return
        until = time.monotonic() + RECEIVE_SHARE * run.seconds_left
        receiving = asyncio.create_task(run.each(lambda s: self._receive(s, until, run)))
        try:
            run.report = await self._trainer.publish_send(
                run.version,
                SEND_SHARE * run.seconds_left,
                self._proof.excerpts(run.version.step),
            )
            await receiving
        finally:
            receiving.cancel()
        errors = [f"stage {n}: {s.error}" for n, s in run.report.stages.items() if s.error]
        if run.report.step != run.version.step:
            errors.append(f"the trainer holds step {run.report.step}, not {run.version.step}")
        sent = _with_digest(run.version, run.report)
        if not errors and run.version.digest not in ("", sent.digest):
            errors.append(f"digest {sent.digest} instead of {run.version.digest} as before")
        run.version = sent
        if errors:
            reason = f"the trainer did not send: {'; '.join(errors)}"
            for server, met in run.failed.items():
                run.failed[server] = f"{reason} ({met})"
            for server in run.left:
                await run.fail(server, reason)

    async def _receive(self, server: Server, until: float, run: Transfer) -> None:
        try:
            for stage, buckets in enumerate(self._plan):
                for bucket in buckets:
                    await server.client.receive_bucket(
                        self._groups.name(stage),
                        [spec.name for spec in bucket],
                        [spec.dtype for spec in bucket],
                        [spec.shape for spec in bucket],
                        max(0.1, until - time.monotonic()),
                    )
        except ServerError as error:
            # Closing its end releases the trainer, and the other servers, from a broadcast that it will not join.
            if error.status:
                await self._groups.leave(server, run)
            raise

    # Is it what was sent?

    async def _expected_logprobs(self, run: Transfer) -> list[float] | None:
        """None when the trainer holds other weights, so that it cannot say."""
        if not run.left:
            return None
        step, logprobs = await self._trainer.score_tokens(self._probe_tokens, run.seconds_left)
        if step != run.version.step:
            log.warning("publish: the trainer scored under step %d, not %s", step, run.version)
            return None
        return logprobs

    async def _pause(self, server: Server, run: Transfer) -> None:
        server.paused = run.keep_running
        await server.client.pause("in_place" if run.keep_running else "abort", run.call_seconds)

    async def _resume(self, server: Server, run: Transfer) -> None:
        if not run.keep_running:  # the server refuses while requests run
            await server.client.flush_cache(run.call_seconds)
        await server.client.set_weight_version(str(run.version), run.call_seconds)
        await server.client.continue_generation(run.call_seconds)
        server.paused = False

    async def _probe(self, server: Server, expected: Sequence[float] | None, run: Transfer) -> None:
        found = await server.client.score(self._probe_tokens, timeout=run.call_seconds)
        if expected is None:
            return
        diff = max(abs(a - b) for a, b in zip(found, expected, strict=True))
        run.probe_diff = max(run.probe_diff, diff)
        if not diff <= self._probe_tolerance:  # also when it is NaN
            await run.fail(
                server,
                f"log-probs of fixed tokens differ from the trainer's by up to {diff:.2e} "
                f"(allowed: {self._probe_tolerance:.0e})",
            )


def _publication(transfers: Sequence[Transfer]) -> Publication:
    good = [transfer for transfer in transfers if transfer.left]
    assert good[0].report is not None
    seconds: dict[str, float] = {}
    for transfer in transfers:
        for phase, took in transfer.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + took
    return Publication(
        good[0].version,
        [server.url for transfer in good for server in transfer.left],
        sum(stage.bytes for stage in good[0].report.stages.values()),
        seconds,
        max(transfer.probe_diff for transfer in good),
    )


def _with_digest(version: WeightVersion, report: PublishReport) -> WeightVersion:
    """The version with a digest of what all stages sent."""
    text = " ".join(f"{number}:{stage.digest}" for number, stage in sorted(report.stages.items()))
    return replace(version, digest=hashlib.sha256(text.encode()).hexdigest()[:12])
