"""The best checkpoint of a run by what is durable of it: its metrics and its evaluations."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from agpo_megatron.config import Config, ConfigError
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.observe.metrics import METRIC_FAMILIES, METRIC_KEYS, read_metrics

EVALUATION = "eval/"
SCORE = re.compile(r"accuracy(_low|_high)?|pass@\d+|(tokens|tokens_correct|value)_mean|\w+_frac")


def check_keep_best(config: Config) -> None:
    """Raise ConfigError unless ``run.keep_best`` names something that the run will know of its checkpoints."""
    name = config.run.keep_best.removeprefix("-")
    if not name.startswith(EVALUATION):
        if name and name not in METRIC_KEYS and not name.startswith(METRIC_FAMILIES):
            raise ConfigError(
                f"run: keep_best {name!r} is no metric (docs/metrics.md) and no score of an evaluation "
                "(eval/accuracy, for instance)"
            )
        return
    chosen, score = split_evaluation(name)
    sets = [each.shown for each in config.eval.sets]
    if not SCORE.fullmatch(score):
        raise ConfigError(
            f"run: keep_best {name!r}: an evaluation has accuracy, pass@K, tokens_mean, tokens_correct_mean, "
            f"truncated_frac, error_frac and value_mean, not {score!r}"
        )
    if not sets or (chosen and chosen not in sets):
        raise ConfigError(f"run: keep_best {name!r}: eval.sets has no set {chosen!r}, only {sets}")
    if not config.eval.every:
        raise ConfigError(
            f"run: keep_best {name!r} needs evaluations during training; set eval.every to a multiple of "
            f"run.checkpoint_every {config.run.checkpoint_every}"
        )


def split_evaluation(name: str) -> tuple[str, str]:
    """Return set ("" for the first) and score of ``eval/SCORE`` or ``eval/SET/SCORE``."""
    chosen, _, score = name.removeprefix(EVALUATION).rpartition("/")
    return chosen, score


def best_checkpoint(folder: RunFolder, keep_best: str, updates: int = 1) -> int | None:
    """The step of the complete checkpoint with the best value; of equals, the newest. None where none has a value.
    ``updates``: optimizer steps of a batch, of which some metrics stand with one only."""
    if not keep_best:
        return None
    name, sign = keep_best.removeprefix("-"), -1.0 if keep_best.startswith("-") else 1.0
    steps = [step for step, _ in folder.complete_checkpoints()]
    if name.startswith(EVALUATION):
        values = {step: _evaluated(folder.evaluation(step), name) for step in steps}
    else:
        rows = {int(row["step"]): row for row in read_metrics(folder.path)}
        values = {step: _of_batch(rows, step, name, updates) for step in steps}
    known = [(sign * value, step) for step, value in values.items() if math.isfinite(value)]
    return max(known)[1] if known else None


def _of_batch(rows: Mapping[int, Mapping[str, float]], step: int, name: str, updates: int) -> float:
    """The value at a step, or the newest before it in its batch."""
    for earlier in range(step, step - 1 - (step - 1) % updates, -1):
        if name in rows.get(earlier, {}):
            return rows[earlier][name]
    return math.nan


def _evaluated(path: Path, name: str) -> float:
    if not path.exists():
        return math.nan
    sets = json.loads(path.read_text())["sets"]
    chosen, score = split_evaluation(name)
    scores = sets.get(chosen, {}) if chosen else next(iter(sets.values()))
    return float(scores.get(score, math.nan))
