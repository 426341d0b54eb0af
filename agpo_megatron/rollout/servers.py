"""The pool's record of a rollout server, and its states::

    STARTING ──generated once──► QUARANTINED ──full publish──► READY
       ▲                            ▲   │                       │
       │                 new weights│   │no answer              │publish begins (weights are written in place),
       │                  are needed│   ▼                       │or it came back with other weights
       └── (new process)          DEAD ◄──no answer─────────────┘──► QUARANTINED

* STARTING: launched, has not generated yet.
* QUARANTINED: alive, but its weights are not known to be the current version. It serves nothing until it has received
  all of them.
* READY: serves.
* DEAD: a request got no answer. It is probed with a real generation; it comes back as READY if it still reports the
  weight version it had and no publish has begun since, else as QUARANTINED.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum

from agpo_megatron.rollout.client import ServerClient


class State(Enum):
    """State of a server; see the docstring of the module."""

    STARTING = "starting"
    READY = "ready"
    QUARANTINED = "quarantined"
    DEAD = "dead"


@dataclass(eq=False)
class Server:
    """``in_flight``: samples. ``version``: current weight version, "" if it lacks it.

    ``draining``: its requests are being aborted, which is no failure of the server. ``paused``: its requests
    are halted in place, and return nothing before they go on. ``torn``: how often it left a transfer, so that what
    it returns of requests from before is of no known weights.
    """

    client: ServerClient
    state: State = State.STARTING
    in_flight: int = 0
    version: str = ""
    draining: bool = False
    paused: bool = False
    torn: int = 0
    reason: str = "has not generated yet"
    since: float = field(default_factory=time.monotonic)

    @property
    def url(self) -> str:
        return self.client.url

    @property
    def alive(self) -> bool:
        return self.state in (State.READY, State.QUARANTINED)

    def __str__(self) -> str:
        seconds = time.monotonic() - self.since
        why = f": {self.reason}" if self.reason else ""
        return f"{self.url} {self.state.value} for {seconds:.0f} s{why}"
