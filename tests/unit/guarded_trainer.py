"""A trainer without a model, whose weights are the list of the steps taken: what guards let it take can be read off."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agpo_megatron.algorithm.limits import broken, not_finite
from agpo_megatron.config.run_folder import CHECKPOINT_MARKER
from agpo_megatron.journal import JournalReader


class GuardedTrainer:
    """``results``: by step, what its update gives where that is not the usual. A save that is not waited for stays
    under way until it is."""

    def __init__(self, results: Mapping[int, Mapping[str, float]]) -> None:
        self.results = results
        self.step, self.taken, self.last = 0, list[int](), dict[str, Any]()
        self.calls: list[tuple[str, int]] = []
        self.saving: tuple[Path, list[int]] | None = None

    async def call(self, name: str, **args: Any) -> list[dict[str, Any]]:
        self.calls.append((name, args.get("step", 0)))
        if name == "load":
            if args["checkpoint"] and self.step < args["step"]:
                self._read(args["checkpoint"])
                self.step = args["step"]
            self._complete()
            answer = {"backend": "gloo", "step": self.step, "last_update": self.last}
            return [{**answer, "damaged": ""}]
        if name in ("update", "pass_over"):
            assert args["step"] == self.step + 1
            self.last = self._update(**args) if name == "update" else {"passed_over": 1.0}
            self.step = args["step"]
            return [dict(self.last)]
        if name == "roll_back":
            self.taken = []
            if args["checkpoint"]:
                self._read(args["checkpoint"])
            self.step = args["step"]
        if name == "save":
            assert self.saving is None
            self.saving = Path(args["path"]), list(self.taken)
        if name in ("save", "save_done"):
            if not args["wait"]:
                return [{"done": False, "held": 0.0}]
            self._complete()
            return [{"done": True, "seconds": 0.0, "bytes": 1}]
        return [{}]

    def _complete(self) -> None:
        if self.saving:
            (path, taken), self.saving = self.saving, None
            if (path / CHECKPOINT_MARKER).exists():  # stays as it is, as the real trainer leaves it
                assert json.loads((path / "taken.json").read_text()) == taken
                return
            path.mkdir(parents=True)
            (path / "taken.json").write_text(json.dumps(taken))
            (path / CHECKPOINT_MARKER).touch()

    def _read(self, checkpoint: str) -> None:
        self.taken = json.loads((Path(checkpoint) / "taken.json").read_text())

    def _update(
        self, step: int, journal: str, record: str, limited: bool, hold: bool, **_: Any
    ) -> dict[str, float]:
        limits = JournalReader(Path(journal)).record(record).limits if limited else ()
        metrics = {
            "loss/policy": 0.5,
            "grad_norm": 1.0,
            "policy/entropy": 0.5,
            **self.results.get(step, {}),
        }
        if hold or not_finite(metrics) or broken(limits, metrics):
            return {**metrics, "skipped": 1.0}
        self.taken.append(step)
        return metrics
