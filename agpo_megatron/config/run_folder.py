"""Where everything of a run lies. Paths only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """``runs/NAME/``: see docs/design.md for what each file holds."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def versions(self) -> Path:
        return self.path / "versions.json"

    @property
    def journal(self) -> Path:
        return self.path / "journal"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def processes(self) -> Path:
        return self.path / "processes.json"

    @property
    def exported_model(self) -> Path:
        """The trained policy as a Hugging Face checkpoint."""
        return self.path / "hf"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def evaluation(self, step: int) -> Path:
        """Greedy answers to the held-out problems after ``step``, with their scores."""
        return self.path / "evaluations" / f"step-{step:08d}.json"

    def sft(self) -> RunFolder:
        """The cold start is a run of its own inside the run's folder."""
        return RunFolder(self.path / "sft")
