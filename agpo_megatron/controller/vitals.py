"""Readings of every role at a moment, as the controller knows it: for Prometheus, and the memory metrics of a step."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

from agpo_megatron.cluster.start_folder import StartFolder
from agpo_megatron.controller.schedule import Window
from agpo_megatron.controller.trainer_client import TrainerClient
from agpo_megatron.observe.exporter import Reading
from agpo_megatron.reward.rewards import Rewards
from agpo_megatron.rollout.pool import RolloutPool
from agpo_megatron.rollout.servers import State
from agpo_megatron.wait import open_phases

ROLE_KINDS = {"controller": "controller", "trainer": "trainer", "rollout": "servers"}
"""First word of a role's name -> its kind in metrics."""


class Vitals:
    """Takes the readings. ``pool``, ``rewards`` and ``window`` are set once they are there, and not in every
    mode."""

    def __init__(self, start: StartFolder, trainers: TrainerClient) -> None:
        self._start, self._trainers = start, trainers
        self.pool: RolloutPool | None = None
        self.rewards: Rewards | None = None
        self.window: Window | None = None

    def readings(self) -> Iterator[Reading]:
        """The gauges of ``observe.exporter.LIVE``, as of now."""
        yield from self._phases()
        for rank, status in sorted(self._trainers.ranks.items()):
            label = {"rank": str(rank)}
            heard = time.monotonic() - status.seen
            yield Reading("agpo_live_heartbeat_age_seconds", heard, label)
            if status.device_bytes:
                yield Reading("agpo_live_device_memory_bytes", status.device_bytes, label)
        yield _busy("trainer", self._trainers.busy_seconds)
        for role, size in self.host_memory().items():
            yield Reading("agpo_live_memory_bytes", size, {"role": role})
        if self.pool:
            yield from _pool(self.pool)
        if self.rewards:
            yield _busy("rewards", self.rewards.pool.busy_seconds)
        if self.window:
            yield Reading("agpo_live_window_ready_groups", self.window.ready)
            yield Reading("agpo_live_window_open_groups", self.window.open)

    def _phases(self) -> Iterator[Reading]:
        """Phases by name without numbers, of which there are few; of several the longest."""
        now = time.time()
        found: dict[tuple[str, str], float] = {}
        phases = [("controller", phase.name, phase.since) for phase in open_phases()]
        ranks = sorted(self._trainers.ranks.items())
        phases += [(f"trainer rank {rank}", s.phase, s.since) for rank, s in ranks]
        for role, name, since in phases:
            key = role, re.sub(r"\d+(\.\d+)*", "N", name)
            found[key] = max(found.get(key, 0.0), now - since)
        for (role, phase), seconds in found.items():
            yield Reading("agpo_live_phase_seconds", seconds, {"role": role, "phase": phase})

    def host_memory(self) -> dict[str, int]:
        """Bytes by kind of role, of the largest role of each, as the supervisors last wrote them."""
        largest: dict[str, int] = {}
        for role, size in self._start.memory().items():
            kind = ROLE_KINDS[role.split()[0]]
            largest[kind] = max(largest.get(kind, 0), size)
        return largest

    def memory(self) -> dict[str, float]:
        """The ``memory/`` metrics of a step, in GB (10^9 bytes)."""
        found = {f"memory/{kind}_gb": size / 1e9 for kind, size in self.host_memory().items()}
        if device := max((s.device_bytes for s in self._trainers.ranks.values()), default=0):
            found["memory/trainer_device_gb"] = device / 1e9
        return found


def _busy(role: str, seconds: float) -> Reading:
    return Reading("agpo_live_busy_seconds_total", seconds, {"role": role})


def _pool(pool: RolloutPool) -> Iterator[Reading]:
    yield Reading("agpo_live_dispatch_open", float(pool.dispatch_open))
    yield Reading("agpo_live_samples_waiting", pool.slots.waiting + pool.slots_beside.waiting)
    yield _busy("servers", pool.slots.busy_seconds / len(pool.servers))
    for number, server in enumerate(pool.servers):
        label = {"server": str(number)}
        yield Reading("agpo_live_samples_in_flight", server.in_flight, label)
        for state in State:
            labels = {**label, "state": state.value}
            yield Reading("agpo_live_server_state", float(server.state is state), labels)
