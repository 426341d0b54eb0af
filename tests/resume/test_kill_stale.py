"""Kills and stop requests while generation runs ahead of training: fragments are continued, nothing is repeated."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from kills import (
    SERVER,
    Kill,
    all_samples,
    check_fragments,
    check_nothing_lost_or_repeated,
    kill_and_continue,
)

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
    "run.checkpoint_every": 1,
}
check_stale = partial(check_nothing_lost_or_repeated, updates=2, staleness=2)


def kill_and_check(tmp_path: Path, *kills: Kill) -> None:
    fragments = kill_and_continue(tmp_path, [kills], check_stale, long_answers=True, **STALE)
    unfinished, mixed = judge(tmp_path / "run", fragments)
    assert unfinished and mixed


def judge(run_dir: Path, fragments: Sequence[Fragment]) -> tuple[int, int]:
    """How many of the fragments found at kills were not the end of their sample, and how many samples have several
    versions."""
    unfinished = check_fragments(run_dir, fragments)
    samples = all_samples(JournalReader(RunFolder(run_dir).journal))
    mixed = sum(len(sample.versions) > 1 for sample in samples)
    log.warning(
        "%d fragments, %d not the end; %d of %d samples of several versions",
        *(len(fragments), unfinished, mixed, len(samples)),
    )
    return unfinished, mixed


def test_controller_server_and_trainer_killed_in_one_run(tmp_path: Path) -> None:
    kill_and_check(
        tmp_path,
        ("controller", "generate step 1", "journal/fragments"),
        (SERVER, "publish weights 2", "journal/fragments"),
        ("controller", "publish weights 4"),
        ("trainer rank 1", "update step 6"),
    )
