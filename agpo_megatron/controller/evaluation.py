"""Greedy evaluation on held-out problems, kept per step."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from agpo_megatron.controller.run import Run
from agpo_megatron.data.stream import PromptStream
from agpo_megatron.files import write_durably
from agpo_megatron.reward.workers import RewardPool
from agpo_megatron.rollout.pool import RolloutPool
from agpo_megatron.samples import Group, Prompt, Sample, VersionSpan


@dataclass
class Rollouts:
    """Where groups come from: servers, verifiers and prompts."""

    pool: RolloutPool
    rewards: RewardPool
    stream: PromptStream
    held_out: Sequence[Prompt]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """``scores``: accuracy, tokens_mean, tokens_correct_mean (0 if none is right). ``samples``: one per problem."""

    scores: dict[str, float]
    samples: list[Sample]

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"scores": self.scores, "samples": [asdict(sample) for sample in self.samples]}
        write_durably(path, json.dumps(content, default=lambda array: array.tolist()).encode())

    @staticmethod
    def read(path: Path) -> Evaluation:
        content = json.loads(path.read_text())
        return Evaluation(content["scores"], [_sample(row) for row in content["samples"]])


def _sample(row: dict[str, Any]) -> Sample:
    arrays = {
        "prompt_tokens": np.int32,
        "response_tokens": np.int32,
        "loss_mask": np.uint8,
        "rollout_logprobs": np.float32,
    }
    lists = {name: np.array(row[name], dtype=dtype) for name, dtype in arrays.items()}
    return Sample(**{**row, **lists, "versions": tuple(VersionSpan(**v) for v in row["versions"])})


async def evaluate(run: Run, rollouts: Rollouts, step: int) -> dict[str, float] | None:
    """Greedy accuracy and response tokens on the held-out problems; kept per step, so measured once."""
    if not rollouts.held_out:
        return None
    path = run.folder.evaluation(step)
    if path.exists():
        saved = Evaluation.read(path)
    else:
        if run.version.step != step:
            return None  # the weights of that step are gone; it was not measured then
        with run.phase(f"evaluate step {step}", {}, ""):
            saved = await measure(rollouts)
        saved.write(path)
    return saved.scores


async def measure(rollouts: Rollouts) -> Evaluation:
    """Greedy decoding of every held-out problem."""

    async def one(prompt: Prompt) -> Group:
        return await rollouts.rewards.score_group(await rollouts.pool.generate_greedy(prompt))

    groups = await asyncio.gather(*(one(prompt) for prompt in rollouts.held_out))
    samples = [group.samples[0] for group in groups]
    correct = [len(s.response_tokens) for s in samples if s.accuracy > 0.5]
    scores = {
        "accuracy": len(correct) / len(samples),
        "tokens_mean": fmean(len(s.response_tokens) for s in samples),
        "tokens_correct_mean": fmean(correct) if correct else 0.0,
    }
    return Evaluation(scores, samples)
