"""The samples that a report shows: which, and how much of each. Bounded in number and in tokens, whatever the run."""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from agpo_megatron.journal import BatchRecord, JournalError, JournalReader
from agpo_megatron.observe.report.sweep import (
    Swept,
    SweptBatch,
    entries,
    logprob_gaps,
    read_row,
)
from agpo_megatron.samples import Array, WeightVersion

NEWEST, SPREAD_BATCHES, SPREAD_EACH, WORST = 64, 16, 8, 20
"""Samples of the newest batch; batches evenly over the run, and samples of each; samples with the largest gaps."""
SAMPLE_TOKENS, ALL_TOKENS = 2000, 200_000
"""Tokens shown of one sample (beginning, end, and the surroundings of the largest gap) and of all together."""
PROMPT_CHARS = 2000
CHARACTER_TOKENS = 8
"""Tokens that one character may be made of; what is longer is no text."""
Pieces = Callable[[Sequence[int]], list[str]]
"""Maps the ids of consecutive tokens to their texts, one each."""


@dataclass(frozen=True)
class Chosen:
    """Row ``row`` of batch number ``batch`` of the sweep. ``why``: "newest", "spread", "worst gap"."""

    batch: int
    row: int
    why: tuple[str, ...]


def choose(swept: Swept) -> list[Chosen]:
    """Choose the samples to show, in the order of the run; deterministic."""
    batches = swept.batches
    why: dict[tuple[int, int], list[str]] = {}
    if batches:
        for row in _groups_up_to(batches[-1], NEWEST):
            why.setdefault((len(batches) - 1, row), []).append("newest")
    for place in spread(len(batches), SPREAD_BATCHES):
        for row in _groups_up_to(batches[place], SPREAD_EACH):
            why.setdefault((place, row), []).append("spread")
    gaps = (
        (float(gap), place, row)
        for place, batch in enumerate(batches)
        for row, gap in _largest(batch.numbers["gap"])
    )
    for _, place, row in heapq.nlargest(WORST, gaps):
        why.setdefault((place, row), []).append("worst gap")
    return [Chosen(place, row, tuple(reasons)) for (place, row), reasons in sorted(why.items())]


def spread(count: int, wanted: int) -> list[int]:
    """Return at most ``wanted`` of the numbers below ``count``, evenly, with both ends."""
    return sorted({round(x) for x in np.linspace(0, count - 1, min(count, wanted))})


def _groups_up_to(batch: SweptBatch, limit: int) -> list[int]:
    """Return the rows of whole groups, evenly over the batch, at least one group, at most ``limit`` rows."""
    size = max(1, int(np.bincount(batch.group).max()))
    shown = spread(int(batch.group.max()) + 1, max(1, limit // size))
    return [int(row) for row in np.flatnonzero(np.isin(batch.group, shown))][:limit]


def _largest(gaps: Array) -> list[tuple[int, float]]:
    known = np.flatnonzero(np.isfinite(gaps))
    top = known[np.argsort(-gaps[known], kind="stable")[:WORST]]
    return [(int(row), float(gaps[row])) for row in top]


def show(
    reader: JournalReader, swept: Swept, chosen: Sequence[Chosen], pieces: Pieces | None
) -> Iterator[dict[str, Any]]:
    """Yield each chosen sample as the page takes it; one that cannot be read any more is left out.

    ``pieces``: without it tokens are shown as numbers.
    """
    limit = min(SAMPLE_TOKENS, ALL_TOKENS // max(1, len(chosen)))
    record: BatchRecord | None = None
    name = ""
    for choice in chosen:
        batch = swept.batches[choice.batch]
        if batch.name != name:
            record, name = None, batch.name
            with suppress(JournalError):
                record = reader.record(name)
        if record is None:
            continue
        sample, decided = read_row(reader, record, choice.row)
        if sample is not None:
            yield _shown(record, choice, sample, decided, limit, pieces)


def _shown(
    record: BatchRecord,
    choice: Chosen,
    sample: pa.RecordBatch,
    decided: pa.RecordBatch | None,
    limit: int,
    pieces: Pieces | None,
) -> dict[str, Any]:
    def cell(name: str) -> Any:
        return sample.column(name)[0].as_py()

    row = choice.row
    tokens = entries(sample, "response_tokens")
    assert tokens is not None  # every sample has them
    gaps = logprob_gaps(sample, decided)
    ranges = shown_ranges(len(tokens), limit, gaps)
    prompt = cell("prompt_text") or ""
    versions = json.loads(cell("versions"))
    return {
        "id": record.sample_ids[row],
        "group": record.sample_ids[row].rpartition(".")[0],
        "step": record.first_step + int(record.columns["update"][row]),
        "why": list(choice.why),
        "source": cell("source"),
        "reward": number(record.columns["reward"][row]),
        "raw": number(cell("raw_reward")),
        "advantage": number(record.columns["advantage"][row]),
        "weight": number(record.columns["loss_weight"][row]),
        "staleness": number(record.columns["staleness"][row]),
        "length": len(tokens),
        "correct": bool(cell("correct")),
        "finish": cell("finish_reason"),
        "error": cell("reward_error") or "",
        "parts": {k: number(v) for k, v in json.loads(cell("reward_parts") or "{}").items()},
        "prompt": prompt[:PROMPT_CHARS] + (" …" if len(prompt) > PROMPT_CHARS else ""),
        "answer": (cell("answer") or "")[:PROMPT_CHARS],
        "gap": None if gaps is None or np.isnan(gaps).all() else float(np.nanmax(np.abs(gaps))),
        "scored": gaps is not None,
        "started_from": version_step(record.weight_version),
        "versions": [
            {"name": v["version"], "step": version_step(v["version"]), "start": v["start"]}
            for v in versions
        ],
        "ranges": [_tokens(sample, gaps, start, end, pieces) for start, end in ranges],
    }


def _tokens(
    sample: pa.RecordBatch,
    gaps: Array | None,
    start: int,
    end: int,
    pieces: Pieces | None,
) -> dict[str, Any]:
    """Describe the tokens [start, end) of a sample: ids, texts, mask, log-probs of the server, gaps."""
    ids = _list_of(sample, "response_tokens", start, end)
    return {
        "start": start,
        "ids": ids,
        "texts": pieces(ids) if pieces else None,
        "mask": _list_of(sample, "loss_mask", start, end),
        "server": [rounded(v) for v in _list_of(sample, "rollout_logprobs", start, end)],
        "gaps": None if gaps is None else [rounded(v) for v in gaps[start:end].tolist()],
    }


def _list_of(sample: pa.RecordBatch, name: str, start: int, end: int) -> list[Any]:
    found = entries(sample, name)
    return [] if found is None else found[start:end].tolist()


def shown_ranges(count: int, limit: int, gaps: Array | None) -> list[tuple[int, int]]:
    """Return which of ``count`` tokens to show, at most ``limit``: all, or beginning, end and the surroundings of the
    largest gap; in order, none empty."""
    if count <= limit:
        return [(0, count)] if count else []
    third = limit // 3
    wanted = [(0, third), (count - third, count)]
    if gaps is not None and np.isfinite(gaps).any():
        worst = int(np.nanargmax(np.abs(gaps)))
        start = min(max(0, worst - third // 2), count - third)
        wanted.append((start, start + third))
    found: list[tuple[int, int]] = []
    for start, end in sorted(wanted):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def version_step(version: str) -> int | None:
    """Return the optimizer step of a weight version; None for "initial" and other names of a server's own."""
    try:
        return WeightVersion.parse(version).step
    except ValueError:
        return None


def number(value: Any) -> float | None:
    """Return a finite number, or None, which JSON can hold."""
    return float(value) if value is not None and math.isfinite(value) else None


def rounded(value: float) -> float | None:
    """Return a log-prob with six significant digits: it is shown, not computed with."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def token_pieces(tokenizer: Any) -> Pieces:
    """Return the function that gives each token the text that it adds; a character made of several tokens comes with
    the last of them, those before have ""."""

    def decode(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def pieces(ids: Sequence[int]) -> list[str]:
        found: list[str] = []
        start = read = 0  # decoded with the piece before it: some tokenizers drop a leading space
        for end in range(1, len(ids) + 1):
            before, text = decode(ids[start:read]), decode(ids[start:end])
            if text.endswith("\ufffd") and end < len(ids) and end - read < CHARACTER_TOKENS:
                found.append("")
                continue
            found.append(text[len(before) :])
            start, read = read, end
        return found

    return pieces
