"""``numeric``: the answer is one number, and it is the reference, exactly. Standard library only."""

from __future__ import annotations

import re

from agpo_megatron.reward.contract import Problem, Response
from agpo_megatron.reward.extraction import committed_answer
from agpo_megatron.reward.numbers import DIGITS, Quantity, read_number, same_quantity

# A number in prose, and what touches it. A sign belongs to it unless it stands between two terms: 7-4, x-4, (a)-4.
TOKEN = re.compile(
    r"(?:(?<![\w)}.])[-+])?\\?\$?"
    r"(?:\\[dt]?frac(?:\{[-+]?\d+\}\{\d+\}|\d\d)|(?:\d[\d,{}!\\]*\d|\d)?(?:\.?\d+)(?:[eE][-+]?\d+)?(?:/\d+)?)"
    r"(?:\s?\\?%|\s?\^\\circ)?"
)
# Next to these a number is a part of something else: x^2, \sqrt{2}, 5\pi, (3,4], x > 5, 2n, 2:30, 5 million.
BEFORE = re.compile(r"(?:(?:[\\^_{*/·×√<≤≥≠≈]|(?<!\\)\[|(?<![=-])>)\s?|[\w,]|(?<!\\)\(|\d:)$")
AFTER = re.compile(
    r"\s?(?:[\^_*×·√}\[\]+/!]|\\(?!\)|\]|\$|text|\s|,|;)|(?:hundred|thousand|million|billion|trillion|dozen)\b)|\("
)
LETTERS = re.compile(r"[A-Za-z]+")


def numeric(problem: Problem, response: Response, *, extract: str = "box_or_last_number") -> bool:
    """Return whether the answer is the number of the reference, by exact value.

    ``extract``: where the answer stands (extraction.committed_answer). An answer that is not wholly one number is
    wrong. Raises ValueError if the reference is not one either.
    """
    expected = reference(problem.answer)
    answer = committed_answer(response, extract)
    if answer is None:
        return False
    found = read_number(answer)
    if found is None and extract == "box_or_last_number" and "\\boxed{" not in response.text:
        found = last_number(answer)
    return same_quantity(expected, found)


def reference(answer: str) -> Quantity:
    """The number of a reference answer: what stands behind its last ``####``, if it has one (GSM8K), else all of it."""
    text = answer.rpartition("####")[2]
    found = read_number(text.strip())
    if found is None:
        raise ValueError(
            f"the reference {text.strip()[:80]!r} is not one number; use reward `math`, or mend the data"
        )
    return found


def last_number(text: str) -> Quantity | None:
    """The last number of a sentence; None if it is a part of something else, such as 2 in ``x^2``."""
    end = 1 + max(text.rfind(digit) for digit in "0123456789")
    last, begin = None, end
    for width in (
        40,
        DIGITS,
    ):  # mostly short; one that may begin before the window is looked at again
        if last is None or (last.start() == 0 < begin):
            begin = max(0, end - width)
            near = text[begin : end + 16]
            for last in TOKEN.finditer(near):  # noqa: B007  # wanted is the last one
                pass
    if last is None or (last.start() == 0 < begin):
        return None
    before, after = near[: last.start()], near[last.end() :]
    enclosed = re.search(r"(?<!\w)\($", before) and after.startswith(")")
    enclosed = enclosed or (before.endswith("**") and after.startswith("**"))
    if not enclosed and (BEFORE.search(before[-8:]) or AFTER.match(after)):
        return None
    unit = LETTERS.match(after)
    return read_number(last[0].strip().rstrip(",") + (unit[0] if unit else ""))
