"""The prompt stream: a pure function of seed and position, each problem once an epoch, sources by their weights."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from agpo_megatron.config.task import DataConfig
from agpo_megatron.data.problems import ProblemSet
from agpo_megatron.data.rows import JsonLines
from agpo_megatron.data.stream import PromptStream, prompts_in_order, shares


def problems(count: int, name: str = "sums") -> ProblemSet:
    lines = [(i + 1, f'{{"prompt": "p{i}", "answer": {i}}}') for i in range(count)]
    tokens = [np.array([i], np.int32) for i in range(count)]
    return ProblemSet(name, DataConfig(), JsonLines("x", lines), np.arange(count), tokens)


SEVEN = [problems(7)]


def answers(stream: PromptStream, start: int, end: int) -> list[int]:
    return [int(stream.prompt_at(position).answer) for position in range(start, end)]


def test_every_epoch_is_another_permutation() -> None:
    epochs = [answers(PromptStream(SEVEN, 3), 7 * e, 7 * e + 7) for e in range(4)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_resumed_stream_gives_the_same_prompts_from_any_position() -> None:
    whole = answers(PromptStream(SEVEN, 3), 0, 40)
    resumed = PromptStream(SEVEN, 3)
    assert answers(resumed, 23, 40) == whole[23:]
    assert answers(resumed, 0, 5) == whole[:5]
    assert answers(PromptStream(SEVEN, 4), 0, 40) != whole


def test_the_order_is_the_same_on_every_machine() -> None:
    """Recorded once: a run may move to another machine or library version and must see the same prompts."""
    assert answers(PromptStream(SEVEN, 1), 0, 14) == [2, 4, 5, 0, 6, 3, 1, 5, 6, 3, 0, 2, 1, 4]
    two = PromptStream([problems(3, "a"), problems(4, "b")], 1)
    assert [(two.prompt_at(p).source, two.prompt_at(p).answer) for p in range(7)] == TWO


TWO = [("a", "1"), ("b", "2"), ("b", "0"), ("a", "0"), ("b", "3"), ("b", "1"), ("a", "2")]


def test_a_prompt_carries_its_position_and_source() -> None:
    stream = PromptStream(SEVEN, 1)
    prompt = stream.prompt_at(12)
    assert (prompt.position, prompt.group_id, prompt.source) == (12, "g000000012", "sums")
    assert (prompt.tokens.tolist(), prompt.text) == ([int(prompt.answer)], f"p{prompt.answer}")
    source, problem = stream.problem_at(12)
    assert (source, problem.answer, problem.text) == (0, prompt.answer, prompt.text)


@pytest.mark.parametrize("weights", [(), (None, None), (10.0, 90.0)])
def test_sources_without_weights_count_by_their_problems(weights: tuple[float | None, ...]) -> None:
    stream = PromptStream([problems(10, "a"), problems(90, "b")], 5, weights)
    found = [stream.prompt_at(p) for p in range(300)]
    for epoch in range(3):
        part = found[100 * epoch : 100 * epoch + 100]
        assert len({(p.source, p.answer) for p in part}) == 100  # each problem once an epoch
    assert [p.answer for p in found[:100]] != [p.answer for p in found[100:200]]


def test_sources_are_mixed_by_their_weights() -> None:
    stream = PromptStream([problems(10, "a"), problems(90, "b")], 5, (3.0, 1.0))
    for epoch in range(4):
        part = [stream.prompt_at(100 * epoch + p) for p in range(100)]
        assert Counter(p.source for p in part) == {"a": 75, "b": 25}
    sources = [stream.prompt_at(p).source for p in range(20)]
    assert len(set(sources)) == 2  # mixed, not one after the other
    # Every problem of a source is drawn once before any is drawn again.
    drawn = [p.answer for p in map(stream.prompt_at, range(400)) if p.source == "b"]
    assert len(set(drawn[:90])) == 90
    again = PromptStream([problems(10, "a"), problems(90, "b")], 5, (3.0, 1.0))
    assert [again.locate(p) for p in (399, 7, 250)] == [stream.locate(p) for p in (399, 7, 250)]


def test_shares_are_exact_and_leave_nobody_out() -> None:
    assert shares([1, 1, 1], 10) == [4, 3, 3]
    assert shares([0.7, 0.3], 10) == [7, 3]
    assert shares([1e-9, 1], 100) == [1, 99]


def test_evaluation_takes_the_file_order() -> None:
    found = prompts_in_order(problems(7), 3)
    assert [(p.position, p.answer) for p in found] == [(0, "0"), (1, "1"), (2, "2")]
    assert len(prompts_in_order(problems(7))) == 7
