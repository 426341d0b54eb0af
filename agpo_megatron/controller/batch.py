"""Batches on their way to the trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from agpo_megatron.journal import BatchRecord


@dataclass(frozen=True, eq=False)
class Batch:
    """Committed batch. ``journal``: the folder that holds its file ``name``. ``timings``: seconds spent on it.
    ``replayed``: it was committed by an earlier start, or by another run. ``settled``: all its steps were decided
    there, for a later batch follows."""

    record: BatchRecord
    journal: Path
    name: str
    timings: dict[str, float] = field(default_factory=dict)
    replayed: bool = False
    settled: bool = False
