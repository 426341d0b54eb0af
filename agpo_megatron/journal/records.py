"""Contents of the journal's files, and the conversion of samples to rows and back.

Four kinds of immutable Arrow file:

* ``samples/segment-...``: a segment, one block per sample of some finished groups;
* ``batches/details-...``: per-token decisions and scores of a batch, one block per sample that has any;
* ``batches/batch-...``: one committed batch, one small row per sample. It refers to blocks of the other two and adds
  the decisions per sequence. It does not depend on the parallel layout, so a batch can be replayed in any;
* ``fragments/fragments-...``: what is generated so far of responses whose group is unfinished, one row per fragment.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from agpo_megatron.algorithm.limits import Limit
from agpo_megatron.files import digest, write_durably
from agpo_megatron.journal.blocks import RESTORE, Block, JournalError
from agpo_megatron.samples import (
    Array,
    Column,
    Floats,
    Fragment,
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
"""Scores from the trainer, before a batch is decided: log-probs of the tokens in each sample's loss mask."""
FRAGMENT_SCHEMA = pa.schema(
    [
        ("position", pa.int64()),
        ("index", pa.int32()),
        ("start", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("versions", pa.string()),
        ("finish_reason", pa.string()),
    ]
)


@dataclass(frozen=True, eq=False)
class JournaledGroup:
    """A group whose samples are durable, and their blocks (one per sample)."""

    group: Group
    blocks: list[Block]


@dataclass(frozen=True, eq=False)
class BatchRecord:
    """A committed batch of S samples, for ``updates`` optimizer steps from ``first_step`` (counted from 1) on.

    ``cursor``: the prompt position after this batch's prompts. ``weight_version``: the weights it starts from.
    ``sample_ids``; ``tokens`` [S]: lengths of the sequences; ``samples``: their blocks; ``details``: blocks of their
    per-token decisions, where there are any. ``columns``: per sequence, [S] each, every column of source "step".
    ``metrics``: those known before training (rewards, groups, lengths). ``entropy_coef``: weight of the entropy bonus;
    ``entropy_state``: adaptive coefficient to start the next batch with. ``limits``: of the metrics of its steps;
    ``fired``: the steps before in which a guard fired, as far as they count. ``gate_levels``: decided by the
    controller for the gate of each optimizer step, ``gate_state`` to start the next batch with
    (``algorithm/gate_levels.py``).
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
    limits: Sequence[Limit] = ()
    fired: Sequence[int] = ()
    gate_levels: Sequence[float] = ()
    gate_state: Sequence[float] = ()

    @property
    def steps(self) -> range:
        """The optimizer steps of the batch."""
        return range(self.first_step, self.first_step + self.updates)

    def rows(self, step: int) -> list[int]:
        """Return the samples that ``step`` trains on: those of its part with a weight."""
        part, weight = self.columns["update"], self.columns["loss_weight"]
        mine = (part == step - self.first_step) & (weight != 0) & (self.columns["trained"] > 0)
        return [int(i) for i in np.flatnonzero(mine)]


def sample_batches(group: Group) -> Iterator[pa.RecordBatch]:
    """Yield the samples of a group as record batches of one row each."""
    samples, prompt = group.samples, group.prompt
    plain = {
        "group_id": [group.group_id] * len(samples),
        "position": [prompt.position] * len(samples),
        "index": [s.index for s in samples],
        "prompt_text": [prompt.text] * len(samples),
        "answer": [prompt.answer] * len(samples),
        "versions": [json.dumps([asdict(span) for span in s.versions]) for s in samples],
        "finish_reason": [s.finish_reason for s in samples],
        "text": [s.text for s in samples],
        "source": [prompt.source] * len(samples),
        "raw_reward": [s.raw_reward for s in samples],
        "correct": [s.correct for s in samples],
        "reward_parts": [json.dumps(dict(s.reward_parts)) for s in samples],
        "reward_error": [s.reward_error for s in samples],
    }
    # An array for the group, cut: making one costs as much as writing a thousand tokens.
    made = {n: pa.array(values, SEGMENT_SCHEMA.field(n).type) for n, values in plain.items()}
    for i, sample in enumerate(samples):
        cells = [
            made[c.name].slice(i, 1) if c.name in made else _cell(getattr(sample, c.name), c.type)
            for c in SEGMENT_SCHEMA
        ]
        yield pa.record_batch(cells, schema=SEGMENT_SCHEMA)


def details_batch(sample_id: str, values: Mapping[str, Array | None]) -> pa.RecordBatch:
    """Return the per-token decisions about one sample as a record batch of one row."""
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
    """Return the list of each column as an array, without a copy; null columns are left out, and those that the file
    was written without."""
    known = [n for n in names if n in batch.schema.names and batch.column(n).null_count == 0]
    return {name: batch.column(name).values.to_numpy() for name in known}


def batch_to_sample(batch: pa.RecordBatch) -> Sample:
    """Invert ``sample_batches``."""
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
    lists = _lists(batch, _LISTS)
    missing: dict[str, Any] = {
        c.name: np.full(len(lists["response_tokens"]), c.default, dtype=c.dtype)
        for c in columns("token", "sample")
        if c.name not in lists
    }
    return Sample(**fields, **lists, **missing)


def batches_to_groups(batches: Sequence[pa.RecordBatch]) -> list[Group]:
    """Rebuild the groups of a segment from all of its blocks."""
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
    """Join a journaled sample with the decisions of its batch."""
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
    """Build the sequence to score a sample before its batch is decided: every token of its loss mask."""
    sample = batch_to_sample(batch)
    return TrainSequence(
        sample.sample_id,
        sample.prompt_tokens,
        sample.response_tokens,
        sample.loss_mask,
        {"loss_weight": 1.0},
    )


def sequence_columns(values: Mapping[str, Sequence[Any]], count: int) -> dict[str, Array]:
    """Return every per-sequence column of source "step", [count]: as decided, or the default."""
    return {
        c.name: np.asarray(values.get(c.name, [c.default] * count), dtype=c.dtype)
        for c in columns("sequence", "step")
    }


def encode_record(record: BatchRecord) -> bytes:
    """Encode a batch as its file."""
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
            "fired",
            "gate_levels",
            "gate_state",
        )
    }
    header["limits"] = [asdict(limit) for limit in record.limits]
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
    """Invert ``encode_record``. Raises JournalError naming ``path``."""
    table = decode_table(path, data)
    header = json.loads(table.schema.metadata[b"batch"])
    header["limits"] = [Limit(**limit) for limit in header.get("limits", [])]
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


def encode_fragments(fragments: Sequence[Fragment]) -> bytes:
    """Encode fragments as the content of a file in ``FRAGMENT_SCHEMA``."""
    spans = [json.dumps([asdict(span) for span in f.versions]) for f in fragments]
    columns = [
        pa.array([f.position for f in fragments], pa.int64()),
        pa.array([f.index for f in fragments], pa.int32()),
        pa.array([f.start for f in fragments], pa.int32()),
        _lists_of([f.tokens for f in fragments], "int32"),
        _lists_of([f.logprobs for f in fragments], "float32"),
        pa.array(spans, pa.string()),
        pa.array([f.finish_reason for f in fragments], pa.string()),
    ]
    return encode_table(pa.table(columns, FRAGMENT_SCHEMA))


def decode_fragments(path: Path, data: bytes) -> list[Fragment]:
    """Invert ``encode_fragments``. Raises JournalError naming ``path``."""
    table = decode_table(path, data).combine_chunks()
    plain = table.drop_columns(["tokens", "logprobs"]).to_pylist()
    lists = [_each_of(table.column(name).chunk(0)) for name in ("tokens", "logprobs")]
    return [
        Fragment(
            row["position"],
            row["index"],
            row["start"],
            tokens,
            logprobs,
            tuple(VersionSpan(**span) for span in json.loads(row["versions"])),
            row["finish_reason"],
        )
        for row, tokens, logprobs in zip(plain, *lists, strict=True)
    ]


def _lists_of(arrays: Sequence[Array], dtype: str) -> pa.ListArray:
    ends = np.cumsum([0, *(len(values) for values in arrays)])
    entries = np.concatenate([np.zeros(0, dtype), *arrays])
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(entries))


def _each_of(lists: pa.ListArray) -> list[Array]:
    """Return the entries of each list, without a copy."""
    ends, entries = lists.offsets.to_numpy(), lists.values.to_numpy()
    return [entries[a:b] for a, b in itertools.pairwise(ends)]


def write_scores(path: Path, logprobs: Mapping[str, Floats]) -> str:
    """Write log-probs by sample id in ``SCORE_SCHEMA``; return the file's digest."""
    lists = _lists_of(list(logprobs.values()), "float32")
    data = encode_table(pa.table([pa.array(list(logprobs), pa.string()), lists], SCORE_SCHEMA))
    write_durably(path, data)
    return digest(data)


def read_scores(path: Path, data: bytes) -> dict[str, Floats]:
    """Invert ``write_scores``."""
    table = decode_table(path, data).combine_chunks()
    names = table.column("sample_id").to_pylist()
    return dict(zip(names, _each_of(table.column("logprobs").chunk(0)), strict=True))


def place_on_loss_mask(scored: Floats, sample: Sample) -> Floats:
    """Spread log-probs of the tokens in the loss mask over the whole response, [n]; 0 off the mask."""
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
