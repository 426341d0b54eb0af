"""The head of a report: what run it is, how far it is, and in which state. Nothing of it needs a run to be whole."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agpo_megatron.config import ConfigError
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.config.yaml_core import parse_yaml
from agpo_megatron.observe.metrics import metrics_path
from agpo_megatron.observe.report.faults import Launch
from agpo_megatron.observe.summary import read_summary, summary_path

SILENT_SECONDS = 60.0
"""The controller writes its status every two seconds: silent for longer, it is not taken for alive."""


@dataclass(frozen=True)
class Facts:
    """``state``: "done", "running", "stopped", "failed", "silent" (it neither goes on nor has ended) or "unknown";
    ``because``: more about it. ``steps``: of the whole run, None if unknown."""

    name: str
    mode: str
    preset: str
    model: str
    state: str
    because: str
    steps_done: int
    steps: int | None
    versions: Mapping[str, str]
    summary: Mapping[str, Any]


def facts(run: RunFolder, launches: Sequence[Launch], steps_done: int) -> Facts:
    """Collect the head of the report. Raises ConfigError when the folder holds no run."""
    places = (run.config, metrics_path(run.path), run.journal, run.logs)
    if not any(place.exists() for place in places):
        raise ConfigError(
            f"{run.path} is not the folder of a run: it has none of "
            f"{', '.join(place.name for place in places)}. Name the folder that `run.dir` or --run-dir named."
        )
    config = _config(run)
    done = _json(run.done)
    if done.get("mode") == "train" and done["steps"] < (_at(config, "train", "steps") or 0):
        done = {}  # of before train.steps was raised; a replay of a dump ends where the dump does
    modes = [done.get("mode"), _json(run.inputs).get("mode"), *(one.mode for one in launches[-1:])]
    mode = next((mode for mode in modes if mode), "train")
    state, because = _state(done, launches)
    steps = done.get("steps") or _at(config, "sft" if mode == "sft" else "train", "steps")
    return Facts(
        name=run.path.resolve().name,
        mode=mode,
        preset=str(_at(config, "algorithm", "preset") or "") if mode != "sft" else "",
        model=str(_at(config, "model", "path") or ""),
        state=state,
        because=because,
        steps_done=steps_done,
        steps=int(steps) if steps else None,
        versions=_json(run.versions),
        summary=read_summary(run.path) if summary_path(run.path).exists() else {},
    )


def _state(done: Mapping[str, Any], launches: Sequence[Launch]) -> tuple[str, str]:
    if done:
        return "done", ""
    if not launches:
        return "unknown", "the folder has no logs of a start"
    last = launches[-1]
    if last.outcome:
        state = "stopped" if last.outcome == "stopped" else "failed"
        return ("done" if last.outcome == "finished" else state), last.reason
    silent = time.time() - last.seen
    if silent <= SILENT_SECONDS:
        return "running", f"start {last.label}"
    seen = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(last.seen))
    return "silent", f"start {last.label} has not ended, but its controller last wrote at {seen}"


def evaluations(run: RunFolder) -> dict[int, dict[str, Any]]:
    """Return the scores of each evaluated set by step."""
    found = {}
    for path in sorted(run.evaluations.glob("step-*.json")):
        found[int(path.stem.removeprefix("step-"))] = dict(_json(path).get("sets", {}))
    return found


def _config(run: RunFolder) -> Any:
    """Read the resolved config as plain values: that of another release may have keys that this one does not know."""
    if not run.config.exists():
        return {}
    return parse_yaml(run.config.read_text(), str(run.config))[0]


def _at(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _json(path: Path) -> dict[str, Any]:
    """Read a small file of the run; {} where there is none."""
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())
    return found
