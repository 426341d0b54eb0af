"""One pass over the samples of a journal's batches: a few numbers of each, no object per token.

Samples are read one by one, checked against their digests, and let go; per-token columns are looked at as arrays only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from agpo_megatron.journal import BatchRecord, Block, JournalError, JournalReader
from agpo_megatron.journal.blocks import read_blocks
from agpo_megatron.samples import Array, Floats, group_of

NUMBERS = ("reward", "raw_reward", "length", "advantage", "staleness", "gap")


@dataclass(frozen=True, eq=False)
class SweptBatch:
    """A committed batch of S samples. ``name``: its file. ``group`` [S]: number of the sample's group in the batch.
    ``numbers``: ``NUMBERS`` by name, [S] float64 each, NaN where unknown: shaped and raw reward, response tokens,
    advantage, staleness, and the largest |log-prob of the trainer − that of the server| over the sample's tokens."""

    name: str
    first_step: int
    updates: int
    attempt: int
    sample_ids: list[str]
    group: Array
    numbers: dict[str, Array]

    def group_means(self, name: str) -> Array:
        """Means of a number over the known samples of each group; groups without one are left out."""
        values = self.numbers[name]
        known = np.isfinite(values)
        counts = np.bincount(self.group[known])
        sums = np.bincount(self.group[known], weights=values[known])
        found: Array = sums[counts > 0] / counts[counts > 0]
        return found


@dataclass
class Swept:
    """Every batch, oldest first. ``unreadable``: samples, or batches, that could not be read, with the last reason."""

    batches: list[SweptBatch] = field(default_factory=list)
    samples: int = 0
    unreadable: int = 0
    reason: str = ""

    def missed(self, error: JournalError) -> None:
        self.unreadable += 1
        self.reason = str(error)


def sweep(reader: JournalReader) -> Swept:
    """Read all committed batches. What a run that goes on has pruned meanwhile, or what is damaged, is counted."""
    reader.read_patience = 0.0
    swept = Swept()
    for name in [batch.name for batch in reader.batches()]:
        try:
            record = reader.record(name)
        except JournalError as error:
            swept.missed(error)
            continue
        batch = _sweep_batch(reader.folder, name, record, swept)
        swept.batches.append(batch)
        swept.samples += len(batch.sample_ids)
    return swept


def _sweep_batch(folder: Path, name: str, record: BatchRecord, swept: Swept) -> SweptBatch:
    count = len(record.sample_ids)
    numbers = {key: np.full(count, np.nan) for key in NUMBERS}
    for key in ("reward", "advantage", "staleness"):
        numbers[key][:] = record.columns[key]
    details = _each(folder / "batches", record.details, swept)
    for row, (sample, decided) in enumerate(
        zip(_each(folder / "samples", record.samples, swept), details, strict=True)
    ):
        if sample is None:
            continue
        numbers["raw_reward"][row] = sample.column("raw_reward")[0].as_py()
        numbers["length"][row] = len(sample.column("response_tokens").values)
        gaps = logprob_gaps(sample, decided)
        if gaps is not None and np.isfinite(gaps).any():
            numbers["gap"][row] = np.nanmax(np.abs(gaps))
    groups = [group_of(sample_id) for sample_id in record.sample_ids]
    _, group = np.unique(groups, return_inverse=True)
    steps = (record.first_step, record.updates, record.attempt)
    return SweptBatch(name, *steps, record.sample_ids, group, numbers)


def _each(
    folder: Path, blocks: Sequence[Block | None], swept: Swept
) -> Iterator[pa.RecordBatch | None]:
    """Yield the content of each block, None where there is none or where it cannot be read."""
    place = 0
    while place < len(blocks):
        rest = blocks[place:]
        found = read_blocks(folder, [block for block in rest if block], patience=0.0)
        try:
            for block in rest:
                content = next(found) if block else None
                place += 1
                yield content
        except JournalError as error:  # the others may be whole
            swept.missed(error)
            place += 1
            yield None


def read_row(
    reader: JournalReader, record: BatchRecord, row: int
) -> tuple[pa.RecordBatch | None, pa.RecordBatch | None]:
    """Read one sample of a batch and what was decided per token about it; None for what is not there or unreadable."""
    ignored = Swept()
    (sample,) = _each(reader.folder / "samples", [record.samples[row]], ignored)
    (decided,) = _each(reader.folder / "batches", [record.details[row]], ignored)
    return sample, decided


def logprob_gaps(sample: pa.RecordBatch, decided: pa.RecordBatch | None) -> Floats | None:
    """Log-prob of the trainer − that of the server for each response token, [n] float32, NaN off the loss mask.

    The trainer's are those that it scored before the first update of the batch (``old_logprobs``). None where the batch
    was not scored, or the sample was not: then the journal has none.
    """
    scored = entries(decided, "old_logprobs") if decided is not None else None
    served = entries(sample, "rollout_logprobs")
    if scored is None or served is None or len(scored) != len(served):
        return None
    gaps: Floats = np.subtract(scored, served, dtype=np.float32)
    mask = entries(sample, "loss_mask")
    return np.where(mask != 0, gaps, np.float32(np.nan)) if mask is not None else gaps


def entries(batch: pa.RecordBatch, name: str) -> Array | None:
    """Return the list of a record batch of one row as an array, without a copy; None where it is null or unknown."""
    if name not in batch.schema.names or batch.column(name).null_count:
        return None
    found: Array = batch.column(name).values.to_numpy()
    return found
