"""Scores of an evaluation, from its samples alone."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa

from agpo_megatron.samples import WeightVersion

RESAMPLES = 1000  # of the bootstrap
SAMPLES_SCHEMA = pa.schema(
    [
        ("problem", pa.int64()),
        ("problem_id", pa.string()),
        ("sample", pa.int32()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("response", pa.string()),
        ("tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("value", pa.float64()),
        ("correct", pa.bool_()),
        ("parts", pa.string()),
        ("error", pa.string()),
        ("prompt_tokens", pa.list_(pa.int32())),
        ("response_tokens", pa.list_(pa.int32())),
        ("rollout_logprobs", pa.list_(pa.float32())),
        ("versions", pa.string()),
    ]
)
"""One row a sample, in the order of problems and samples. ``problem``: its place in the set. ``problem_id``:
data.problems.problem_id. ``tokens``: of the response. ``parts``: JSON. ``error``: "" or why there is no verdict.
``versions``: weight versions of the response by place, JSON."""


def pass_at(k: int, n: int, correct: int) -> float:
    """Chance that one of ``k`` samples drawn from ``n``, ``correct`` of them right, is right, without bias:

    1 - C(n - c, k) / C(n, k)        (Chen et al. 2021, arXiv:2107.03374, eq. 1)
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} samples; k must be 1 to n")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of ``values``, one per problem: percentiles over problems drawn with replacement."""
    array = np.asarray(values, dtype=np.float64)
    generator = np.random.Generator(np.random.PCG64(seed))
    drawn = generator.integers(0, len(array), (RESAMPLES, len(array)))
    low, high = np.percentile(array[drawn].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def set_scores(samples: pa.Table, max_tokens: int) -> dict[str, Any]:
    """Scores of one set of P problems with n samples each, from a table of ``SAMPLES_SCHEMA``.

    ``accuracy``: mean@n, with its 95 % interval ``accuracy_low``, ``accuracy_high``; ``pass@k`` for k = 1, 2, 4, ... n;
    ``tokens_mean``; ``tokens_correct_mean`` (0 if none is right); ``truncated_frac``; ``error_frac``; ``value_mean``;
    ``parts``; ``accuracy_at_tokens``: share of samples that are right within so many tokens; ``weights``: optimizer
    steps of the oldest and the newest weights that generated a token; absent for a model that no run has trained.
    """
    correct = np.asarray(samples.column("correct").to_numpy(zero_copy_only=False), dtype=bool)
    tokens = samples.column("tokens").to_numpy()
    problems = samples.column("problem").to_numpy()
    _, place, counts = np.unique(problems, return_inverse=True, return_counts=True)
    n = int(counts.min())
    if n != counts.max():
        raise ValueError(
            f"problems have {n} to {counts.max()} samples; an evaluation has as many of each"
        )
    right = np.bincount(place, weights=correct).astype(int)
    low, high = bootstrap_interval((right / n).tolist())
    parts: dict[str, list[float]] = {}
    for text in samples.column("parts").to_pylist():
        for name, value in json.loads(text).items():
            parts.setdefault(name, []).append(value)
    steps = _steps_of(samples)
    budgets = [2**i for i in range(5, math.ceil(math.log2(max_tokens)))] + [max_tokens]
    return {
        "problems": len(counts),
        "samples_per_problem": n,
        "accuracy": float(correct.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        **{f"pass@{k}": fmean(pass_at(k, n, int(c)) for c in right) for k in _powers(n)},
        "tokens_mean": float(tokens.mean()),
        "tokens_correct_mean": float(tokens[correct].mean()) if correct.any() else 0.0,
        "truncated_frac": _share(samples, "finish_reason", "length"),
        "error_frac": 1.0 - _share(samples, "error", ""),
        "value_mean": float(samples.column("value").to_numpy().mean()),
        "parts": {name: fmean(values) for name, values in sorted(parts.items())},
        "accuracy_at_tokens": {str(b): float((correct & (tokens <= b)).mean()) for b in budgets},
        **({"weights": [min(steps), max(steps)]} if steps else {}),
    }


def _steps_of(samples: pa.Table) -> set[int]:
    versions = {
        span["version"]
        for text in (
            samples.column("versions").unique().to_pylist()
            if "versions" in samples.column_names
            else []
        )
        for span in json.loads(text or "[]")
    }
    found = set()
    for version in versions:
        with suppress(ValueError):  # "initial": the server's own checkpoint
            found.add(WeightVersion.parse(version).step)
    return found


def _powers(n: int) -> list[int]:
    """1, 2, 4, ... and ``n`` itself."""
    return [2**i for i in range(n.bit_length()) if 2**i < n] + [n]


def _share(samples: pa.Table, column: str, value: str) -> float:
    return fmean(found == value for found in samples.column(column).to_pylist())
