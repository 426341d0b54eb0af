"""The prompt stream: endless, shuffled anew each epoch from the seed, addressable by position.

One source: position p is problem ``shuffle(seed, epoch)[p mod n]`` of epoch ``p // n``. Several: an epoch of N
positions (all problems of all sources) has a fixed number of places for each, by its weight, in an order shuffled
anew; each source's own problems follow one another in its own shuffled epochs. A pure function of seed and position,
so the cursor that resume needs is one integer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from agpo_megatron.data.problems import ProblemSet
from agpo_megatron.reward import Problem
from agpo_megatron.samples import Prompt

Places = np.ndarray[Any, np.dtype[np.int64]]


@lru_cache(maxsize=16)
def epoch_order(seed: int, size: int, epoch: int, stream: int = 0) -> Places:
    """Permutation of one epoch [size] (PCG64: the same on every machine and numpy version). ``stream``: whose."""
    entropy = [seed, epoch, stream] if stream else [seed, epoch]
    generator = np.random.Generator(np.random.PCG64(entropy))
    return np.argsort(generator.random(size), kind="stable")


def shuffled_position(seed: int, size: int, position: int, stream: int = 0) -> int:
    """Index into ``size`` items at ``position`` of the endless shuffled stream."""
    return int(epoch_order(seed, size, position // size, stream)[position % size])


def shares(weights: Sequence[float], size: int) -> list[int]:
    """Places of each source in an epoch of ``size``: by weight, by largest remainder, at least one each."""
    exact = [w / sum(weights) * size for w in weights]
    counts = [max(1, int(x)) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (int(exact[i]) - exact[i], i))
    for i in by_remainder[: max(0, size - sum(counts))]:
        counts[i] += 1
    return counts


class PromptStream:
    """Random access to the prompts of a run.

    ``weights``: shares of the sources; None for one of them: the number of its problems.
    """

    def __init__(
        self, sources: Sequence[ProblemSet], seed: int, weights: Sequence[float | None] = ()
    ) -> None:
        self._sources, self._seed = sources, seed
        sizes = [len(source) for source in sources]
        given = list(weights) or [None] * len(sizes)
        self._shares = (
            shares([w or n for w, n in zip(given, sizes, strict=True)], sum(sizes)) if sizes else []
        )

    def locate(self, position: int) -> tuple[int, int]:
        """(source, problem in it) at a position."""
        if len(self._sources) == 1:
            return 0, shuffled_position(self._seed, len(self._sources[0]), position)
        epoch, place = divmod(position, sum(self._shares))
        source, nth = mixed_epoch(self._seed, tuple(self._shares), epoch)[:, place]
        drawn = epoch * self._shares[source] + int(nth)
        # Stream 0 is the mixture's own.
        return int(source), shuffled_position(
            self._seed, len(self._sources[source]), drawn, int(source) + 1
        )

    def prompt_at(self, position: int) -> Prompt:
        source, index = self.locate(position)
        problems = self._sources[source]
        problem = problems.problem(index)
        return Prompt(
            position, problems.tokens[index], problem.answer, problem.text, problem.source
        )

    def problem_at(self, position: int) -> tuple[int, Problem]:
        """(source, what a reward function is given) at a position."""
        source, index = self.locate(position)
        return source, self._sources[source].problem(index)


@lru_cache(maxsize=4)
def mixed_epoch(seed: int, counts: tuple[int, ...], epoch: int) -> Places:
    """Order of the sources in one epoch: [2, N], source and how many places of it came before."""
    sources = np.repeat(np.arange(len(counts)), counts)
    order = sources[epoch_order(seed, len(sources), epoch)]
    before = np.empty(len(order), np.int64)
    for source, count in enumerate(counts):
        before[order == source] = np.arange(count)
    return np.stack([order, before])


def prompts_in_order(problems: ProblemSet, most: int | None = None) -> list[Prompt]:
    """Each problem once, as evaluation wants them; the first ``most``."""
    found = []
    for index in range(min(len(problems), most or len(problems))):
        problem = problems.problem(index)
        prompt = (problems.tokens[index], problem.answer, problem.text, problem.source)
        found.append(Prompt(index, *prompt))
    return found
