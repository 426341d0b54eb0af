"""``math``: the answer means what the reference means, by math-verify, with its traps closed.

math-verify reads LaTeX into sympy and compares. It lets pass what it does not understand, which is closed here before
it is asked: a base (``27_8`` would be 27), words (``neve`` would be ``even``: a product of the same letters), marks
of inexactness and congruence (``27\\ldots``), and ``4.5e33`` (4.5 times Euler's number times 33).

It has no limits of its own here: the reward worker's alarm ends what takes too long (worker.py).
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from agpo_megatron.reward.contract import Problem, Response
from agpo_megatron.reward.extraction import BOX, after_thought, committed_answer
from agpo_megatron.reward.numbers import read_number
from agpo_megatron.reward.numeric import last_number

# Without a timeout of its own it warns, once a process, that somebody else must have one.
logging.getLogger("math_verify").setLevel(logging.ERROR)

LONGEST = 1000  # characters; a longer answer is right only if it is the reference itself
BASE = re.compile(r"(?<=[0-9A-Z])_\{?(?:\\text\{)?(\w+)\}?\}?\s*$")
SCIENTIFIC = re.compile(r"(?<=[\d.])\s?[eE]([-+]?\d+)(?![\d.])")
WORDS = re.compile(
    r"(?:\\(?:text|textbf|textit|mathrm|mbox)\s*\{)?\s*([A-Za-z][A-Za-z .'-]*?)\s*\}?\s*\.?"
)
SPACING = re.compile(
    r"\\(?:left|right|bigl|bigr|Bigl|Bigr)(?![A-Za-z])|\\[,!;: ]|\\q?quad(?![A-Za-z])|\s+|~|\$"
)
ONE_SIDED = re.compile(
    r":|\\(?:l|c|v|d)?dots(?![A-Za-z])|\.\.\.|…|\\equiv|≡|\\p?mod|\\bmod|\\approx|≈|\\neq?(?![a-z])|≠"
)


def math(problem: Problem, response: Response, *, extract: str = "box") -> bool:
    """Return whether the answer equals the reference as mathematics.

    ``extract``: where the answer stands (extraction.committed_answer). Raises ValueError if math-verify cannot read
    the reference, unless the answer is the same text.
    """
    answer = committed_answer(response, extract)
    if answer is None or not answer.strip():
        return False
    reference = problem.answer.rpartition("####")[2].strip()
    if extract == "box_or_last_number" and BOX not in (after_thought(response.text) or ""):
        expected, found = read_number(reference), last_number(answer)
        return expected is not None and found is not None and expected.value == found.value
    return equal(reference, answer)


def equal(reference: str, answer: str) -> bool:
    """Return whether two texts, of LaTeX or not, mean the same. Raises ValueError as ``math``."""
    if squeezed(reference) == squeezed(answer):
        return True
    if len(answer) > LONGEST or "\0" in answer:
        return False
    expected, found = read_number(reference), read_number(answer)
    if expected is not None and found is not None and expected.value == found.value:
        return True
    words = WORDS.fullmatch(unboxed(reference)), WORDS.fullmatch(unboxed(answer))
    if words[0] and words[1] and len(words[0][1]) > 1:
        return words[0][1].casefold() == words[1][1].casefold()
    if set(ONE_SIDED.findall(answer)) - set(ONE_SIDED.findall(reference)):
        return False
    base = [BASE.search(text) for text in (reference, answer)]
    if base[1] and (not base[0] or base[0][1] != base[1][1]):
        return False
    return verified(readable(reference), readable(answer))


def squeezed(text: str) -> str:
    """The text without what only places it: spaces, ``\\left``, dollar signs, kinds of fractions."""
    text = SPACING.sub("", text.strip().rstrip("."))
    return text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")


def unboxed(text: str) -> str:
    return text.strip().strip("$").strip()


def readable(text: str) -> str:
    """The text as math-verify reads it rightly: one formula, no base, powers of ten spelled out."""
    text = text.replace("\\$", "").replace("$", " ").strip()
    text = BASE.sub("", text)
    return SCIENTIFIC.sub(r"\\times 10^{\1}", text)


def verified(reference: str, answer: str) -> bool:
    """Compare two formulas by math-verify. Raises ValueError if it cannot read the reference."""
    expected = parsed(reference)
    if not expected:
        raise ValueError(f"math-verify cannot read the reference {reference[:80]!r}; mend the data")
    found = parsed(answer)
    if not found:
        return False
    return bool(verify(expected, found, timeout_seconds=None, allow_set_relation_comp=True))


@lru_cache(maxsize=256)
def parsed(text: str) -> list[Any]:
    """The sympy objects of one formula, [] if math-verify cannot read it."""
    return list(
        parse(
            f"${text}$",
            (LatexExtractionConfig(boxed_match_priority=-1),),
            fallback_mode="no_fallback",
            extraction_mode="first_match",
            parsing_timeout=None,
        )
    )
