"""The in-order window: which prompts may be begun, and which groups form the next batch. Pure: no clock, no I/O.

Batch k takes the next groups in prompt position that are accepted; which prompts form a batch depends on positions and
on what was generated, never on when it was finished. A position may be begun while its batch is at most
``max_staleness`` batches after the last whose weights are published, so staleness is bounded by construction, nothing
is discarded for its age, and no response is chosen because it was short (nemo-rl's ``in_order`` sampler has the same
idea).

Under dynamic sampling a position's batch is known only once the groups before it are. Positions are begun for as many
accepted groups as are *expected*, by the share accepted of late; the surplus belongs to the next batch. Should all
of it be accepted, it is one batch at most, and so is the staleness that it adds.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum


class Fate(Enum):
    """The end of a group: it trains; it is replaced (dynamic sampling); it could not be generated."""

    ACCEPTED = "accepted"
    UNIFORM = "uniform"
    SET_ASIDE = "set aside"


@dataclass(frozen=True)
class Taken:
    """The prompt positions of a batch, in order, and those replaced by later ones. ``cursor``: the position after the
    last one used or replaced."""

    positions: list[int]
    discarded: list[int]
    cursor: int


@dataclass
class _Reach:
    """The reach of a row of groups: ``batch`` is that of the next one, from 0 for the next batch to form."""

    size: int
    examined: int | None
    batch: int = 0
    accepted: float = 0.0
    looked: int = 0

    def look(self, accepted: float) -> None:
        self.accepted += accepted
        self.looked += 1
        if self.accepted >= self.size - 1e-9 or self.looked == self.examined:
            self.batch, self.accepted, self.looked = self.batch + 1, 0.0, 0


class Window:
    """``size``: groups of a batch. ``batches``: left to form in this run. ``cursor``: position of the first prompt.
    ``examined``: under dynamic sampling, positions to look at for a batch at most, after which uniform groups fill it;
    None without it, when uniform groups are accepted."""

    def __init__(
        self,
        size: int,
        max_staleness: int,
        batches: int,
        cursor: int = 0,
        examined: int | None = None,
    ) -> None:
        self.size, self.max_staleness, self.batches = size, max_staleness, batches
        self.cursor = self.admitted = cursor
        self.formed = self.published = 0
        self._examined = examined
        self._fates: dict[int, Fate] = {}
        self._accepted = 0
        self._recent: deque[bool] = deque()
        self._recent_accepted = 0

    @property
    def open(self) -> int:
        """Number of groups that are begun and not finished."""
        return self.admitted - self.cursor - len(self._fates)

    @property
    def ready(self) -> int:
        """Number of finished groups that wait for their batch."""
        return self._accepted

    @property
    def acceptance(self) -> float:
        """Share of groups accepted of late; 1 before anything is known."""
        return (self._recent_accepted + 1) / (len(self._recent) + 1)

    def admit(self) -> list[int]:
        """Return the positions to begin now, lowest first."""
        ahead = self.published + self.max_staleness + 1 - self.formed
        begun = self.admitted
        if self._examined is None:
            wanted = min(ahead, self.batches - self.formed) * self.size
            self.admitted += max(0, wanted - self._accepted - self.open)
        else:
            expected, at_most = self._reach(self.acceptance), self._reach(1.0)
            while (
                expected.batch < min(ahead, self.batches - self.formed)
                and at_most.batch < ahead + 1
            ):
                self.admitted += 1
                expected.look(self.acceptance)
                at_most.look(1.0)
        return list(range(begun, self.admitted))

    def _reach(self, share: float) -> _Reach:
        """Return the batch that the next position to begin belongs to, if of each unfinished group a ``share`` is
        accepted."""
        reach = _Reach(self.size, self._examined)
        for position in range(self.cursor, self.admitted):
            fate = self._fates.get(position)
            if fate is not Fate.SET_ASIDE:
                reach.look(share if fate is None else float(fate is Fate.ACCEPTED))
        return reach

    def finish(self, position: int, fate: Fate) -> None:
        """Note what became of a position that was begun."""
        assert self.cursor <= position < self.admitted and position not in self._fates
        if self._examined is None and fate is Fate.UNIFORM:
            fate = Fate.ACCEPTED
        self._fates[position] = fate
        self._accepted += fate is Fate.ACCEPTED
        if fate is not Fate.SET_ASIDE:
            self._recent.append(fate is Fate.ACCEPTED)
            self._recent_accepted += self._recent[-1]
        if len(self._recent) > 4 * self.size:
            self._recent_accepted -= self._recent.popleft()

    def take(self) -> Taken | None:
        """Return the next batch, and go past it; None while a group that decides about it is unfinished."""
        chosen: list[int] = []
        uniform: list[int] = []
        position = self.cursor
        while len(chosen) < self.size:
            if len(chosen) + len(uniform) == self._examined:
                missing = self.size - len(chosen)
                chosen, uniform = chosen + uniform[:missing], uniform[missing:]
                break
            fate = self._fates.get(position)
            if fate is None:
                return None
            if fate is not Fate.SET_ASIDE:
                (chosen if fate is Fate.ACCEPTED else uniform).append(position)
            position += 1
        for passed in range(self.cursor, position):
            self._accepted -= self._fates.pop(passed) is Fate.ACCEPTED
        self.cursor, self.formed = position, self.formed + 1
        return Taken(chosen, uniform, position)

    def publish(self) -> None:
        """Note that the weights after the next formed batch are on the servers."""
        self.published += 1
