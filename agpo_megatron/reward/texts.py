"""``choice``, ``exact``, ``regex``, ``format``: rewards that look at the text alone. Standard library only."""

from __future__ import annotations

import re

from agpo_megatron.reward.contract import Problem, Response, Reward
from agpo_megatron.reward.extraction import BOX, after_thought, committed_answer

LETTER = re.compile(
    r"(?:\\(?:text|textbf|mathrm|mbox)\{\s*)?\(?\s*([A-Z])\s*\)?\s*\}?(?:[.):,]\s.*|\.)?", re.DOTALL
)
STATED = re.compile(r"\b[Aa]nswer\b(?:\s+is)?\s*:?\s*[*($\\]*(?:\\?text\{)?\(?([A-Z])(?![A-Za-z'])")
ALONE = re.compile(r"[\s*(]*([A-Z])[\s*).]*")
FORMAT = r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*"


def choice(
    problem: Problem, response: Response, *, letters: str = "ABCDE", extract: str = "box"
) -> bool:
    """Return whether the answer chooses the letter of the reference: ``\\boxed{B}``, ``(B)``, ``B. because``.

    ``extract``: "box", "tag" (extraction.committed_answer), or "text": also "the answer is B", or a last line that
    is a letter. Raises ValueError if the reference is none of ``letters``.
    """
    expected = reference_letter(problem.answer, letters=letters)
    if extract == "text" and BOX not in response.text:
        return stated_letter(response) == expected
    answer = committed_answer(response, "box" if extract == "text" else extract)
    return answer is not None and chosen_letter(answer) == expected


def reference_letter(answer: str, *, letters: str = "ABCDE") -> str:
    """The letter of a reference. Raises ValueError if it is none of ``letters``."""
    found = chosen_letter(answer)
    if found is None or found not in letters:
        raise ValueError(
            f"the reference {answer[:80]!r} is none of the letters {letters}; mend the data or set `letters`"
        )
    return found


def chosen_letter(text: str) -> str | None:
    """The letter that a short answer begins with; None if it is anything else."""
    found = LETTER.fullmatch(text.strip().strip("$"))
    return found[1] if found else None


def stated_letter(response: Response) -> str | None:
    """The letter that a response without a box states at its end; None if it was cut, or states none."""
    text = None if response.truncated else after_thought(response.text)
    if not text or not text.strip():
        return None
    stated = STATED.findall(text[-2000:])
    alone = ALONE.fullmatch(text.strip().rsplit("\n", 1)[-1])
    return stated[-1] if stated else alone and alone[1]


def exact(
    problem: Problem, response: Response, *, extract: str = "text", ignore_case: bool = False
) -> bool:
    """Return whether the answer is the reference, character by character, surrounding space aside."""
    answer = committed_answer(response, extract)
    if answer is None:
        return False
    pair = answer.strip(), problem.answer.strip()
    return pair[0].casefold() == pair[1].casefold() if ignore_case else pair[0] == pair[1]


def regex(
    problem: Problem, response: Response, *, pattern: str = "", extract: str = "text"
) -> bool:
    """Return whether ``pattern``, or else the reference taken as one, is found in the answer. Raises re.error."""
    answer = committed_answer(response, extract)
    return answer is not None and re.search(pattern or problem.answer, answer) is not None


def format(problem: Problem, response: Response, *, pattern: str = FORMAT) -> Reward:
    """1 if ``pattern`` matches the whole response (``.`` crosses lines), else 0. Says nothing about correctness."""
    return Reward(float(re.fullmatch(pattern, response.text, re.DOTALL) is not None))
