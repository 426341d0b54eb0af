"""The place of the answer in a response. Standard library only: workers start fast."""

from __future__ import annotations

import re

from agpo_megatron.reward.contract import Response

END_OF_THOUGHT, THOUGHT = "</think>", "<think>"
BOX = "\\boxed{"
RULES = ("box", "box_or_last_number", "tag", "text")


def after_thought(text: str) -> str | None:
    """Return the text behind the last ``</think>``, or all of it; None if a thought was begun and never ended."""
    _, ended, rest = text.rpartition(END_OF_THOUGHT)
    if THOUGHT in (rest if ended else text):
        return None
    return rest


def committed_answer(response: Response, extract: str) -> str | None:
    """The text in which the response states its answer; None if it states none.

    ``extract``: "box", the last ``\\boxed{}``; "tag", the last ``<answer>`` tag; "box_or_last_number", the last box,
    else what follows the last ``####``, else the whole text, for its last number, both only if the response was not
    cut; "text", the whole response. All of them look behind the last ``</think>`` only. Raises ValueError for
    another rule.
    """
    if extract not in RULES:
        raise ValueError(f"extract: no rule {extract!r}; there are {', '.join(RULES)}")
    text = after_thought(response.text)
    if text is None:
        return None
    if extract == "text":
        return text.strip()
    if extract == "tag":
        tagged = last_tag(text)
        return tagged if tagged is None or BOX not in tagged else last_box(tagged)
    if BOX in text or extract == "box":
        return last_box(text)
    if response.truncated:
        return None  # what stands at a cut is no answer
    _, mark, rest = text.rpartition("####")
    return rest.strip().split("\n", 1)[0] if mark else text


def last_box(text: str) -> str | None:
    """Content of the last ``\\boxed{...}``, braces matched (``\\{`` is no brace); None if it is missing or unclosed."""
    start = text.rfind(BOX)
    if start < 0:
        return None
    begin = start + len(BOX)
    depth = 0
    for found in re.finditer(r"\\.|[{}]", text[begin:], re.DOTALL):
        if found[0] == "{":
            depth += 1
        elif found[0] == "}":
            if depth == 0:
                return text[begin : begin + found.start()].strip()
            depth -= 1
    return None


def last_tag(text: str, tag: str = "answer") -> str | None:
    """Content of the last ``<tag>...</tag>``; None without a closed one."""
    before, closed, _ = text.rpartition(f"</{tag}>")
    _, opened, content = before.rpartition(f"<{tag}>")
    return content.strip() if closed and opened else None
