"""Numbers are read wholly or not at all, and compared exactly."""

from __future__ import annotations

from fractions import Fraction

import pytest

from agpo_megatron.reward import Problem, Response
from agpo_megatron.reward.numbers import read_number
from agpo_megatron.reward.numeric import last_number, numeric


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("42", "42", ""),
        ("-1,234.50", "-2469/2", ""),
        ("10,\\!080", "10080", ""),
        ("1{,}234", "1234", ""),
        (".0000672", "21/312500", ""),
        ("27.", "27", ""),
        ("$27$", "27", ""),
        ("\\(27\\)", "27", ""),
        ("\\$32,\\!348", "32348", ""),
        ("3/4", "3/4", ""),
        ("\\frac43", "4/3", ""),
        ("\\dfrac{17}{50}", "17/50", ""),
        ("\\frac{-1}{2}", "-1/2", ""),
        ("-\\frac{24}{25}", "-24/25", ""),
        ("1\\frac{4}{5}", "9/5", ""),
        ("137 \\frac{1}{2}", "275/2", ""),
        ("6 1/2", "13/2", ""),
        ("61/2", "61/2", ""),
        ("4.5e33", "45" + "0" * 32, ""),
        ("4.5\\times 10^{33}", "45" + "0" * 32, ""),
        ("1.6 \\cdot 10^{-7}", "1/6250000", ""),
        ("10^{-3}", "1/1000", ""),
        ("145^\\circ", "145", "degree"),
        ("5\\text{ cm}^2", "5", "cm"),
        ("\\frac{270}7\\text{ degrees}", "270/7", "degree"),
        ("5cm", "5", "cm"),
        ("50\\%", "50", "%"),
        ("\\text{27}", "27", ""),
    ],
)
def test_a_number_is_read_exactly(text: str, value: str, unit: str) -> None:
    assert read_number(text) == (Fraction(value), unit)


NO_NUMBER = [
    "\\frac{\\sqrt3}{2}", "(3,4]", "n\\pi", "5\\pi", "\\sqrt{5}", "x>5", "x=5", "5x", "52_8", "2^{10}", "3!",
    "3, 5, 7", "1 2", "12 34", "1,23", "1,2345", "3:5", "1.2.3", "6+9i", "1 \\pm 2", "288 \\pi", "\\frac{1}{2}\\pi",
    "27\\text{ or }28", "5\\text{ million}", "5 million", "27 or less", "five", "", "1/0", "\\frac{1}{0}", "9" * 400,
    "1e9999", "10^{99999}", "\\infty", "5e", "--5", "5-", "\\text{5 cm}", "{5", "5}", "5\0",
]  # fmt: skip


@pytest.mark.parametrize("text", NO_NUMBER)
def test_what_is_not_wholly_a_number_is_none(text: str) -> None:
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("the answer is 42.", "42"),
        ("first 7, then 1,234", "1234"),
        ("-\\dfrac{3}{4}", "-3/4"),
        ("so 7-4", "4"),  # an operator is no sign
        ("x = -4", "-4"),
        ("3 + 4 = 7", "7"),
        ("it costs -$1,234.50", "-2469/2"),
        ("so \\(42\\).", "42"),
        ("\\[ x = 42 \\]", "42"),
        ("**42**", "42"),
        ("(42).", "42"),
        ("=> 42", "42"),
        ("5km", "5"),
        ("7 apples", "7"),
        ("50%", "50"),
        ("in " + "x" * 300 + " 2020", "2020"),
    ],
)
def test_the_last_number_of_a_sentence(text: str, value: str) -> None:
    found = last_number(text)
    assert found is not None and found.value == Fraction(value)


@pytest.mark.parametrize(
    "text",
    ["x^2", "5\\pi", "\\frac{\\sqrt3}{2}", "(3,4]", "x > 5", "f(42)", "5 million", "7*8", "2nd", "2:30", "\\sqrt5",
     "1,2345", "9" * 400, "none", "", "1/0", "2^{10}", "5!"],
)  # fmt: skip
def test_a_number_that_is_part_of_something_else_is_no_answer(text: str) -> None:
    assert last_number(text) is None


def graded(reference: str, text: str, **options: str) -> bool:
    finish = options.pop("finish_reason", "stop")
    return numeric(Problem([], reference), Response(text, 1, finish), **options)


def test_the_answer_is_the_last_box_behind_the_thought() -> None:
    assert graded("7", "\\boxed{7}")
    assert graded("7", "\\boxed{3} no, \\boxed{7} at last, 9")
    assert not graded("7", "\\boxed{7} no, \\boxed{3}")
    assert graded("7", "<think>\\boxed{3}</think> a </think> \\boxed{7}")
    assert not graded("7", "<think>\\boxed{7}</think> nothing here")
    assert not graded("7", "<think> it is \\boxed{7}")  # a thought that never ended
    assert not graded("7", "\\boxed{7\\pi} 7")
    assert not graded("7", "\\boxed{7")
    assert graded("\\frac{1}{2}", "\\boxed{\\frac{1}{2}}")


def test_marks_units_and_values() -> None:
    assert graded("#### 1,000", "it is 1000.0")
    assert graded("0.5", "1/2")
    assert graded("8", "3 + 4 = 7\n#### 8\nbut then 9")
    assert graded("36", "\\boxed{\\$36}")
    assert graded("5", "\\boxed{5\\text{ cm}^2}")
    assert graded("5 cm", "\\boxed{5}")
    assert not graded("5 cm", "\\boxed{5 km}")
    assert not graded("7", "70")
    assert not graded("7", "-7")
    assert not graded("0.333", "1/3")
    assert not graded("10", "####")


def test_what_stands_at_a_cut_is_no_answer() -> None:
    assert not graded("12", "so far 12", finish_reason="length")
    assert not graded("12", "#### 12", finish_reason="length")  # it may have gone on: 123
    assert graded("12", "\\boxed{12} and", finish_reason="length")


def test_rules_of_extraction() -> None:
    assert not graded("7", "it is 7", extract="box")
    assert graded("7", "it is <answer> 7 </answer> not 8", extract="tag")
    assert graded("7", "<answer>\\boxed{7}</answer>", extract="tag")
    assert not graded("7", "<answer>7", extract="tag")
    with pytest.raises(ValueError, match="no rule 'bax'"):
        graded("7", "7", extract="bax")


def test_a_reference_that_is_no_number_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'2\\\\pi' is not one number.*`math`"):
        graded("2\\pi", "5")
