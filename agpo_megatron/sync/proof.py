"""Does a server hold what was sent? By its hashes, against three things, and by excerpts of its weights.

* **itself**: hashes that a server rank reported of other weights before mean that it ignored the update. The digest of
  what the trainer sent says whether these are other weights, so unchanged ones (a closed gate) refuse nothing.
* **the trainer**, where it reproduces the servers' hashes (CPU, one rank per server).
* elsewhere **the other servers**, of which most must agree, and **excerpts** that are read back and compared with what
  was sent bit by bit: a few tensors of each publish, others every time (``rollout.excerpts`` says of which models).

The first needs one tensor of every server rank to change with the digest. With billions of values it does; a change so
small that it reaches the part of one rank only would be refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from agpo_megatron.rollout.client import ServerError
from agpo_megatron.rollout.excerpts import chosen, excerpt_digest
from agpo_megatron.rollout.servers import Server
from agpo_megatron.sync.transfer import Transfer

Hashes = list[dict[str, str]]
"""Hash of every weight by name, per tensor-parallel rank of a server."""


class Proof:
    """``server_ranks``: tensor-parallel size of a server. ``readable``: tensors that servers give back, with the number
    of rows; empty: excerpts are not used."""

    def __init__(self, server_ranks: int, readable: Mapping[str, int]) -> None:
        self._server_ranks, self._readable = server_ranks, readable
        self._reported: dict[Server, Hashes] = {}  # of the current version, by good transfers
        self._agreed: Hashes | None = None
        self._digest_of: dict[str, str] = {}  # of what was sent, by what a rank then reported

    def begin(self) -> None:
        """A publish begins: what servers reported of the version before is not to be agreed with."""
        self._agreed = None
        self._reported.clear()

    def excerpts(self, step: int) -> dict[str, int]:
        """Tensors of which the trainer must report excerpts, with the number of rows."""
        return chosen(self._readable, step)

    async def check(self, run: Transfer) -> None:
        """Let the servers that do not hold what was sent leave the transfer."""
        found: dict[Server, Hashes] = {}

        async def fetch(server: Server) -> None:
            found[server] = await server.client.checksums(run.call_seconds)

        await run.each(fetch)
        if run.report is None:
            return
        for server in run.left:
            if reason := self._ignored(found[server], run.version.digest):
                await run.fail(server, reason)
        await self._compare_hashes(run, found)
        await run.each(lambda server: self._compare_excerpts(server, run))
        for server in run.left:
            for key in _keys(found[server]):
                self._digest_of[key] = run.version.digest

    def _ignored(self, found: Hashes, digest: str) -> str:
        """Why these hashes cannot be of the weights ``digest``, or ""."""
        for rank, key in enumerate(_keys(found)):
            before = self._digest_of.get(key, digest)
            if before != digest:
                return f"ignored the update: rank {rank} reports the hashes of weights {before}, {digest} was sent"
        return ""

    async def _compare_hashes(self, run: Transfer, found: Mapping[Server, Hashes]) -> None:
        assert run.report is not None
        stages = run.report.stages.values()
        if self._server_ranks == 1 and all(stage.checksums is not None for stage in stages):
            sent = {k: v for stage in stages for k, v in (stage.checksums or {}).items()}
            agreed: Hashes | None = [sent]
            whose = "the trainer's"
        else:
            self._reported.update({server: found[server] for server in run.left})
            if self._agreed is None:
                self._agreed = majority(list(self._reported.values()))
            agreed = self._agreed
            whose = "those of most servers"
        for server in run.left:
            if agreed is None:
                await run.fail(server, "the servers' checksums differ, and no majority agrees")
            elif wrong := differing(agreed, found[server]):
                shown = ", ".join(wrong[:4]) + (" ..." if len(wrong) > 4 else "")
                await run.fail(server, f"checksums differ from {whose}: {shown}")

    async def _compare_excerpts(self, server: Server, run: Transfer) -> None:
        assert run.report is not None
        sent = {k: v for stage in run.report.stages.values() for k, v in stage.excerpts.items()}
        for name, rows in self.excerpts(run.version.step).items():
            answer = await server.client.leading_rows(name, rows, run.call_seconds)
            try:
                same = excerpt_digest(answer) == sent.get(name)
            except ValueError as error:
                raise ServerError(server.url, "/get_weights_by_name", 200, str(error)) from error
            if not same:
                await run.fail(server, f"{name} read back is not what was sent")
                return


def _keys(found: Hashes) -> list[str]:
    """Identify what each rank reports."""
    texts = [json.dumps([rank, sorted(hashes.items())]) for rank, hashes in enumerate(found)]
    return [hashlib.sha256(text.encode()).hexdigest() for text in texts]


def majority(reports: Sequence[Hashes]) -> Hashes | None:
    """Return the hashes that more than half of the servers report; None when no such half agrees."""
    return next((r for r in reports if 2 * reports.count(r) > len(reports)), None)


def differing(expected: Hashes, found: Hashes) -> list[str]:
    """Names in ``expected`` whose hash in ``found`` is another or missing (``found`` may hold constant buffers too)."""
    pairs = zip(expected, found, strict=True)
    return sorted({name for e, f in pairs for name, value in e.items() if f.get(name) != value})
