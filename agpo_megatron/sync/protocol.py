"""The controller's end of a publish: the order of calls that gives every rollout server the trainer's weights.

SGLang writes live tensors in place and stages nothing, so a transfer cannot be rolled back. A server is therefore
quarantined from the first byte until all of this held for it:

    stop dispatch -> end or set aside what runs -> pause_generation -> [open the update groups, when members changed]
    -> begin_weight_update -> buckets (no flush, no version) -> end_weight_update
    -> checksums equal those of the other servers, and the trainer's where they can be reproduced
    -> flush_cache -> update_weight_version -> continue_generation -> log-probs of fixed tokens equal the trainer's
    -> dispatch again

A server that fails gets everything again through a group of its own; the others go on, next time under a new membership
epoch. Nothing is generated on a paused server: that call would block.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace

from agpo_megatron.conversion.shape import TensorSpec
from agpo_megatron.rollout.client import ServerError
from agpo_megatron.rollout.pool import RolloutPool, Server, State
from agpo_megatron.sync.messages import PublishReport, TrainerPublishing, group_name
from agpo_megatron.types import WeightVersion
from agpo_megatron.wait import waiting_async

log = logging.getLogger(__name__)
TRANSFER_SHARE = 1 / 3
"""Of the publish's time for one pass, so that a hung server leaves time to send again to the healthy ones."""


class PublishError(RuntimeError):
    """No server holds the trainer's weights, or the trainer itself could not send them."""


@dataclass(frozen=True)
class Publication:
    """What a publish did. ``seconds`` by phase; ``bytes`` per server; ``servers``: urls that now serve ``version``."""

    version: WeightVersion
    servers: list[str]
    bytes: int
    seconds: dict[str, float]
    probe_diff_max: float


@dataclass(frozen=True)
class Membership:
    """The servers of the open update groups, in rank order. ``epoch`` names the groups."""

    epoch: str
    servers: tuple[Server, ...]


@dataclass
class _Transfer:
    """One pass over some servers. ``failed``: server -> why; a failed one takes no further part."""

    servers: list[Server]
    deadline: float
    failed: dict[Server, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    report: PublishReport | None = None
    probe_diff: float = 0.0

    @property
    def left(self) -> list[Server]:
        return [s for s in self.servers if s not in self.failed]

    @property
    def seconds_left(self) -> float:
        return max(0.1, self.deadline - time.monotonic())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started


class Publisher:
    """Publishes to the servers of ``pool``, and, between publishes, to one that comes back with other weights.

    ``plan``: by pipeline stage, the buckets that the trainer sends (``conversion.manifest``). ``server_ranks``: tensor
    parallel size of a server. ``backend``: gloo or nccl. ``probe_tokens``: sequence whose log-probs server and trainer
    must agree on within ``probe_tolerance``. ``timeout``: seconds for one publish, all included.
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
    ) -> None:
        self._pool, self._trainer, self._plan = pool, trainer, plan
        self._server_ranks, self._backend = server_ranks, backend
        self._probe_tokens, self._probe_tolerance = list(probe_tokens), probe_tolerance
        self._timeout = timeout
        self._members = Membership("", ())
        self._joined: dict[Server, list[str]] = {}
        self._epochs = 0
        self._name = f"publish-{secrets.token_hex(4)}"  # a server never takes a group name twice
        self._version: WeightVersion | None = None
        self._one_at_a_time = asyncio.Lock()
        pool.refresh = self._refresh

    async def publish(self, version: WeightVersion) -> Publication:
        """Bring every living server to ``version`` (the trainer's current step); waits for one if none lives.

        Returns when at least one serves it; its version carries the digest. Raises PublishError, WaitExpired.
        """
        deadline = time.monotonic() + self._timeout
        name = f"publish of weights {version.step}"
        async with self._one_at_a_time, waiting_async(name, self._timeout), self._dispatch_closed():
            self._version = replace(version, digest="")
            while True:
                await self._pool.wait_alive(1, deadline - time.monotonic())
                targets = [s for s in self._pool.servers if s.alive]
                transfers = [await self._transfer(targets)]
                transfers += [await self._transfer([s]) for s in transfers[0].failed if s.alive]
                if any(transfer.left for transfer in transfers):
                    return self._publication(transfers)
                why = "; ".join(f"{s.url}: {t.failed[s]}" for t in transfers for s in t.failed)
                if any(server.alive for server in self._pool.servers):
                    raise PublishError(f"no rollout server holds weights {version.step}: {why}")
                log.warning("publish: lost every rollout server (%s); waiting for one", why)

    async def _refresh(self, server: Server) -> None:
        """Give one quarantined server the current weights while the others serve."""
        async with self._one_at_a_time:
            if self._version is None or server.state is not State.QUARANTINED:
                return
            async with waiting_async(f"publish to {server.url} alone", self._timeout):
                transfer = await self._transfer([server])
            if transfer.failed:
                log.warning("publish to %s alone failed: %s", server.url, transfer.failed[server])

    @asynccontextmanager
    async def _dispatch_closed(self) -> AsyncIterator[None]:
        await self._pool.close_dispatch()
        try:
            yield
        finally:
            await self._pool.open_dispatch()

    def _publication(self, transfers: Sequence[_Transfer]) -> Publication:
        good = [transfer for transfer in transfers if transfer.left]
        assert self._version is not None and good[0].report is not None
        seconds: dict[str, float] = {}
        for transfer in transfers:
            for phase, took in transfer.seconds.items():
                seconds[phase] = seconds.get(phase, 0.0) + took
        return Publication(
            self._version,
            [server.url for transfer in good for server in transfer.left],
            sum(stage.bytes for stage in good[0].report.stages.values()),
            seconds,
            max(transfer.probe_diff for transfer in good),
        )

    # One pass

    async def _transfer(self, servers: Sequence[Server]) -> _Transfer:
        """The whole order for ``servers``. Afterwards each is READY or named in ``failed`` (QUARANTINED or DEAD)."""
        run = _Transfer(list(servers), time.monotonic() + self._timeout * TRANSFER_SHARE)
        with run.phase("drain"):
            await self._pool.drain(run.servers, run.seconds_left)
        with run.phase("pause"):
            for server in run.servers:
                await self._pool.quarantine(server, "receives new weights")
            await self._each(run, lambda s: s.client.pause("abort", run.seconds_left))
        with run.phase("open"):
            await self._open_groups(run)
        with run.phase("begin"):
            await self._each(run, lambda s: s.client.begin_update(run.seconds_left))
        with run.phase("send"):
            await self._send(run)
        with run.phase("end"):
            await self._each(run, lambda s: s.client.end_update(run.seconds_left))
        with run.phase("check"):
            expected, _ = await asyncio.gather(self._expected_logprobs(run), self._check(run))
        version = self._version_sent(run)
        with run.phase("resume"):
            await self._each(run, lambda s: self._resume(s, version, run))
        with run.phase("probe"):
            await self._each(run, lambda s: self._probe(s, expected, run))
        for server in run.left:
            await self._pool.mark_ready(server, str(version))
        if run.failed:
            self._members = Membership("", ())
        if run.left:
            self._version = version
        return run

    async def _each(self, run: _Transfer, call: Callable[[Server], Awaitable[object]]) -> None:
        """``call(server)`` on all servers left, at once; one that fails leaves the transfer."""

        async def guarded(server: Server) -> None:
            try:
                await call(server)
            except ServerError as error:
                await self._fail(run, server, str(error), dead=error.status == 0)

        await asyncio.gather(*(guarded(server) for server in run.left))

    async def _fail(self, run: _Transfer, server: Server, reason: str, dead: bool = False) -> None:
        log.error("publish: %s leaves the transfer: %s", server.url, reason)
        run.failed[server] = reason
        await (self._pool.mark_dead if dead else self._pool.quarantine)(server, reason)

    async def _open_groups(self, run: _Transfer) -> None:
        """One group per stage for exactly the servers left; kept from publish to publish while they stay the same."""
        servers = tuple(run.left)
        if servers == self._members.servers:
            return
        assert self._version is not None
        self._epochs += 1
        epoch = f"{self._name}-epoch{self._epochs}"
        self._members = Membership(epoch, servers)
        await self._each(run, lambda s: self._leave_groups(s, run))
        world_size = 1 + len(servers) * self._server_ranks
        addresses = await self._trainer.publish_open(epoch, world_size)
        for stage, address in sorted(addresses.items()):
            await self._each(run, lambda s: self._join(s, stage, address, world_size, run))  # noqa: B023 (awaited here)

    async def _join(
        self, server: Server, stage: int, address: tuple[str, int], world_size: int, run: _Transfer
    ) -> None:
        offset = 1 + self._members.servers.index(server) * self._server_ranks
        name = group_name(self._members.epoch, stage)
        self._joined.setdefault(server, []).append(name)
        await server.client.init_group(
            name, address, offset, world_size, self._backend, run.seconds_left
        )

    async def _leave_groups(self, server: Server, run: _Transfer) -> None:
        for name in self._joined.pop(server, []):
            try:
                await server.client.destroy_group(name, run.seconds_left)
            except ServerError as error:
                if error.status == 0:
                    raise
                log.debug("publish: %s", error)  # a restarted server does not know the group

    async def _send(self, run: _Transfer) -> None:
        """Trainer and servers at the same time; the servers' HTTP calls carry the errors and the deadline."""
        if not run.left:
            return
        assert self._version is not None
        receiving = asyncio.create_task(self._each(run, lambda s: self._receive(s, run)))
        try:
            run.report = await self._trainer.publish_send(self._version)
            # After an error the trainer has closed the groups, so the servers' calls end too.
            await receiving
        finally:
            receiving.cancel()
        errors = [f"stage {n}: {s.error}" for n, s in run.report.stages.items() if s.error]
        if run.report.step != self._version.step:
            errors.append(f"the trainer holds step {run.report.step}, not {self._version.step}")
        if errors:
            reason = f"the trainer did not send: {'; '.join(errors)}"
            for server, met in run.failed.items():
                run.failed[server] = f"{reason} ({met})"
            for server in run.left:
                await self._fail(run, server, reason)

    async def _receive(self, server: Server, run: _Transfer) -> None:
        try:
            for stage, buckets in enumerate(self._plan):
                for bucket in buckets:
                    await server.client.receive_bucket(
                        group_name(self._members.epoch, stage),
                        [spec.name for spec in bucket],
                        [spec.dtype for spec in bucket],
                        [spec.shape for spec in bucket],
                        run.seconds_left,
                    )
        except ServerError as error:
            # Closing its end releases the trainer, and the other servers, from a broadcast that it will not join.
            if error.status:
                await self._leave_groups(server, run)
            raise

    def _version_sent(self, run: _Transfer) -> WeightVersion:
        """The version with a digest of what all stages sent."""
        assert self._version is not None
        stages = run.report.stages if run.report else {}
        text = " ".join(f"{number}:{stage.digest}" for number, stage in sorted(stages.items()))
        return replace(self._version, digest=hashlib.sha256(text.encode()).hexdigest()[:12])

    # Is it what was sent?

    async def _expected_logprobs(self, run: _Transfer) -> list[float]:
        return await self._trainer.score_tokens(self._probe_tokens) if run.left else []

    async def _check(self, run: _Transfer) -> None:
        """Compare the servers' weight checksums with the trainer's, or, where those are not known, with each other."""
        found: dict[Server, list[dict[str, str]]] = {}

        async def fetch(server: Server) -> None:
            found[server] = await server.client.checksums(run.seconds_left)

        await self._each(run, fetch)
        if run.report is None:
            return
        stages = run.report.stages.values()
        expected = {k: v for s in stages for k, v in (s.checksums or {}).items()}
        known = all(s.checksums is not None for s in stages) and self._server_ranks == 1
        for server in run.left:
            if known:
                wrong = differing(expected, found[server][0])
                other = "the trainer's"
            else:
                same = sum(found[server] == found[s] for s in run.left)
                wrong = [] if 2 * same > len(run.left) else ["weights"]
                other = "most servers'"
            if wrong:
                shown = ", ".join(wrong[:4]) + (" ..." if len(wrong) > 4 else "")
                await self._fail(run, server, f"checksums differ from {other}: {shown}")

    async def _resume(self, server: Server, version: WeightVersion, run: _Transfer) -> None:
        await server.client.flush_cache(run.seconds_left)
        await server.client.set_weight_version(str(version), run.seconds_left)
        await server.client.continue_generation(run.seconds_left)

    async def _probe(self, server: Server, expected: Sequence[float], run: _Transfer) -> None:
        found = await server.client.score(self._probe_tokens, timeout=run.seconds_left)
        diff = max(abs(a - b) for a, b in zip(found, expected, strict=True))
        run.probe_diff = max(run.probe_diff, diff)
        if not diff <= self._probe_tolerance:  # also when it is NaN
            await self._fail(
                run,
                server,
                f"log-probs of fixed tokens differ from the trainer's by up to {diff:.2e} "
                f"(allowed: {self._probe_tolerance:.0e})",
            )


def differing(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Names in ``expected`` whose hash in ``found`` is another or missing (``found`` may hold constant buffers too)."""
    return sorted(name for name, value in expected.items() if found.get(name) != value)


def fixed_tokens(vocab_size: int, count: int = 32) -> list[int]:
    """The same spread-out token ids on every call: a probe sequence."""
    return [(7919 * i + 13) % vocab_size for i in range(1, count + 1)]
