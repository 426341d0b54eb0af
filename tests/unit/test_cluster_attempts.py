"""How a start ended, and whether the next one is worth its nodes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from agpo_megatron.cluster import attempts, start_folder
from agpo_megatron.cluster.attempts import conclude, failed_in_a_row
from agpo_megatron.cluster.roles import machine_plan
from agpo_megatron.cluster.start_folder import StartFolder, latest_start, starts
from agpo_megatron.config import Config
from agpo_megatron.config.run_folder import RunFolder

CONFIG = Config.model_validate({"model": {"path": "m"}, "data": {"path": "d"}})


class History:
    """A run folder whose journal holds ``committed`` steps."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.committed, self._count = RunFolder(path), 0, 0
        for module in (attempts, start_folder):
            monkeypatch.setattr(module, "committed_steps", lambda run: self.committed)

    def start(self) -> StartFolder:
        self._count += 1
        return StartFolder.create(
            self.run, f"7-{self._count}", machine_plan(CONFIG, "h", "train"), CONFIG
        )

    def fails(self, commits: int = 0) -> attempts.Conclusion:
        start = self.start()
        self.committed += commits
        start.record_exit(
            {
                "role": "trainer rank 3",
                "host": "n2",
                "code": -9,
                "log": str(start.log("trainer rank 3")),
                "restarts": 0,
                "restarted": False,
                "time": time.time(),
            }
        )
        start.end("failed", "x")
        return conclude(self.run, start, allowed=3)


@pytest.fixture
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> History:
    return History(tmp_path, monkeypatch)


def test_failures_without_progress_are_bounded(history: History) -> None:
    assert [history.fails().again for _ in range(3)] == [True, True, False]
    message = history.fails().message
    assert "trainer rank 3 on n2 was killed by signal 9" in message
    assert "failed start 4 of at most 3" in message and "giving up" in message


def test_a_committed_step_lets_the_count_begin_anew(history: History) -> None:
    history.fails()
    history.fails()
    assert history.fails(commits=1).again
    assert failed_in_a_row(history.run) == 1
    assert [history.fails().again for _ in range(2)] == [True, False]


def test_a_start_whose_node_was_lost_counts(history: History) -> None:
    history.start()
    history.start()
    assert failed_in_a_row(history.run) == 2
    assert not history.fails().again


def test_an_orderly_end_is_no_failure(history: History) -> None:
    history.fails()
    start = history.start()
    start.end("stopped", "controller: code 75")
    stopped = conclude(history.run, start, allowed=1)
    assert (stopped.outcome, stopped.again) == ("stopped", True)
    assert failed_in_a_row(history.run) == 0
    start = history.start()
    start.end("finished", "controller: code 0")
    assert conclude(history.run, start, allowed=1).again is False


def test_only_the_first_end_of_a_start_counts(history: History) -> None:
    start = history.start()
    start.end("failed", "first")
    start.end("finished", "second")
    ended = start.ended()
    assert ended is not None and (ended["outcome"], ended["reason"]) == ("failed", "first")


def test_latest_points_to_the_newest_start(history: History) -> None:
    first, second = history.start(), history.start()
    assert list(starts(history.run)) == [first, second]
    newest = latest_start(history.run)
    assert newest is not None and newest.path.samefile(second.path)
    again = StartFolder.create(history.run, second.label, second.plan(), CONFIG)
    assert again.label == f"{second.label}.1"  # nothing of an earlier start is overwritten
