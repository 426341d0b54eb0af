"""What the journal's files hold, and how samples become rows and come back.

Three kinds of immutable Arrow file:

* ``samples/segment-...``: a segment, one block per sample of some finished groups;
* ``batches/details-...``: what was decided or scored per token for a batch, one block per sample that has any;
* ``batches/batch-...``: one committed batch, one small row per sample. It refers to blocks of the other two and adds
  what was decided per sequence. It knows nothing of the parallel layout, so a batch can be replayed in any.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from agpo_megatron.files import digest, write_durably
from agpo_megatron.journal.blocks import RESTORE, Block, JournalError
from agpo_megatron.samples import (
    COLUMNS,
    Array,
    Column,
    Floats,
    Group,
    Prompt,
    Sample,
    TrainSequence,
    VersionSpan,
    columns,
)


def _arrow(column: Column) -> pa.Field:
    value = pa.from_numpy_dtype(np.dtype(column.dtype))
    return pa.field(column.name, pa.list_(value) if column.per == "token" else value)


SEGMENT_SCHEMA = pa.schema(
    [
        ("group_id", pa.string()),
        ("position", pa.int64()),
        ("index", pa.int32()),
        ("prompt_text", pa.string()),
        ("answer", pa.string()),
        ("prompt_tokens", pa.list_(pa.int32())),
        *(_arrow(c) for c in columns("token", "sample")),
        ("versions", pa.string()),
        ("finish_reason", pa.string()),
        ("text", pa.string()),
        ("source", pa.string()),
        ("raw_reward", pa.float64()),
        ("correct", pa.bool_()),
        ("reward_parts", pa.string()),
        ("reward_error", pa.string()),
    ]
)
DETAILS_SCHEMA = pa.schema(
    [("sample_id", pa.string()), *(_arrow(c) for c in columns("token", "step"))]
)
_BLOCK = pa.struct(
    [("file", pa.string()), ("offset", pa.int64()), ("length", pa.int64()), ("digest", pa.string())]
)
BATCH_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("tokens", pa.int32()),
        ("sample", _BLOCK),
        ("details", _BLOCK),
        *(_arrow(c) for c in columns("sequence", "step")),
    ]
)
SCORE_SCHEMA = pa.schema([("sample_id", pa.string()), ("logprobs", pa.list_(pa.float32()))])
"""What a trainer hands the controller before a batch is decided: log-probs of the tokens of each sample's loss mask."""


@dataclass(frozen=True, eq=False)
class JournaledGroup:
    """A group whose samples are durable, and where they lie (one block per sample)."""

    group: Group
    blocks: list[Block]


@dataclass(frozen=True, eq=False)
class BatchRecord:
    """A committed batch of S samples, for the optimizer steps ``first_step`` (counted from 1) and those after it,
    ``updates`` in all.

    ``cursor``: the prompt position after this batch's prompts. ``weight_version``: the weights it starts from.
    ``sample_ids``; ``tokens`` [S]: lengths of the sequences; ``samples``: their blocks; ``details``: blocks of their
    per-token decisions, where there are any. ``columns``: per sequence, [S] each, every column of source "step".
    ``metrics``: what is known before training (rewards, groups, lengths). ``entropy_coef``: weight of the entropy
    bonus; ``entropy_state``: what the next batch's adaptive coefficient starts from.
    """

    first_step: int
    updates: int
    attempt: int
    cursor: int
    weight_version: str
    sample_ids: list[str]
    tokens: Array
    samples: list[Block]
    details: list[Block | None]
    columns: Mapping[str, Array]
    metrics: Mapping[str, float] = field(default_factory=dict)
    entropy_coef: float = 0.0
    entropy_state: float = 0.0

    @property
    def steps(self) -> range:
        """Its optimizer steps."""
        return range(self.first_step, self.first_step + self.updates)

    def rows(self, step: int) -> list[int]:
        """The samples that ``step`` trains on: those of its part that have weight."""
        part, weight = self.columns["update"], self.columns["loss_weight"]
        mine = (part == step - self.first_step) & (weight != 0) & (self.columns["trained"] > 0)
        return [int(i) for i in np.flatnonzero(mine)]


def sample_batch(group: Group, sample: Sample) -> pa.RecordBatch:
    """One sample as a record batch of one row."""
    values = {
        "group_id": group.group_id,
        "position": group.prompt.position,
        "index": sample.index,
        "prompt_text": group.prompt.text,
        "answer": group.prompt.answer,
        "prompt_tokens": sample.prompt_tokens,
        **{c.name: getattr(sample, c.name) for c in columns("token", "sample")},
        "versions": json.dumps([asdict(span) for span in sample.versions]),
        "finish_reason": sample.finish_reason,
        "text": sample.text,
        "source": group.prompt.source,
        "raw_reward": sample.raw_reward,
        "correct": sample.correct,
        "reward_parts": json.dumps(dict(sample.reward_parts)),
        "reward_error": sample.reward_error,
    }
    return _one_row(values, SEGMENT_SCHEMA)


def details_batch(sample_id: str, values: Mapping[str, Array | None]) -> pa.RecordBatch:
    """The per-token decisions about one sample as a record batch of one row."""
    return _one_row({"sample_id": sample_id, **values}, DETAILS_SCHEMA)


_LISTS = ("prompt_tokens", *(c.name for c in columns("token", "sample")))


def _one_row(values: Mapping[str, Any], schema: pa.Schema) -> pa.RecordBatch:
    return pa.record_batch(
        [_cell(values.get(column.name), column.type) for column in schema], schema=schema
    )


def _cell(value: Any, kind: pa.DataType) -> pa.Array:
    if value is None or not pa.types.is_list(kind):
        return pa.array([value], kind)
    entries = np.ascontiguousarray(value, dtype=kind.value_type.to_pandas_dtype())
    return pa.ListArray.from_arrays(pa.array([0, len(entries)], pa.int32()), entries, type=kind)


def _lists(batch: pa.RecordBatch, names: Iterable[str]) -> dict[str, Any]:
    """The entries of the one list of each column, without a copy; a column without one is left out."""
    return {
        name: batch.column(name).values.to_numpy()
        for name in names
        if batch.column(name).null_count == 0
    }


def batch_to_sample(batch: pa.RecordBatch) -> Sample:
    """Inverse of ``sample_batch``."""
    fields: dict[str, Any] = {
        name: batch.column(name)[0].as_py()
        for name in (
            "group_id",
            "index",
            "finish_reason",
            "text",
            "raw_reward",
            "correct",
            "reward_error",
        )
    }
    fields["reward_parts"] = json.loads(batch.column("reward_parts")[0].as_py())
    spans = json.loads(batch.column("versions")[0].as_py())
    fields["versions"] = tuple(VersionSpan(**span) for span in spans)
    return Sample(**fields, **_lists(batch, _LISTS))


def batches_to_groups(batches: Sequence[pa.RecordBatch]) -> list[Group]:
    """The groups of a segment, from all of its blocks."""
    groups: dict[str, Group] = {}
    for batch in batches:
        sample = batch_to_sample(batch)
        position, answer, text, source = (
            batch.column(name)[0].as_py()
            for name in ("position", "answer", "prompt_text", "source")
        )
        prompt = Prompt(position, sample.prompt_tokens, answer, text, source)
        groups.setdefault(sample.group_id, Group(prompt, [])).samples.append(sample)
    return list(groups.values())


def train_sequence(
    record: BatchRecord, row: int, sample: pa.RecordBatch, details: pa.RecordBatch | None
) -> TrainSequence:
    """A journaled sample with what its batch decided about it."""
    lists = _lists(sample, _LISTS)
    if details is not None:
        lists |= _lists(details, [c.name for c in columns("token", "step")])
    numbers = {name: values[row].item() for name, values in record.columns.items()}
    return TrainSequence(
        record.sample_ids[row],
        lists.pop("prompt_tokens"),
        lists.pop("response_tokens"),
        lists.pop("loss_mask"),
        {**lists, **numbers},
    )


def score_sequence(batch: pa.RecordBatch) -> TrainSequence:
    """A journaled sample before its batch is decided: every token of its mask is scored."""
    sample = batch_to_sample(batch)
    return TrainSequence(
        sample.sample_id,
        sample.prompt_tokens,
        sample.response_tokens,
        sample.loss_mask,
        {"loss_weight": 1.0},
    )


def sequence_columns(values: Mapping[str, Sequence[Any]], count: int) -> dict[str, Array]:
    """Every per-sequence column of source "step", [count]: what was decided, or the default."""
    return {
        c.name: np.asarray(values.get(c.name, [c.default] * count), dtype=c.dtype)
        for c in COLUMNS
        if c.per == "sequence" and c.source == "step"
    }


def encode_record(record: BatchRecord) -> bytes:
    """The file of a batch."""
    header = {
        name: getattr(record, name)
        for name in (
            "first_step",
            "updates",
            "attempt",
            "cursor",
            "weight_version",
            "entropy_coef",
            "entropy_state",
        )
    }
    header["metrics"] = dict(record.metrics)
    table = pa.table(
        [
            pa.array(record.sample_ids, pa.string()),
            pa.array(record.tokens, pa.int32()),
            pa.array([asdict(block) for block in record.samples], _BLOCK),
            pa.array([block and asdict(block) for block in record.details], _BLOCK),
            *(pa.array(record.columns[c.name]) for c in columns("sequence", "step")),
        ],
        schema=BATCH_SCHEMA.with_metadata({"batch": json.dumps(header)}),
    )
    return encode_table(table)


def decode_record(path: Path, data: bytes) -> BatchRecord:
    """Inverse of ``encode_record``. Raises JournalError naming ``path``."""
    table = decode_table(path, data)
    header = json.loads(table.schema.metadata[b"batch"])
    return BatchRecord(
        sample_ids=table.column("sample_id").to_pylist(),
        tokens=table.column("tokens").to_numpy(),
        samples=[Block(**block) for block in table.column("sample").to_pylist()],
        details=[block and Block(**block) for block in table.column("details").to_pylist()],
        columns={
            c.name: table.column(c.name).to_numpy()
            if c.name in table.column_names
            else np.full(len(table), c.default, dtype=c.dtype)
            for c in columns("sequence", "step")
        },
        **header,
    )


def write_scores(path: Path, logprobs: Mapping[str, Floats]) -> str:
    """Log-probs by sample id, as ``SCORE_SCHEMA``; returns the file's digest."""
    ends = np.cumsum([0, *(len(values) for values in logprobs.values())])
    entries = np.concatenate([np.zeros(0, np.float32), *logprobs.values()])
    lists = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(entries, pa.float32()))
    data = encode_table(pa.table([pa.array(list(logprobs), pa.string()), lists], SCORE_SCHEMA))
    write_durably(path, data)
    return digest(data)


def read_scores(path: Path, data: bytes) -> dict[str, Floats]:
    """Inverse of ``write_scores``."""
    table = decode_table(path, data).combine_chunks()
    lists = table.column("logprobs").chunk(0)
    ends, entries = lists.offsets.to_numpy(), lists.values.to_numpy()
    names = table.column("sample_id").to_pylist()
    return {n: entries[a:b] for n, a, b in zip(names, ends, ends[1:], strict=False)}


def at_the_masked_tokens(scored: Floats, sample: Sample) -> Floats:
    """Log-probs of the tokens of a loss mask at their places in the response, 0 elsewhere."""
    placed = np.zeros(len(sample.response_tokens), dtype=np.float32)
    placed[sample.loss_mask != 0] = scored
    return placed


def encode_table(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def decode_table(path: Path, data: bytes) -> pa.Table:
    try:
        return pa.ipc.open_file(pa.BufferReader(data)).read_all()
    except pa.ArrowInvalid as error:
        raise JournalError(f"{path} is damaged ({error}). {RESTORE}") from error
