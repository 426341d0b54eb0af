"""metrics.jsonl: one JSON object per step, durable, never twice; other writers (writers.py) get the same numbers."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agpo_megatron.files import WriteError, write_all
from agpo_megatron.observe.writers import Row, StepWriter, open_writers

_log = logging.getLogger(__name__)

# Never renamed: dashboards and scripts of users read them. A step writes those that apply to it.
METRIC_KEYS = (
    "step",
    "reward/mean",
    "reward/accuracy",
    "reward/length",
    "reward/error_frac",
    "response/tokens_mean",
    "response/tokens_correct_mean",
    "response/truncated_frac",
    "group/zero_variance_frac",
    "group/all_correct_frac",
    "group/all_wrong_frac",
    "group/cov_length_advantage",
    "mask/kept_tokens",
    "mask/kept_groups",
    "loss/policy",
    "loss/unclipped",
    "loss/clip_gate",
    "loss/kl",
    "policy/entropy",
    "policy/ratio_mean",
    "policy/clip_frac",
    "grad_norm",
    "lr",
    "rollout/logprob_abs_diff_mean",
    "rollout/logprob_abs_diff_max",
    "rollout/staleness_mean",
    "tokens/trained",
    "tokens/skipped",
    "time/rollout",
    "time/reward",
    "time/score",
    "time/update",
    "time/publish",
    "time/step",
    "throughput/tokens_per_s",
    "idle/trainer_frac",
    "idle/servers_frac",
    "idle/publish_frac",
    "rollout/slots_used_frac",
    "rollout/fragments",
    "rollout/resumed",
    "rollout/tokens_lost",
    "rollout/length_bias",
    "window/ready_groups",
    "window/open_groups",
    "sampling/discarded_groups",
    "loss/entropy_coef",
    "correction/mean",
    "correction/dropped_frac",
    "policy/old_logprob_abs_diff_mean",
    "policy/old_logprob_abs_diff_max",
    "rollout/ess_token",
    "rollout/ess_sequence",
    "rollout/logprob_abs_diff_age0",
    "rollout/logprob_abs_diff_age1",
    "rollout/logprob_abs_diff_age2",
    "rollout/logprob_abs_diff_age4",
    "rollout/logprob_abs_diff_age8",
    "rollout/staleness_max",
    "rollout/logprob_far_frac",
    "guard/fired",
    "guard/skipped_steps",
    "busy/trainer_frac",
    "busy/rewards_frac",
    "throughput/trainer_tokens_per_s",
    "throughput/servers_tokens_per_s",
    "throughput/mfu",
    "memory/controller_gb",
    "memory/trainer_gb",
    "memory/trainer_device_gb",
    "memory/servers_gb",
    "loss/gate_level",
)
METRIC_FAMILIES = ("reward_part/", "reward_error/", "source_accuracy/")
"""Beginnings of keys that end in a name of the run's own: a part of a reward, a cause of errors, a data source."""
_KNOWN = frozenset(METRIC_KEYS)


def metrics_path(run_dir: str | Path) -> Path:
    return Path(run_dir) / "metrics.jsonl"


def read_metrics(run_dir: str | Path) -> list[dict[str, float]]:
    """Read every recorded step, in file order; values that were not finite come back as NaN.

    A last line without its newline was being written when the process died and does not count. Raises ValueError,
    naming file and line, where another line is damaged; returns [] where there is no file.
    """
    path = metrics_path(run_dir)
    return _parse(path, path.read_bytes()) if path.exists() else []


class MetricsWriter:
    """Appends steps to ``run_dir/metrics.jsonl``, and hands them to other writers.

    Opening it continues an earlier file: a torn last line is cut and recorded steps are not written again. The others
    are opened with the recorded steps, so that all hold the same numbers. One process writes. ``tensorboard``: event
    files in ``run_dir/tensorboard``; ``open_others``: opens further writers.
    """

    def __init__(
        self,
        run_dir: str | Path,
        tensorboard: bool = True,
        open_others: Callable[[Sequence[Row]], Sequence[StepWriter]] = lambda recorded: (),
    ) -> None:
        self._path = metrics_path(run_dir)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        recorded = self._recover()
        self._steps = {int(row["step"]) for row in recorded}
        self._file = self._path.open("ab", buffering=0)
        own = ["tensorboard"] if tensorboard else []
        self._others = [*open_writers(own, Path(run_dir), {}, recorded), *open_others(recorded)]

    def has(self, step: int) -> bool:
        return step in self._steps

    def write(self, metrics: Mapping[str, float]) -> bool:
        """Append one step; False, and nothing written, if that step is recorded already (a replay after a crash).

        Durable when it returns. Raises ValueError on an unknown key, a missing step or a value that is no number, and
        WriteError on a full disk; the file then ends at the last whole line.
        """
        row = _checked(metrics)
        if row["step"] in self._steps:
            return False
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        size = os.fstat(self._file.fileno()).st_size
        try:
            write_all(self._file, line)
            os.fsync(self._file.fileno())
        except OSError as error:
            os.ftruncate(self._file.fileno(), size)
            raise WriteError(self._path, error) from error
        self._steps.add(row["step"])
        shown = {key: math.nan if value is None else value for key, value in row.items()}
        for writer in self._others:
            try:
                writer.write(shown)
            except Exception as error:  # metrics.jsonl has the step, and the next start reads it
                name = type(writer).__name__
                _log.warning("%s did not take step %s: %s", name, row["step"], error)
        return True

    def close(self) -> None:
        self._file.close()
        for writer in self._others:
            writer.close()

    def _recover(self) -> list[dict[str, float]]:
        """Cut a torn last line; return the recorded steps."""
        if not self._path.exists():
            return []
        content = self._path.read_bytes()
        rows = _parse(self._path, content)
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with self._path.open("rb+") as file:
                file.truncate(whole)
                os.fsync(file.fileno())
        return rows


def _parse(path: Path, content: bytes) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            row = json.loads(line)
            row["step"]  # every line has one
            rows.append({key: math.nan if value is None else value for key, value in row.items()})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}:{number}: not a line of metrics ({error}); the file was damaged: restore or remove it"
            ) from error
    return rows


def _checked(metrics: Mapping[str, float]) -> dict[str, Any]:
    unknown = sorted(key for key in set(metrics) - _KNOWN if not key.startswith(METRIC_FAMILIES))
    if unknown:
        raise ValueError(f"unknown metric keys {unknown}: METRIC_KEYS lists those there are")
    if type(metrics.get("step")) is not int:
        raise ValueError(f"metrics need an integer step, not {metrics.get('step')!r}")
    row: dict[str, Any] = {}
    for key in (*METRIC_KEYS, *sorted(set(metrics) - _KNOWN)):
        if key in metrics:
            value = metrics[key]
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"metric {key} must be a number, not {value!r}")
            # JSON knows no NaN or infinity; null keeps the line readable everywhere.
            row[key] = value if math.isfinite(value) else None
    return row
