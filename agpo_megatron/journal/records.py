"""What the journal's files hold, and how a file becomes durable.

Two kinds of immutable Arrow file (IPC format: `datasets`, pandas and duckdb read them):

* ``samples/NAME.arrow``: a segment, one row per sample of some finished groups;
* ``steps/NAME.arrow``: one committed optimizer step, one row per sequence that is trained on. It refers to samples
  by (segment, row) and adds what the controller decided: advantage, shaped reward, loss weight; and where the
  loss needs them, what was scored before the update: log-probs of the trainer and of the reference policy, correction
  factors. It knows nothing of the parallel layout, so a step can be replayed in any layout.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from agpo_megatron.types import Group, Prompt, Sample, TrainSequence, VersionSpan

SCORE_SCHEMA = pa.schema([("sample_id", pa.string()), ("logprobs", pa.list_(pa.float32()))])
"""What a trainer hands the controller before a step is decided: log-probs of the tokens of each sample's loss mask."""
SEGMENT_SCHEMA = pa.schema(
    [
        ("group_id", pa.string()),
        ("position", pa.int64()),
        ("index", pa.int32()),
        ("prompt_text", pa.string()),
        ("answer", pa.string()),
        ("prompt_tokens", pa.list_(pa.int32())),
        ("response_tokens", pa.list_(pa.int32())),
        ("rollout_logprobs", pa.list_(pa.float32())),
        ("loss_mask", pa.list_(pa.int8())),
        ("versions", pa.string()),
        ("finish_reason", pa.string()),
        ("text", pa.string()),
        ("accuracy", pa.float64()),
        ("reward_error", pa.string()),
    ]
)
STEP_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("segment", pa.string()),
        ("row", pa.int32()),
        ("tokens", pa.int32()),
        ("reward", pa.float64()),
        ("advantage", pa.float64()),
        ("loss_weight", pa.float64()),
        ("trained", pa.int32()),
        ("old_logprobs", pa.list_(pa.float32())),
        ("ref_logprobs", pa.list_(pa.float32())),
        ("correction", pa.list_(pa.float32())),
    ]
)


class JournalError(RuntimeError):
    """The journal cannot be written or read; the message names the file, the cause and the fix."""


@dataclass(frozen=True)
class SampleRef:
    """Where a journaled sample lies."""

    segment: str
    row: int


@dataclass(frozen=True)
class StepRow:
    """One sequence of a step. ``tokens``: sequence length. ``loss_weight``: of each of its ``trained`` tokens.

    Per *response* token, float32, empty where the loss does not need them: ``old_logprobs`` and ``ref_logprobs``, of
    the trainer's weights before the step and of the reference policy; ``correction``, factors on the policy loss,
    of which 0 takes the token out of training.
    """

    sample_id: str
    ref: SampleRef
    tokens: int
    reward: float
    advantage: float
    loss_weight: float
    trained: int
    old_logprobs: list[float] = field(default_factory=list)
    ref_logprobs: list[float] = field(default_factory=list)
    correction: list[float] = field(default_factory=list)

    @property
    def has_weight(self) -> bool:
        """Whether the sequence trains at all."""
        return self.loss_weight != 0.0 and self.trained > 0


@dataclass(frozen=True)
class StepRecord:
    """A committed step. ``step`` counts from 1. ``cursor``: the prompt position after this step's prompts.

    ``weight_version``: the weights the step starts from. ``segments``: digest of every segment it refers to.
    ``metrics``: what is known of the step before training (rewards, groups, lengths). ``entropy_coef``: weight of the
    entropy bonus in this step; ``entropy_state``: what the next step's adaptive coefficient starts from.
    """

    step: int
    attempt: int
    cursor: int
    weight_version: str
    segments: dict[str, str]
    rows: list[StepRow]
    metrics: dict[str, float] = field(default_factory=dict)
    entropy_coef: float = 0.0
    entropy_state: float = 0.0


def groups_to_table(groups: Sequence[Group]) -> pa.Table:
    """Rows in group order, then sample order."""
    rows: list[dict[str, Any]] = []
    for group in groups:
        for sample in group.samples:
            rows.append(
                {
                    "group_id": group.group_id,
                    "position": group.prompt.position,
                    "index": sample.index,
                    "prompt_text": group.prompt.text,
                    "answer": group.prompt.answer,
                    "prompt_tokens": sample.prompt_tokens,
                    "response_tokens": sample.response_tokens,
                    "rollout_logprobs": sample.rollout_logprobs,
                    "loss_mask": sample.loss_mask,
                    "versions": json.dumps([asdict(span) for span in sample.versions]),
                    "finish_reason": sample.finish_reason,
                    "text": sample.text,
                    "accuracy": sample.accuracy,
                    "reward_error": sample.reward_error,
                }
            )
    return pa.Table.from_pylist(rows, schema=SEGMENT_SCHEMA)


def table_to_groups(table: pa.Table) -> list[Group]:
    """Inverse of ``groups_to_table`` (log-probs come back in float32 precision)."""
    groups: dict[str, Group] = {}
    for row in table.to_pylist():
        prompt = Prompt(row["position"], row["prompt_tokens"], row["answer"], row["prompt_text"])
        group = groups.setdefault(row["group_id"], Group(prompt, []))
        group.samples.append(row_to_sample(row))
    return list(groups.values())


def row_to_sample(row: dict[str, Any]) -> Sample:
    return Sample(
        group_id=row["group_id"],
        index=row["index"],
        prompt_tokens=row["prompt_tokens"],
        response_tokens=row["response_tokens"],
        rollout_logprobs=row["rollout_logprobs"],
        loss_mask=row["loss_mask"],
        versions=[VersionSpan(**span) for span in json.loads(row["versions"])],
        finish_reason=row["finish_reason"],
        text=row["text"],
        accuracy=row["accuracy"],
        reward_error=row["reward_error"],
    )


def to_train_sequence(sample: Sample, row: StepRow) -> TrainSequence:
    """Join a journaled sample with what the step decided about it."""
    n = len(sample.response_tokens)
    for name in ("old_logprobs", "ref_logprobs", "correction"):
        if len(getattr(row, name)) not in (0, n):
            raise JournalError(
                f"step row of {row.sample_id}: {len(getattr(row, name))} {name} for {n} response tokens; "
                "the journal is damaged"
            )
    prompt = [0.0] * len(sample.prompt_tokens)
    mask = sample.loss_mask
    if row.correction:
        mask = [m if c else 0 for m, c in zip(mask, row.correction, strict=True)]
    return TrainSequence(
        sample_id=row.sample_id,
        tokens=sample.prompt_tokens + sample.response_tokens,
        loss_weight=row.loss_weight,
        loss_mask=[0] * len(prompt) + mask,
        advantage=row.advantage,
        rollout_logprobs=prompt + sample.rollout_logprobs if sample.versions else [],
        ref_logprobs=prompt + row.ref_logprobs if row.ref_logprobs else [],
        correction=prompt + row.correction if row.correction else [],
    )


def to_score_sequence(sample: Sample) -> TrainSequence:
    """A journaled sample before its step is decided: every token of its mask is scored."""
    prompt = len(sample.prompt_tokens)
    return TrainSequence(
        sample_id=sample.sample_id,
        tokens=sample.prompt_tokens + sample.response_tokens,
        loss_weight=1.0,
        loss_mask=[0] * prompt + sample.loss_mask,
        advantage=0.0,
    )


def step_to_table(record: StepRecord) -> pa.Table:
    rows = [
        {
            "sample_id": row.sample_id,
            "segment": row.ref.segment,
            "row": row.ref.row,
            "tokens": row.tokens,
            "reward": row.reward,
            "advantage": row.advantage,
            "loss_weight": row.loss_weight,
            "trained": row.trained,
            "old_logprobs": row.old_logprobs,
            "ref_logprobs": row.ref_logprobs,
            "correction": row.correction,
        }
        for row in record.rows
    ]
    header = {
        "step": record.step,
        "attempt": record.attempt,
        "cursor": record.cursor,
        "weight_version": record.weight_version,
        "segments": record.segments,
        "metrics": record.metrics,
        "entropy_coef": record.entropy_coef,
        "entropy_state": record.entropy_state,
    }
    schema = STEP_SCHEMA.with_metadata({"step": json.dumps(header)})
    return pa.Table.from_pylist(rows, schema=schema)


def table_to_step(table: pa.Table) -> StepRecord:
    header = json.loads(table.schema.metadata[b"step"])
    rows = [
        StepRow(
            sample_id=row["sample_id"],
            ref=SampleRef(row["segment"], row["row"]),
            tokens=row["tokens"],
            reward=row["reward"],
            advantage=row["advantage"],
            loss_weight=row["loss_weight"],
            trained=row["trained"],
            old_logprobs=row["old_logprobs"],
            ref_logprobs=row["ref_logprobs"],
            correction=row["correction"],
        )
        for row in table.to_pylist()
    ]
    return StepRecord(rows=rows, **header)


def write_scores(path: Path, logprobs: dict[str, list[float]]) -> str:
    """Log-probs by sample id, as ``SCORE_SCHEMA``; returns the file's digest."""
    columns = {"sample_id": list(logprobs), "logprobs": list(logprobs.values())}
    data = encode_table(pa.Table.from_pydict(columns, schema=SCORE_SCHEMA))
    write_durably(path, data)
    return digest_of(data)


def read_scores(path: Path, digest: str) -> dict[str, list[float]]:
    """Inverse of ``write_scores``; waits for a shared file system as ``read_file`` does."""
    table = decode_table(path, read_file(path, digest))
    return dict(zip(*(table.column(name).to_pylist() for name in SCORE_SCHEMA.names), strict=True))


def encode_table(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def decode_table(path: Path, data: bytes) -> pa.Table:
    try:
        return pa.ipc.open_file(pa.BufferReader(data)).read_all()
    except pa.ArrowInvalid as error:
        raise JournalError(
            f"{path} is damaged ({error}). Restore it from a copy, or remove the run folder and start again."
        ) from error


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_durably(path: Path, data: bytes) -> None:
    """Temporary name, fsync, rename, fsync of the folder: after return the file survives a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise JournalError(
            f"cannot write {path}: {error.strerror}. Nothing committed is lost: "
            "free space or mend the file system, then run the same command again."
        ) from error


def read_file(path: Path, digest: str | None = None, patience: float = 5.0) -> bytes:
    """Whole file. ``digest``: SHA-256 it must have, or the beginning of it.

    Waits up to ``patience`` seconds for a shared file system to show the file, with that content.
    Raises JournalError when it stays missing or different.
    """
    deadline = time.monotonic() + patience
    while True:
        data = path.read_bytes() if path.exists() else None
        if data is not None and (digest is None or digest_of(data).startswith(digest)):
            return data
        if time.monotonic() > deadline:
            cause = (
                "is missing"
                if data is None
                else f"does not have the digest {digest} it was announced with"
            )
            raise JournalError(
                f"{path} {cause}. Restore it from a copy; the run cannot be resumed without it."
            )
        time.sleep(0.05)
