"""The starts of one run, one after the other: how each ended, and whether another one is worth its nodes."""

from __future__ import annotations

import json
from dataclasses import dataclass

from agpo_megatron.cluster.start_folder import StartFolder, committed_steps, starts, write_json
from agpo_megatron.cluster.status import write_report
from agpo_megatron.cluster.supervisor import first_culprit
from agpo_megatron.config.run_folder import RunFolder


@dataclass(frozen=True)
class Conclusion:
    """The end of one start. ``again``: whether the job should be requeued; ``message``: text for the job's output."""

    outcome: str
    again: bool
    message: str


def conclude(run: RunFolder, start: StartFolder, allowed: int) -> Conclusion:
    """Write down how ``start`` ended, and decide what comes next.

    ``allowed``: starts in a row that may fail without a step committed in between (``cluster.attempts``).
    """
    start.end("failed", "its trainers' step ended without a word")  # unless they left one
    ended = start.ended()
    assert ended is not None
    outcome: str = ended["outcome"]
    write_json(
        start.path / "conclusion.json", {"outcome": outcome, "committed": committed_steps(run)}
    )
    if outcome == "finished":
        return Conclusion(outcome, False, "the run is complete")
    if outcome == "stopped":
        return Conclusion(outcome, True, "stopped after a checkpoint, as asked to")
    culprit = first_culprit(start)
    cause = culprit.message() if culprit else ended["reason"]
    write_report(run, start, cause)
    failed = failed_in_a_row(run)
    again = failed < allowed
    count = f"failed start {failed} of at most {allowed} (cluster.attempts) without a committed step between them"
    return Conclusion(outcome, again, f"{cause}\n{count}" + ("" if again else ": giving up"))


def failed_in_a_row(run: RunFolder) -> int:
    """Count the newest starts that failed, back to the first failure after a step was committed.

    A start without a conclusion lost its node: it counts as failed.
    """
    count, end = 0, committed_steps(run)
    for start in reversed(list(starts(run))):
        path = start.path / "conclusion.json"
        if path.exists() and json.loads(path.read_text())["outcome"] != "failed":
            break
        count += 1
        began = start.began_with()
        if end > began:
            break
        end = began
    return count
