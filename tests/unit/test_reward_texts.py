"""Rewards that look at the text alone, and the contract of what a function may return."""

from __future__ import annotations

import math

import pytest

from agpo_megatron.reward import Problem, Response, Reward
from agpo_megatron.reward.contract import as_reward
from agpo_megatron.reward.texts import choice, exact, format, regex


@pytest.mark.parametrize(
    "text", ["B", "(B)", "B.", "B. because", "\\text{(B)}", "\\text{B}", "$B$", "B) it"]
)
def test_a_chosen_letter(text: str) -> None:
    assert choice(Problem([], "(B)"), Response(f"\\boxed{{{text}}}"))
    assert not choice(Problem([], "C"), Response(f"\\boxed{{{text}}}"))


@pytest.mark.parametrize("text", ["Because", "AB", "b", "not B", "B or C", "5", "", "B^2"])
def test_what_is_no_letter(text: str) -> None:
    assert not choice(Problem([], "B"), Response(f"\\boxed{{{text}}}"))


def test_a_letter_stated_without_a_box() -> None:
    def stated(text: str, finish: str = "stop") -> bool:
        return choice(Problem([], "B"), Response(text, 1, finish), extract="text")

    assert stated("I think the answer is (B).")
    assert stated("Answer: **B**")
    assert stated("First, the answer is A. No.\nThe answer is B")
    assert stated("It is\n(B)")
    assert not stated("the answer is Because")
    assert not stated("A and B are wrong, so C")
    assert not stated("the answer is B", "length")
    assert not stated("\\boxed{C} the answer is B")
    assert not stated("<think>the answer is B")
    with pytest.raises(ValueError, match="'F' is none of the letters ABCDE"):
        choice(Problem([], "F"), Response("B"))


def test_exact_and_regex() -> None:
    problem = Problem([], "Paris ")
    assert exact(problem, Response("<think>Rome</think>\n Paris"))
    assert not exact(problem, Response("paris"))
    assert exact(problem, Response("paris"), ignore_case=True)
    assert exact(problem, Response("x <answer>Paris</answer>"), extract="tag")
    assert not exact(problem, Response("<think> Paris"))
    assert regex(Problem([], "^Pa.*s$"), Response("Paris"))
    assert not regex(Problem([], "^Pa.*s$"), Response("in Paris"))
    assert regex(problem, Response("a1"), pattern=r"\d")


def test_a_format_says_nothing_of_correctness() -> None:
    good = "<think>a\nb</think>\n<answer>c</answer>\n"
    assert format(Problem([], ""), Response(good)) == Reward(1.0, None)
    assert format(Problem([], ""), Response(good + "more")) == Reward(0.0, None)
    assert format(Problem([], ""), Response("ok"), pattern="o.") == Reward(1.0)


def test_what_a_function_may_return() -> None:
    assert as_reward(True) == Reward(1.0, True)
    assert as_reward(0.25) == Reward(0.25, None)
    assert as_reward(2) == Reward(2.0)
    assert as_reward(Reward(1, None, {"a": 2})) == Reward(1.0, None, {"a": 2.0})
    for wrong, error in ((None, TypeError), ("yes", TypeError), (math.nan, ValueError)):
        with pytest.raises(error, match="the function returned"):
            as_reward(wrong)
    with pytest.raises(ValueError, match="part = inf"):
        as_reward(Reward(1, True, {"part": math.inf}))


def test_a_problem_shows_its_last_question() -> None:
    said = [("system", "s"), ("user", "one"), ("assistant", "a"), ("user", "two")]
    assert Problem([{"role": r, "content": c} for r, c in said], "").text == "two"
    assert Problem([], "").text == ""
