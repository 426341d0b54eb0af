"""Paths of everything that belongs to a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CHECKPOINT_MARKER = "complete.json"
"""The file, written last, that makes a folder a checkpoint."""


def is_converted(model: str | Path) -> bool:
    """Say whether a model folder holds Megatron's files (of ``to-megatron``) in place of safetensors."""
    return (Path(model) / CHECKPOINT_MARKER).is_file()


@dataclass(frozen=True)
class RunFolder:
    """The folder ``runs/NAME/``; docs/design.md says what each file holds."""

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
        """One folder per start, with the logs of all its roles; ``latest`` points to the newest."""
        return self.path / "logs"

    @property
    def exported_model(self) -> Path:
        """The trained policy as a Hugging Face checkpoint."""
        return self.path / "hf"

    @property
    def done(self) -> Path:
        """Written at the very end: which mode, how many steps."""
        return self.path / "done.json"

    @property
    def lock(self) -> Path:
        """Held by the one command that works on this folder."""
        return self.path / ".lock"

    @property
    def inputs(self) -> Path:
        """Digests of the data files the run began with."""
        return self.path / "inputs.json"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    def complete_checkpoints(self) -> list[tuple[int, Path]]:
        """Checkpoints with their steps, oldest first; half-written folders do not count."""
        found = self.checkpoints.glob("step-*")
        complete = sorted(path for path in found if (path / CHECKPOINT_MARKER).exists())
        return [(int(path.name.removeprefix("step-")), path) for path in complete]

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def dump(self, step: int) -> Path:
        """Replayable run folder of a guard's finding in ``step``."""
        return self.path / "guards" / f"step-{step}"

    @property
    def exports(self) -> Path:
        return self.path / "exports"

    def export(self, step: int) -> Path:
        """The policy after ``step`` as a Hugging Face checkpoint: complete or absent."""
        return self.exports / f"step-{step:08d}"

    def scores(self, weights: str) -> Path:
        """Log-probs on their way from the trainer to the controller; removed when read."""
        return self.path / f"scores-{weights}.arrow"

    @property
    def evaluations(self) -> Path:
        """Scores and samples of every evaluation."""
        return self.path / "evaluations"

    def evaluation(self, step: int) -> Path:
        """Scores of the evaluation after ``step``; its samples lie beside it, one Arrow file per set."""
        return self.evaluations / f"step-{step:08d}.json"
