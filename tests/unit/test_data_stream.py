"""The prompt stream: a pure function of seed and position, each problem once an epoch."""

from __future__ import annotations

from agpo_megatron.data.problems import Problem
from agpo_megatron.data.stream import PromptStream, prompts_in_order

PROBLEMS = [Problem(f"p{i}", str(i), [i]) for i in range(7)]


def answers(stream: PromptStream, start: int, end: int) -> list[int]:
    return [int(stream.prompt_at(position).answer) for position in range(start, end)]


def test_every_epoch_is_another_permutation() -> None:
    epochs = [answers(PromptStream(PROBLEMS, 3), 7 * e, 7 * e + 7) for e in range(4)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_resumed_stream_gives_the_same_prompts_from_any_position() -> None:
    whole = answers(PromptStream(PROBLEMS, 3), 0, 40)
    resumed = PromptStream(PROBLEMS, 3)
    assert answers(resumed, 23, 40) == whole[23:]
    assert answers(resumed, 0, 5) == whole[:5]
    assert answers(PromptStream(PROBLEMS, 4), 0, 40) != whole


def test_the_order_is_the_same_on_every_machine() -> None:
    """Recorded once: a run may move to another machine or library version and must see the same prompts."""
    assert answers(PromptStream(PROBLEMS, 1), 0, 14) == RECORDED


RECORDED = [2, 4, 5, 0, 6, 3, 1, 5, 6, 3, 0, 2, 1, 4]


def test_a_prompt_carries_its_position() -> None:
    prompt = PromptStream(PROBLEMS, 1).prompt_at(12)
    problem = PROBLEMS[int(prompt.answer)]
    assert (prompt.position, prompt.group_id) == (12, "g000000012")
    assert (prompt.tokens, prompt.text) == (problem.tokens, problem.text)


def test_evaluation_takes_the_file_order() -> None:
    assert [(p.position, p.answer) for p in prompts_in_order(PROBLEMS[:3])] == [
        (0, "0"),
        (1, "1"),
        (2, "2"),
    ]
