"""``math``: what means the same is right, what math-verify lets pass is not, and real references grade themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agpo_megatron.reward import Problem, Response
from agpo_megatron.reward.numbers import read_number
from agpo_megatron.reward.numeric import numeric
from agpo_megatron.reward.symbolic import equal, math, readable, verified

ANSWERS = Path(__file__).parents[3] / "shared" / "data" / "answers" / "math500_half.jsonl"
WRONG = [
    "%s\\pi", "\\sqrt{%s}", "x>%s", "%s x", "\\frac{%s}{7}", "(%s,12)", "\\{%s,12\\}", "%s\\text{ or }12", "%s_7",
    "%s+x", "\\neq %s", "\\log %s", "[%s,\\infty)", "\\approx %s", "%s\\sqrt{2}", "3^{%s}", "%s:5", "%s\\ldots",
]  # fmt: skip


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt3}"),
        ("(3,4]", "(3, 4]"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\pi/2)"),
        ("1 \\pm \\sqrt{19}", "1+\\sqrt{19},1-\\sqrt{19}"),
        ("2k+2", "2(k+1)"),
        ("\\text{Evelyn}", "evelyn"),
        ("\\text{(B)}", "B"),
        ("52_8", "52"),
        ("52_8", "52_{8}"),
        ("4.5e33", "4.5\\times 10^{33}"),
        ("1.6e-7", "1.6\\times10^{-7}"),
        ("x<2", "(-\\infty,2)"),
        ("$x=2$ or $y=3$", "x=2,y=3"),
        ("10,\\!080", "10080"),
        ("90^\\circ", "90"),
        (
            "\\begin{pmatrix} 1/5 \\\\ -18/5 \\end{pmatrix}",
            "\\begin{pmatrix}0.2\\\\-3.6\\end{pmatrix}",
        ),
        ("033", "33"),
        ("#### 12", "12"),
    ],
)
def test_the_same_is_right(reference: str, answer: str) -> None:
    assert math(Problem([], reference), Response(f"so \\boxed{{{answer}}}"))


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("even", "neve"),
        ("\\text{even}", "odd"),
        ("52_8", "52_9"),
        ("27", "27_8"),
        ("27", "27\\ldots"),
        ("27", "x \\equiv 27"),
        ("5", "5 \\pmod 7"),
        ("4.5e33", "4.5 e^{33}"),
        ("3", "3:5"),
        ("(3,4]", "[3,4]"),
        ("2", "2 or 3"),
        ("0.333", "1/3"),
        ("a", "b"),
        ("11:00 AM", "11:00 PM"),
        ("5", ""),
        ("5", "\0"),
        ("5", "5" + " " * 2000 + "6"),
    ],
)
def test_what_math_verify_would_let_pass_or_misread(reference: str, answer: str) -> None:
    assert not math(Problem([], reference), Response(f"so \\boxed{{{answer}}}"))


def test_where_the_answer_is_looked_for() -> None:
    problem = Problem([], "\\frac12")
    assert not math(problem, Response("it is 1/2"))
    assert math(problem, Response("it is 1/2"), extract="box_or_last_number")
    assert not math(problem, Response("it is 1/2", 9, "length"), extract="box_or_last_number")
    assert math(problem, Response("<answer>0.5</answer>"), extract="tag")
    assert not math(problem, Response("<think>\\boxed{0.5}</think>"))
    assert math(problem, Response("\\boxed{3}, no: \\boxed{0.5}"))


def test_a_reference_that_cannot_be_read_is_an_error_except_for_the_same_text() -> None:
    assert equal("\\sqrt[", "\\sqrt[")
    with pytest.raises(ValueError, match="cannot read the reference"):
        equal("\\sqrt[", "5")


@pytest.fixture(scope="module")
def references() -> list[str]:
    if not ANSWERS.exists():
        pytest.skip(f"{ANSWERS} is not there: real references are not part of this repository")
    return [json.loads(line)["answer"] for line in ANSWERS.read_text().splitlines()]


def test_real_references_grade_themselves(references: list[str]) -> None:
    """math: all of them. numeric: those that are numbers; it refuses the others rather than misread them."""
    boxed = [(Problem([], r), Response(f"Thus \\boxed{{{r}}}.")) for r in references]
    assert sum(math(*pair) for pair in boxed) >= 0.99 * len(references)
    assert all(numeric(*pair) for pair in boxed if read_number(pair[0].answer))


def test_math_verify_reads_real_references(references: list[str]) -> None:
    """Not through the shortcut for equal texts."""
    readings = [readable(reference) for reference in references]
    right = [verified(reading, reading) for reading in readings]
    assert sum(right) >= 0.99 * len(references)


def test_wrong_wrappings_of_real_integers_are_wrong(references: list[str]) -> None:
    integers = [r for r in references if r.isdigit() and int(r) > 1 and r != "12"]
    wrong = [(r, shape.replace("%s", r)) for r in integers[::4] for shape in WRONG]
    accepted = [pair for pair in wrong if equal(*pair)]
    assert len(accepted) <= 0.005 * len(wrong), accepted
    misread = [p for p in wrong if numeric(Problem([], p[0]), Response(f"\\boxed{{{p[1]}}}"))]
    assert misread == []
