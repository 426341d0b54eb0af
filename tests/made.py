"""Sequences, samples and losses as tests like to write them: lists aligned with all tokens, flat settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from agpo_megatron.algorithm.settings import LossSettings
from agpo_megatron.samples import Prompt, Sample, TrainSequence, VersionSpan, columns

PER_TOKEN = {c.name: c.dtype for c in columns("token")}


def sequence(
    sample_id: str,
    tokens: Sequence[int],
    loss_weight: float,
    loss_mask: Sequence[int],
    advantage: float,
    **values: Any,
) -> TrainSequence:
    """The first token is the prompt. Lists have one entry per token; that of the first is not used."""
    made = TrainSequence(
        sample_id,
        np.array(tokens[:1], np.int32),
        np.array(tokens[1:], np.int32),
        np.array(loss_mask[1:], np.uint8),
    )
    return changed(made, loss_weight=loss_weight, advantage=advantage, **values)


def changed(s: TrainSequence, **values: Any) -> TrainSequence:
    """The sequence with other columns: numbers, or lists with one entry per token."""
    if "old_logprobs" in values:  # which count from the second update of a batch on
        values = {"update": 1, **values}
    arrays = {
        name: np.array(value[1:], PER_TOKEN[name]) if name in PER_TOKEN else value
        for name, value in values.items()
    }
    return replace(s, columns={**s.columns, **arrays})


def trained(s: TrainSequence) -> list[int]:
    """Places of the tokens that train among all tokens."""
    return [int(t) + len(s.prompt_tokens) for t in s.trained()]


def prompt(position: int, tokens: Sequence[int] = (1, 2), answer: str = "x") -> Prompt:
    return Prompt(position, np.array(tokens, np.int32), answer, f"what is {position}?")


def sample(of: Prompt, index: int, length: int, **changes: Any) -> Sample:
    """A finished response of ``length`` tokens under version 0.1, log-prob -1 each."""
    values: dict[str, Any] = {
        "response_tokens": np.full(length, 5, np.int32),
        "loss_mask": np.ones(length, np.uint8),
        "rollout_logprobs": np.full(length, -1.0, np.float32),
        "versions": (VersionSpan("0.1.", 0, length),),
        "finish_reason": "stop",
        **changes,
    }
    return Sample(group_id=of.group_id, index=index, prompt_tokens=of.tokens, **values)


_PLACES = {
    "adaptive": ("clip", "kind"),
    "minimum": ("clip", "min"),
    "tau": ("clip", "tau"),
    "tie": ("clip", "tie"),
    "scope": ("clip", "scope"),
    "on": ("clip", "on"),
    "when_clipped": ("clip", "when_clipped"),
    "kl_coef": ("kl", "coef"),
    "kl_estimator": ("kl", "estimator"),
    "kl_importance": ("kl", "importance"),
    "entropy_coef": ("entropy", "coef"),
}


def loss(**flat: Any) -> LossSettings:
    """Loss settings with the keys of the subsections beside the others."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        section, key = _PLACES.get(name, ("", name))
        (tree.setdefault(section, {}) if section else tree)[key] = value
    return LossSettings.model_validate(tree)
