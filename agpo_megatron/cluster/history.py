"""The starts of a run and what happened in them, for its report: from the folders of the starts and their logs."""

from __future__ import annotations

import json
import re
import signal
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

from agpo_megatron.cluster.start_folder import StartFolder, starts
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.observe.report import Event, Launch

STAMP = r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) \w+ [\w.]+: "
PHASE = re.compile(STAMP + r"phase [a-z -]+ step (\d+)")
SERVER = re.compile(
    STAMP + r"(rollout server \S+) (\w+) for \d+ s.* -> (dead|quarantined) \((.*)\)$"
)
PLANNED = "awaits weights "
"""Beginning of the reason for the quarantine of a server that a publish is about to write to."""


def history(run: RunFolder) -> list[Launch]:
    """Return the starts of a run, oldest first. What a start did not live to write is left out.

    Times in logs are local ones: they are read in the time zone of this machine.
    """
    found: list[Launch] = []
    for start in starts(run):
        found.append(_launch(start, found[-1] if found else None))
    return found


def _launch(start: StartFolder, before: Launch | None) -> Launch:
    began = _json(start, "began.json")
    ended = start.ended() or {}
    exits = start.exits()
    times, steps, servers = _controller_log(start)
    first = int(began.get("committed", 0))

    def event(time: float, kind: str, who: str, what: str) -> Event:
        place = bisect_right(times, time)
        return Event(time, steps[place - 1] if place else first, kind, who, what)

    events = [Event(float(began.get("time", 0.0)), first, "start", start.label, _why(before))]
    events += [event(e["time"], *_exit(e)) for e in exits]
    events += [event(e.time, e.kind, e.who, e.what) for e in servers]
    for path in (start.path / "hung").glob("*.json"):
        with suppress(OSError, ValueError):
            time = json.loads(path.read_text())["time"]
            events.append(event(time, "hung", path.stem, "reported as hanging; ended for it"))
    outcome, reason = ended.get("outcome", ""), ended.get("reason", "")
    if ended:
        events.append(event(ended["time"], "end", start.label, f"{outcome}: {reason}"))
    restarts = [e for e in exits if e["role"] == "controller" and e["restarted"]]
    return Launch(
        start.label,
        start.plan().mode,
        float(began.get("time", 0.0)),
        outcome,
        reason,
        _seen(start),
        [_why(before), *(f"controller {_code(e['code'])}, started again" for e in restarts)],
        sorted(events, key=lambda e: e.time),
    )


def _why(before: Launch | None) -> str:
    if before is None:
        return "the run began"
    if not before.outcome:
        return f"start {before.label} ended without a word"
    if before.outcome == "failed":
        return f"start {before.label} failed: {before.reason}"
    return f"start {before.label} {before.outcome}"


def _exit(exit_: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return (kind, role, sentence) of the end of a role."""
    where = f" on {exit_['host']}" if exit_["host"] else ""
    then = ", started again" if exit_["restarted"] else ""
    kind = "killed" if exit_["code"] < 0 else "exited"
    return kind, exit_["role"], f"{_code(exit_['code'])}{where}{then}"


def _code(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = str(-code)
    return f"was killed by {name}"


def _controller_log(start: StartFolder) -> tuple[list[float], list[int], list[Event]]:
    """Return the times at which the controller's phases began, the step of each, and what befell servers."""
    times: list[float] = []
    steps: list[int] = []
    servers: list[Event] = []
    for line in _lines(start):
        if match := PHASE.match(line):
            times.append(_time(match))
            steps.append(int(match[3]))
        elif match := SERVER.match(line):
            lost, reason = match[5] == "dead", match[6]
            if lost or (match[4] == "ready" and not reason.startswith(PLANNED)):
                kind = "server lost" if lost else "server quarantined"
                servers.append(Event(_time(match), None, kind, match[3], reason))
    return times, steps, servers


def _time(match: re.Match[str]) -> float:
    return datetime.fromisoformat(match[1]).timestamp() + int(match[2]) / 1000


def _lines(start: StartFolder) -> Iterator[str]:
    with suppress(FileNotFoundError), open(start.log("controller"), errors="replace") as file:
        for line in file:
            yield line.rstrip("\n")


def _seen(start: StartFolder) -> float:
    """Return when the controller last wrote its status, or when the start began."""
    return float(_json(start, "status.json").get("time", _json(start, "began.json").get("time", 0)))


def _json(start: StartFolder, name: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((start.path / name).read_text())
    except FileNotFoundError:
        return {}
    return found
