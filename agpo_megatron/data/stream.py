"""The prompt stream: endless, shuffled anew each epoch from the seed, addressable by position.

Position p is problem ``shuffle(seed, epoch)[p mod n]`` of epoch ``p // n``: a pure function, so the cursor that resume
needs is one integer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from agpo_megatron.data.problems import Problem
from agpo_megatron.samples import Prompt


@lru_cache(maxsize=4)
def epoch_order(seed: int, size: int, epoch: int) -> tuple[int, ...]:
    """Permutation of one epoch (PCG64: the same on every machine and numpy version)."""
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    return tuple(int(i) for i in np.argsort(generator.random(size), kind="stable"))


def shuffled_position(seed: int, size: int, position: int) -> int:
    """Index into ``size`` items at ``position`` of the endless shuffled stream."""
    return epoch_order(seed, size, position // size)[position % size]


class PromptStream:
    """Random access to the prompts of a run."""

    def __init__(self, problems: Sequence[Problem], seed: int) -> None:
        self._problems, self._seed = problems, seed

    def prompt_at(self, position: int) -> Prompt:
        problem = self._problems[shuffled_position(self._seed, len(self._problems), position)]
        return Prompt(position, problem.tokens, problem.answer, problem.text)


def prompts_in_order(problems: Sequence[Problem]) -> list[Prompt]:
    """Each problem once, as evaluation wants them."""
    return [Prompt(i, p.tokens, p.answer, p.text) for i, p in enumerate(problems)]
