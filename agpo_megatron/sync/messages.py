"""The messages of trainer and controller about a publish. Plain data: it crosses the command channel as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from agpo_megatron.samples import WeightVersion


@dataclass(frozen=True)
class StageReport:
    """The result of one pipeline stage. ``error`` is "" when all of it was sent; then ``digest`` identifies it.

    ``checksums``: what a CPU server must report for these weights, by its own names; None where the server's hash is
    not reproduced. ``excerpts``: digests (``rollout.excerpts``) of those asked for that are of this stage. ``bytes``:
    sent per server.
    """

    digest: str
    bytes: int = 0
    seconds: float = 0.0
    checksums: Mapping[str, str] | None = None
    excerpts: Mapping[str, str] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class PublishReport:
    """All stages' reports by stage number. ``step``: the optimizer step whose weights the trainer holds."""

    step: int
    stages: Mapping[int, StageReport]


class TrainerPublishing(Protocol):
    """The trainer's part in publishing; the controller's trainer client implements it.

    A failed transfer comes back in ``StageReport.error``, so that the trainer lives on; a failed trainer raises.
    ``seconds``: of each call, the time after which nobody needs its result any more.
    """

    async def publish_open(
        self, epoch: str, world_size: int, seconds: float
    ) -> Mapping[int, tuple[str, int]]:
        """Each stage's source opens a fresh group of ``world_size`` (itself and the servers' ranks), named
        ``group_name(epoch, stage)``, closing the one before, which releases members that wait in it; returns
        (host, port) by stage without waiting for members.
        """
        ...

    async def publish_send(
        self, version: WeightVersion, seconds: float, excerpts: Mapping[str, int]
    ) -> PublishReport:
        """Broadcast all buckets of all stages through the open groups; a trainer that holds another step than
        ``version.step`` refuses (``WeightSource.refuse``). Gives up, and closes the groups, after ``seconds``.
        ``excerpts``: number of leading rows, by tensor, to report a digest of."""
        ...

    async def score_tokens(self, tokens: list[int], seconds: float) -> tuple[int, list[float]]:
        """The step whose weights the trainer holds, and log-probs of ``tokens[1:]`` at temperature 1 under them."""
        ...


def group_name(epoch: str, stage: int) -> str:
    """Name of a stage's update group; both ends derive it, since it is part of the rendezvous keys."""
    return f"{epoch}-stage{stage}"
