"""Verdicts of the guards, one small file each: durable before the run goes on, honoured by resume and replay."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from agpo_megatron.journal.blocks import JournalError

Action = Literal["warn", "skip", "roll_back", "stop"]


@dataclass(frozen=True)
class GuardFinding:
    """Finding of a guard: the ``value`` of ``metric`` is beyond ``bound``. ``samples``: ids, the worst first."""

    guard: str
    metric: str
    value: float
    bound: float
    samples: Sequence[str] = ()


@dataclass(frozen=True)
class StepVerdict:
    """Decision about optimizer step ``step`` after ``findings``.

    ``first`` to ``last``: the steps that are not taken, or no longer: none after a warning, those since the checkpoint
    after a roll back. ``metrics``: the result of the update. ``settings``: those that it was decided with.
    """

    step: int
    action: Action
    findings: Sequence[GuardFinding]
    first: int
    last: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def skipped(self) -> range:
        """Steps that are not taken."""
        return range(self.first, self.last + 1)


def skipped_steps(verdicts: Iterable[StepVerdict]) -> set[int]:
    """Return all steps that some verdict does not take."""
    return {step for verdict in verdicts for step in verdict.skipped}


def encode_verdict(verdict: StepVerdict) -> bytes:
    """Encode a verdict as JSON; values that are not finite as Python writes them (NaN, Infinity)."""
    return json.dumps(asdict(verdict), indent=1).encode()


def decode_verdict(path: Path, data: bytes) -> StepVerdict:
    """Invert ``encode_verdict``. Raises JournalError naming ``path``."""
    try:
        content = json.loads(data)
        findings = [GuardFinding(**finding) for finding in content.pop("findings")]
        return StepVerdict(findings=findings, **content)
    except (ValueError, TypeError, KeyError) as error:
        raise JournalError(f"{path} is not a verdict ({error}); restore it from a copy") from error
