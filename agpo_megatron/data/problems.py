"""Problems from rows: what the policy sees as tokens, what a reward function sees as ``reward.Problem``."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agpo_megatron.config.task import DataConfig, SourceConfig
from agpo_megatron.data.rows import (
    BadRow,
    DataError,
    Rows,
    as_text,
    read_arrow,
    read_rows,
    refuse_bad_rows,
    value_at,
)
from agpo_megatron.files import digest
from agpo_megatron.reward import Problem
from agpo_megatron.samples import Ints

__all__ = ["BadRow", "DataError", "ProblemSet", "load_problems", "prompt_tokens", "read_texts"]
log = logging.getLogger(__name__)
TOKENIZED_TOGETHER = 1000


@dataclass(frozen=True, eq=False)
class ProblemSet:
    """The problems of one source that can be used, in the order of its rows.

    ``data``: the keys as they hold for the source. ``kept`` [n] int64: their rows. ``tokens``: [t] int32 each.
    """

    name: str
    data: DataConfig
    rows: Rows
    kept: np.ndarray[Any, np.dtype[np.int64]]
    tokens: Sequence[Ints]

    def __len__(self) -> int:
        return len(self.kept)

    def problem(self, index: int) -> Problem:
        """Return the problem as a reward function gets it."""
        row = self.rows.row(int(self.kept[index]))
        return Problem(messages_of(row, self.data), answer_of(row, self.data), self.name, row)

    def place(self, index: int) -> str:
        return self.rows.place(int(self.kept[index]))


@dataclass
class Duplicates:
    """Prompts seen so far, over all sources, by their tokens."""

    first: dict[bytes, str] = field(default_factory=dict)
    found: list[tuple[str, str]] = field(default_factory=list)

    def note(self, tokens: Ints, place: str) -> None:
        known = self.first.setdefault(bytes.fromhex(digest(tokens.tobytes())), place)
        if known != place:
            self.found.append((known, place))

    def report(self) -> str:
        """ "" or a sentence about them."""
        if not self.found:
            return ""
        first, again = self.found[0]
        return f"{len(self.found)} prompts stand there more than once; the first: {again} repeats {first}"


def load_problems(
    source: SourceConfig,
    data: DataConfig,
    tokenizer: Any,
    seen: Duplicates | None = None,
    rates: Mapping[str, float] | None = None,
    check: Callable[[Mapping[str, Any], str], None] | None = None,
) -> ProblemSet:
    """The problems of a source. ``data``: the section; what the source says itself comes first.

    ``seen``: prompts of sources loaded before, whose owner reports duplicates. ``rates``: share of right samples by
    problem (``pass_rates``), by which ``data.pass_rate`` chooses. ``check`` raises ValueError for a row, with its
    reference, that the reward could not use. Raises DataError, with all rows that cannot be used.
    """
    data = data.of(source)
    rows = read_rows(source.path, data.subset, data.split)
    bad: list[str] = []
    texts: list[str] = []
    indices: list[int] = []
    easy_or_hard = 0
    for index in range(len(rows)):
        try:
            row = rows.row(index)
            answer = answer_of(row, data)
            messages = messages_of(row, data)
            if check is not None:
                check(row, answer)
            rate = None if rates is None else rates.get(problem_id(messages))
            if rate is not None and not data.pass_rate[0] <= rate <= data.pass_rate[1]:
                easy_or_hard += 1
                continue
            texts.append(rendered(messages, row, data, tokenizer))
            indices.append(index)
        except ValueError as error:  # BadRow among them
            bad.append(f"{rows.place(index)}: {error}")
    kept: list[int] = []
    tokens: list[Ints] = []
    for index, found in zip(indices, tokenized(texts, data.chat_template, tokenizer), strict=True):
        if 0 < len(found) <= data.max_prompt_tokens:
            kept.append(index)
            tokens.append(found)
        elif data.overlong == "refuse" or not len(found):
            bad.append(
                f"{rows.place(index)}: the prompt has {len(found)} tokens, allowed are 1 to data.max_prompt_tokens "
                f"{data.max_prompt_tokens}; raise it, drop the row, or set data.overlong: drop"
            )
    if warning := refuse_bad_rows(bad, data.max_bad_rows, len(rows)):
        log.warning("%s", warning)
    if not kept:
        raise DataError(
            f"{source.path}: none of {len(rows)} rows is left ({easy_or_hard} by data.pass_rate)"
        )
    found_set = ProblemSet(source.shown, data, rows, np.array(kept, np.int64), tokens)
    _report(found_set, easy_or_hard, seen)
    return found_set


def _report(problems: ProblemSet, easy_or_hard: int, seen: Duplicates | None) -> None:
    dropped = len(problems.rows) - len(problems)
    log.info(
        "data: %s: %d problems of %d rows (%d left out, %d of them by data.pass_rate)",
        problems.name,
        len(problems),
        len(problems.rows),
        dropped,
        easy_or_hard,
    )
    own = seen if seen is not None else Duplicates()
    for index, tokens in enumerate(problems.tokens):
        own.note(tokens, problems.place(index))
    if seen is None and (text := own.report()):
        log.warning("data: %s", text)


def answer_of(row: Mapping[str, Any], data: DataConfig) -> str:
    """The reference answer, "" without ``data.answer_key``. Raises BadRow."""
    return as_text(value_at(row, data.answer_key), data.answer_key) if data.answer_key else ""


def messages_of(row: Mapping[str, Any], data: DataConfig) -> list[dict[str, Any]]:
    """The conversation that the policy is to go on with, as the row has it. Raises BadRow.

    A text is a message of the user. Messages of the assistant at the end are no part of the prompt.
    """
    value = value_at(row, data.prompt_key)
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise BadRow(
            f"field {data.prompt_key!r} is a {type(value).__name__}, neither text nor a list of messages "
            "{'role', 'content'}; name another field with data.prompt_key"
        )
    messages = [_message(message, data.prompt_key) for message in value]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise BadRow(f"field {data.prompt_key!r} holds nothing but messages of the assistant")
    return messages


def _message(message: Any, key: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise BadRow(
            f"field {key!r} is a list, but not of messages {{'role', 'content'}}: {str(message)[:80]!r}"
        )
    content = message.get("content")
    if isinstance(content, list):
        parts = [
            p.get("text") if isinstance(p, Mapping) and p.get("type") == "text" else None
            for p in content
        ]
        content = None if None in parts else "".join(map(str, parts))
    if not isinstance(content, str):
        raise BadRow(
            f"the {message['role']} message in {key!r} has no text as its content: {str(content)[:80]!r}"
        )
    return {**{k: v for k, v in message.items() if v is not None}, "content": content}


def problem_id(messages: Sequence[Mapping[str, Any]]) -> str:
    """Name of a problem that does not depend on template, system message or prefix."""
    return digest(json.dumps([[m["role"], m["content"]] for m in messages]).encode())[:16]


def rendered(
    messages: Sequence[Mapping[str, Any]], row: Mapping[str, Any], data: DataConfig, tokenizer: Any
) -> str:
    """The prompt as one text. Raises BadRow."""
    if not data.chat_template:
        if len(messages) != 1 or data.system:
            raise BadRow("several messages need a chat template; set data.chat_template: true")
        return f"{data.prefix}{messages[0]['content']}{data.suffix}"
    asked = [dict(message) for message in messages]
    last = max((i for i, m in enumerate(asked) if m["role"] == "user"), default=None)
    if last is not None:
        asked[last]["content"] = f"{data.prefix}{asked[last]['content']}{data.suffix}"
    if data.system and asked[0]["role"] != "system":
        asked.insert(0, {"role": "system", "content": data.system})
    tools = {"tools": value_at(row, data.tools_key)} if data.tools_key else {}
    try:
        return str(
            tokenizer.apply_chat_template(
                asked, tokenize=False, add_generation_prompt=True, **tools, **data.template_options
            )
        )
    except Exception as error:  # a template is a program: it raises what it likes
        raise BadRow(
            f"the chat template refuses the messages: {type(error).__name__}: {error}"
        ) from error


def tokenized(texts: Sequence[str], chat_template: bool, tokenizer: Any) -> Iterator[Ints]:
    """Tokens of rendered prompts: a template writes its special tokens itself, a text begins with BOS if the tokenizer
    adds it."""
    for start in range(0, len(texts), TOKENIZED_TOGETHER):
        some = list(texts[start : start + TOKENIZED_TOGETHER])
        for tokens in tokenizer(some, add_special_tokens=not chat_template)["input_ids"]:
            yield np.array(tokens, np.int32)


def prompt_tokens(text: str, data: DataConfig, tokenizer: Any) -> Ints:
    """Tokens of one problem that is a text."""
    prompt = rendered([{"role": "user", "content": text}], {}, data, tokenizer)
    (tokens,) = tokenized([prompt], data.chat_template, tokenizer)
    return tokens


def read_texts(path: str, keys: tuple[str, ...], max_bad_rows: int = 0) -> list[dict[str, str]]:
    """The fields ``keys`` of every row, as texts. Raises DataError with all rows that lack one."""
    rows, bad, found = read_rows(path), [], []
    for index in range(len(rows)):
        try:
            row = rows.row(index)
            found.append({key: as_text(value_at(row, key), key) for key in keys})
        except BadRow as error:
            bad.append(f"{rows.place(index)}: {error}")
    if warning := refuse_bad_rows(bad, max_bad_rows, len(rows)):
        log.warning("%s", warning)
    return found


def pass_rates(path: str) -> dict[str, float]:
    """Share of right samples by problem, from the stored samples of an evaluation. Raises DataError."""
    try:
        table = read_arrow(Path(path))
        ids, correct = (table.column(name).to_pylist() for name in ("problem_id", "correct"))
    except (OSError, KeyError, ValueError) as error:
        raise DataError(
            f"data.difficulty {path}: no samples of an evaluation ({error}); `agpo-megatron eval` writes them, in "
            "evaluations/ of the run folder"
        ) from error
    counts: dict[str, list[int]] = {}
    for name, right in zip(ids, correct, strict=True):
        entry = counts.setdefault(name, [0, 0])
        entry[0] += bool(right)
        entry[1] += 1
    return {name: right / n for name, (right, n) in counts.items()}
