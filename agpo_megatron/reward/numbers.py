"""Exact reading of one number. What is not wholly one number is none: half a reading is a wrong answer taken for right.

Standard library only, and quick: a few microseconds for what models mostly write.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

DIGITS = 256  # longer "numbers" are no answers
EXPONENT = 400  # of a power of ten
_UNITS = """
% dollar cent euro pound $ degree ° mm cm m km in inch inche ft feet foot yd yard mi mile meter metre centimeter
centimetre kilometer kilometre millimeter millimetre g kg mg gram kilogram s sec second min minute h hr hour day week
month year mph kph percent unit point square l ml liter litre
"""
UNITS = frozenset(_UNITS.split())

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_PLAIN = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_POWER = r"(?:[eE]|\*10\^)(?P<exponent>[-+]?\d{1,4})"
NUMBER = re.compile(
    r"(?P<sign>[-+]?)\$?(?:(?P<mixed>\d+)?\\frac(?P<over>\{[-+]?\d+\}|\d)(?P<under>\{\d+\}|\d)"
    r"|10\^(?P<ten>[-+]?\d{1,4})(?!\d)"
    rf"|(?P<whole>{_PLAIN})(?:{_POWER})?(?:/(?P<divisor>{_PLAIN}))?)"
)
# "6 1/2" and "6\frac{1}{2}" are six and a half; "61/2" is not.
MIXED = re.compile(r"(?P<sign>[-+]?)(?P<mixed>\d+) (?P<over>\d+)/(?P<under>\d+)")
UNIT = re.compile(
    r"(?:\\(?:text|mathrm|textrm|mbox)\{ ?(?P<text>[A-Za-z%° ]+)\.? ?\}|\^\\circ|\^\{\\circ\}|°|\\?%"
    r"| ?(?P<bare>[A-Za-z]+))(?:\^(?:[23]|\{[23]\}))?"
)
NOISE = re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\[,!;: ]|\{,\}|\\\$|[$~]|\\(?:dis)?[pP]laystyle")
QUICK = re.compile(r"[-+]?\d{1,18}")


class Quantity(NamedTuple):
    """``unit``: as written, without plural; "" if none. "%" leaves the value as it stands."""

    value: Fraction
    unit: str = ""


@lru_cache(maxsize=4096)
def read_number(text: str) -> Quantity | None:
    """The number that ``text`` is, as an exact fraction; None if it is anything else, or more than one number.

    Read: integers, with thousands separators, decimals, ``3/4``, ``\\frac34``, mixed numbers, ``4.5e33``,
    ``4.5\\times 10^{33}``, dollar signs, and one of ``UNITS`` behind. Not read: roots, constants, letters, powers,
    intervals, lists, numerals with a base, division by zero.
    """
    if QUICK.fullmatch(text):
        return Quantity(Fraction(int(text)))
    if len(text) > DIGITS:
        return None
    text = _plain(text)
    found = MIXED.match(text) or NUMBER.match(text)
    if found is None:
        return None
    unit = _unit(text[found.end() :])
    value = _value(found)
    return None if unit is None or value is None else Quantity(value, unit)


def same_quantity(expected: Quantity, found: Quantity | None) -> bool:
    """Equal values, and units that do not contradict each other (an answer may leave its unit out)."""
    if found is None or expected.value != found.value:
        return False
    return expected.unit == found.unit or not expected.unit or not found.unit


def _plain(text: str) -> str:
    """One spelling for what means the same in LaTeX."""
    text = text.strip().rstrip(".")
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("−", "-")
    text = text.replace("\\times", "*").replace("\\cdot", "*").replace("×", "*")
    for mark in ("\\(", "\\)", "\\[", "\\]"):
        text = text.replace(mark, "")
    text = re.sub(r"\s+", " ", NOISE.sub("", text)).strip()
    text = re.sub(r" ?\\frac ?", r"\\frac", text)
    text = re.sub(r"\\text\{([-+.\d,/]+)\}", r"\1", text)
    text = re.sub(r"\^ ?\{([-+]?\d{1,4})\}", r"^\1", text)
    return re.sub(r" ?([*/^]) ?", r"\1", re.sub(r"^([-+]) ", r"\1", text))


def _unit(rest: str) -> str | None:
    """The unit that ``rest`` is; None if it is anything else."""
    rest = rest.strip()
    if not rest:
        return ""
    found = UNIT.fullmatch(rest)
    if found is None:
        return None
    words = (found["text"] or found["bare"] or "").lower().split()
    if not words:
        return "%" if "%" in rest else "degree"
    singular = ["%" if w == "percent" else w if len(w) == 1 else w.removesuffix("s") for w in words]
    known = all(word in UNITS for word in singular)
    return " ".join(singular) if known else None


def _value(found: re.Match[str]) -> Fraction | None:
    part = found.groupdict()
    sign = -1 if part["sign"] == "-" else 1
    try:
        if part.get("whole"):
            value = Fraction(_decimal(part["whole"])) * _power_of_ten(part["exponent"])
            if part["divisor"]:
                value /= Fraction(_decimal(part["divisor"]))
        elif part.get("ten"):
            value = _power_of_ten(part["ten"])
        else:
            value = Fraction(int(part["over"].strip("{}")), int(part["under"].strip("{}")))
            value += int(part["mixed"] or 0)
    except (ZeroDivisionError, OverflowError):
        return None
    return sign * value


def _decimal(text: str) -> str:
    text = text.replace(",", "")
    return f"0{text}" if text.startswith(".") else text.removesuffix(".")


def _power_of_ten(digits: str | None) -> Fraction:
    exponent = int(digits or 0)
    if abs(exponent) > EXPONENT:
        raise OverflowError
    return Fraction(10) ** exponent
