"""The contract between a run and a reward function: plain data in, a number or a ``Reward`` out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Problem:
    """The problem that was asked.

    ``messages``: the conversation that the policy answers, each ``{"role", "content"}``; a plain text is one message
    of the user. ``answer``: the reference, as text ("" if the data has none; JSON if it is a list or an object).
    ``source``: name of the data source. ``fields``: every field of the data row, nested as in the file.
    """

    messages: Sequence[Mapping[str, Any]]
    answer: str
    source: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Content of the last message of the user ("" without one)."""
        said = [m["content"] for m in self.messages if m["role"] == "user"]
        return str(said[-1]) if said else ""


@dataclass(frozen=True, slots=True)
class Response:
    """The answer of the policy. ``tokens``: their number. ``finish_reason``: "stop", or "length" if it was cut."""

    text: str
    tokens: int = 0
    finish_reason: str = "stop"

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(frozen=True, slots=True)
class Reward:
    """The worth of a response.

    ``correct``: whether it solves the problem, which is what accuracy and AGPO's length reward speak of; None leaves
    that to ``value >= reward.correct_at``. ``parts``: named numbers for the metrics.
    """

    value: float
    correct: bool | None = None
    parts: Mapping[str, float] = field(default_factory=dict)


def as_reward(result: object) -> Reward:
    """Convert the result of a reward function: a number, True or False (1 or 0), or a ``Reward``.

    Raises TypeError for anything else, ValueError for numbers that are not finite.
    """
    if isinstance(result, bool):
        return Reward(float(result), correct=result)
    if not isinstance(result, Reward):
        try:
            result = Reward(float(result))  # type: ignore[arg-type]  # numpy and torch scalars too
        except (TypeError, ValueError):
            kind = type(result).__name__
            raise TypeError(
                f"the function returned {kind} {str(result)[:80]!r}; it must return a number or a Reward"
            ) from None
    correct = None if result.correct is None else bool(result.correct)
    parts = {str(name): float(value) for name, value in result.parts.items()}
    for name, value in {"value": result.value, **parts}.items():
        if not math.isfinite(value):
            raise ValueError(f"the function returned {name} = {value}; rewards must be finite")
    return Reward(float(result.value), correct, parts)
