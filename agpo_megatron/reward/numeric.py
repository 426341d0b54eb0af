"""Exact numeric match of an answer's last number with the reference. Standard library only: workers start fast."""

from __future__ import annotations

import re
from fractions import Fraction

# A sign belongs to a number unless it stands between two terms: 7-4, x-4, (a)-4.
NUMBER = re.compile(
    r"(?:(?<![\w)}.])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?|\.\d+)"
)
LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([-+]?\d+)\}\{(\d+)\}")
LATEX_NOISE = re.compile(
    r"\\?\$|\\[,!;]|\{,\}|\\ "
)  # currency and math signs, thin spaces, 1{,}234
LONGEST = 4096  # characters of a response's end that are looked at
DIGITS = 256  # longer "numbers" are no answers


def extract_number(text: str) -> Fraction | None:
    """The number an answer gives: that of the last ``\\boxed{...}``, else after the last ``####``, else the last one.

    A box or mark that holds no number gives None: the answer committed itself to something else.
    """
    text = LATEX_FRACTION.sub(r"\1/\2", text[-LONGEST:])
    text = LATEX_NOISE.sub("", text)
    boxed = last_boxed(text)
    if boxed is not None:
        return last_number(boxed, whole=True)
    if "####" in text:
        return first_number(text.rsplit("####", 1)[1])
    return last_number(text)


def last_boxed(text: str) -> str | None:
    """Content of the last ``\\boxed{...}``, braces matched; None without a closed one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for i in range(begin, len(text)):
        if text[i] == "{":
            depth += 1
        elif text[i] == "}":
            if depth == 0:
                return text[begin:i]
            depth -= 1
    return None


def last_number(text: str, whole: bool = False) -> Fraction | None:
    """The last number of ``text``; with ``whole``, ``text`` must be one number (spaces, $ and units aside)."""
    found = NUMBER.findall(text)
    if not found or (whole and len(found) != 1):
        return None
    return to_fraction(found[-1])


def first_number(text: str) -> Fraction | None:
    found = NUMBER.search(text.split("\n", 1)[0])
    return to_fraction(found[0]) if found else None


def to_fraction(text: str) -> Fraction | None:
    """ "1,234", "-0.5", "3/4" as an exact fraction; None for division by zero or more than ``DIGITS`` digits."""
    if len(text) > DIGITS:
        return None
    numerator, _, denominator = text.replace(",", "").partition("/")
    try:
        return Fraction(numerator) / Fraction(denominator or "1")
    except ZeroDivisionError:
        return None


def verify_numeric(answer: str, response: str) -> bool:
    """Return whether ``response`` ends in the number of ``answer``. Raises ValueError if ``answer`` has none."""
    expected = extract_number(answer)
    if expected is None:
        raise ValueError(f"the reference answer {answer!r} holds no number")
    return extract_number(response) == expected
