"""Kills and stop requests while generation runs ahead of training: fragments are continued, nothing is repeated."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from kills import (
    GROUP,
    SERVER,
    Kill,
    all_samples,
    check_fragments,
    check_nothing_lost_or_repeated,
    durable_fragments,
    finish,
    kill_and_continue,
    signal_at,
    steps_of,
)
from tiny_run import write_run

from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.journal import JournalReader
from agpo_megatron.samples import Fragment

log = logging.getLogger(__name__)
STALE: dict[str, object] = {
    "algorithm.preset": "agpo_v1",
    "train.max_staleness": 2,
    "train.updates_per_batch": 2,
    "train.steps": 8,
    "train.prompts_per_batch": 8,
    "train.lr": 1.0e-4,
    "train.micro_batch_tokens": 1024,
    "rollout.fragment_tokens": 16,
    "rollout.max_response_tokens": 200,
    "run.checkpoint_every": 3,
}
check_stale = partial(check_nothing_lost_or_repeated, updates=2, staleness=2)


def kill_and_check(tmp_path: Path, *starts: Sequence[Kill], **changes: object) -> None:
    fragments = kill_and_continue(
        tmp_path, starts, check_stale, long_answers=True, **STALE, **changes
    )
    unfinished, mixed = judge(tmp_path / "run", fragments)
    assert mixed
    assert unfinished or not fragments


def judge(run_dir: Path, fragments: Sequence[Fragment]) -> tuple[int, int]:
    """How many of the fragments found at kills were not the end of their sample, and how many samples have weights of
    several steps (the same weights under another attempt do not count)."""
    unfinished = check_fragments(run_dir, fragments)
    samples = all_samples(JournalReader(RunFolder(run_dir).journal))
    mixed = sum(len(set(steps_of(sample))) > 1 for sample in samples)
    log.warning(
        "%d fragments, %d not the end; %d of %d samples of several steps",
        *(len(fragments), unfinished, mixed, len(samples)),
    )
    return unfinished, mixed


def test_controller_server_and_trainer_killed_in_one_run(tmp_path: Path) -> None:
    """The trainer dies between two updates of a batch; the first checkpoint is of the middle of a batch."""
    kill_and_check(
        tmp_path,
        [
            ("controller", "generate step 1", "journal/fragments"),
            (SERVER, "publish weights 2", "journal/fragments"),
            ("trainer rank 1", "update step 4"),
        ],
    )


GENERATE = r"generate step \d+"
MOMENTS: list[tuple[str, ...]] = [
    (GENERATE, "journal/fragments"),
    (GENERATE, "journal/samples"),
    (GENERATE, "journal/batches"),
    ("(update|replay) step 4",),
    ("publish weights 6",),
]
"""Wherever the start before was killed, the next one still reaches its moment."""


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("role", ["trainer rank 1", "supervisor"])
def test_a_role_killed_at_every_moment(tmp_path: Path, role: str) -> None:
    kill_and_check(tmp_path, *([(role, *moments)] for moments in MOMENTS))


@pytest.mark.full
@pytest.mark.parametrize("moments", [MOMENTS[:3], MOMENTS[3:]])
def test_a_controller_killed_at_every_moment(
    tmp_path: Path, moments: list[tuple[str, ...]]
) -> None:
    kill_and_check(tmp_path, [("controller", *some) for some in moments])


@pytest.mark.full
@pytest.mark.parametrize("moments", MOMENTS)
def test_a_server_killed_at_every_moment(tmp_path: Path, moments: tuple[str, ...]) -> None:
    kill_and_check(tmp_path, [(SERVER, *moments)])


@pytest.mark.full
def test_stale_batches_of_two_updates_with_tis_killed(tmp_path: Path) -> None:
    kill_and_check(
        tmp_path,
        [
            ("controller", "generate step 1", "journal/fragments"),
            ("trainer rank 1", "score step 3 with policy weights"),
        ],
        **{"algorithm.loss": {"correction": {"kind": "tis", "level": "sequence_mean"}}},
    )


@pytest.mark.full
def test_a_stop_request_keeps_the_fragments_and_the_next_start_continues_them(
    tmp_path: Path,
) -> None:
    config = write_run(tmp_path, long_answers=True, **STALE)
    run_dir = tmp_path / "run"
    outcome = signal_at(config, run_dir, signal.SIGUSR1, "generate step 1", "journal/fragments")
    assert outcome.exit_code == 130, outcome.output
    folder = RunFolder(run_dir)
    fragments = durable_fragments(folder)
    assert fragments
    outcome = finish(config, run_dir)
    assert outcome.exit_code == 0, outcome.output
    check_stale(run_dir, STALE["train.steps"], STALE["train.prompts_per_batch"], GROUP)
    unfinished, mixed = judge(run_dir, fragments)
    assert unfinished and mixed
