"""The checkpoints of a run as files: which are kept, what becomes of a damaged one, leftovers.

All of it is decided from what is durable, so that a resumed run decides the same.
"""

from __future__ import annotations

import logging
import re
import shutil
import sys
from pathlib import Path

from agpo_megatron.config import Config
from agpo_megatron.config.run_folder import CHECKPOINT_MARKER, RunFolder
from agpo_megatron.files import sync
from agpo_megatron.journal import Journal, JournalError, JournalReader
from agpo_megatron.observe.best import best_checkpoint

log = logging.getLogger(__name__)


def remove_old(folder: RunFolder, journal: Journal, config: Config) -> None:
    """Remove all checkpoints but the newest ``run.keep_checkpoints`` and the best; and the journal that none of the
    newest needs, if so configured. The best is for evaluation and export: nothing is kept behind it."""
    checkpoints = folder.complete_checkpoints()
    newest = checkpoints[-config.run.keep_checkpoints :]
    best = best_checkpoint(folder, config.run.keep_best, config.train.updates_per_batch)
    for step, old in checkpoints[: -len(newest)]:
        if step != best:
            (old / CHECKPOINT_MARKER).unlink()  # first: a half-removed folder is no checkpoint
            shutil.rmtree(old)
    if config.journal.keep == "checkpoints":
        journal.prune(before_step=newest[0][0] + 1)


def set_aside(damaged: Path, step: int, reason: str, older: int, journal: JournalReader) -> Path:
    """Rename a damaged checkpoint of ``step``, so that the run continues from that of step ``older`` (0: from its
    initial weights) and the journal; say so loudly. Returns its new path.

    Raises JournalError, and renames nothing, when the journal lacks a step in between.
    """
    held = {s for b in journal.batches() for s in range(b.first_step, b.last_step + 1)}
    missing = [s for s in range(older + 1, step + 1) if s not in held]
    before = f"the checkpoint of step {older}" if older else "the initial weights"
    if missing:
        raise JournalError(
            f"{reason}. The run cannot continue from {before} instead: {journal.folder} has no step {missing[0]} any "
            f"more (journal.keep: checkpoints); restore {damaged} from a copy, or start in another --run-dir"
        )
    aside, number = damaged.with_name(f"damaged-{damaged.name}"), 1
    while aside.exists():
        number += 1
        aside = damaged.with_name(f"damaged-{damaged.name}.{number}")
    damaged.rename(aside)
    sync(damaged.parent)
    text = (
        f"{reason}. It is kept as {aside}; the run continues from {before}, and trains steps {older + 1} to {step} "
        "again from the journal"
    )
    log.error("%s", text)
    sys.stderr.write(f"warning: {text}\n")
    return aside


def remove_leftovers(folder: RunFolder) -> None:
    """Remove the leftovers of a killed attempt: checkpoints without a marker, temporary folders of checkpoints and
    exports, scores."""
    for path in folder.path.glob("*scores-*.arrow*"):
        path.unlink()
    if folder.checkpoints.is_dir():
        complete = {path for _, path in folder.complete_checkpoints()}
        for path in folder.checkpoints.iterdir():
            if path not in complete and re.fullmatch(r"\.?step-\d+(\.\w+)?", path.name):
                shutil.rmtree(path)
    for path in folder.exports.glob(".step-*.partial-*"):
        shutil.rmtree(path)
