"""Problems from a JSONL file: read through `datasets`, turned into prompt tokens once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from agpo_megatron.config.schema import DataConfig
from agpo_megatron.samples import Ints


class DataError(ValueError):
    """A data file that cannot be used; the message names file, line and fix."""


@dataclass(frozen=True)
class Problem:
    """``tokens``: what the policy sees. ``text``: the problem as the file has it."""

    text: str
    answer: str
    tokens: Ints


def read_jsonl(path: str, keys: tuple[str, ...]) -> Dataset:
    """The fields ``keys`` of a JSONL file, as texts, one row per line that is not blank; ``line`` is its number.

    Decoded line by line with the standard library: a reader that guesses column types turns texts that look like
    dates into dates. Raises DataError with file, line and fix.
    """
    file = Path(path)
    if not file.exists():
        raise DataError(
            f"data file {file} does not exist; correct its path in the config, or prepare the data"
        )
    rows: list[dict[str, str | int]] = []
    with file.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append({"line": number, **fields_of(line, keys, f"{file}, line {number}")})
    if not rows:
        raise DataError(f"data file {file} is empty; it needs one JSON object a line")
    return Dataset.from_list(rows)


def fields_of(line: str, keys: tuple[str, ...], place: str) -> dict[str, str]:
    """``keys`` of one JSON object, numbers as they are written."""
    try:
        row = json.loads(line, parse_int=str, parse_float=str)
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is not JSON ({error.msg}); mend or remove the line") from error
    if not isinstance(row, dict):
        raise DataError(f"{place} is not a JSON object; mend or remove the line")
    for key in keys:
        if row.get(key) is None:
            raise DataError(
                f"{place}: no field {key!r} (it has {sorted(k for k in row if row[k] is not None)}); "
                "name the right fields with data.prompt_key and data.answer_key"
            )
    return {key: str(row[key]) for key in keys}


def load_problems(path: str, data: DataConfig, tokenizer: Any) -> list[Problem]:
    """All problems of a file in file order. Raises DataError, also for a prompt over ``data.max_prompt_tokens``."""
    problems = []
    for row in read_jsonl(path, (data.prompt_key, data.answer_key)):
        text = f"{data.prefix}{row[data.prompt_key]}{data.suffix}"
        tokens = prompt_tokens(text, data.chat_template, tokenizer)
        if not 0 < len(tokens) <= data.max_prompt_tokens:
            raise DataError(
                f"{path}, line {row['line']}: the prompt has {len(tokens)} tokens, allowed are 1 to "
                f"data.max_prompt_tokens {data.max_prompt_tokens}; raise it or drop the line"
            )
        problems.append(Problem(str(row[data.prompt_key]), str(row[data.answer_key]), tokens))
    return problems


def prompt_tokens(text: str, chat_template: bool, tokenizer: Any) -> Ints:
    """Tokens of a prompt: a user message through the chat template, or the text, after BOS if the tokenizer adds it."""
    if chat_template:
        rendered: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        return np.array(tokenizer.encode(rendered, add_special_tokens=False), np.int32)
    return np.array(tokenizer.encode(text, add_special_tokens=True), np.int32)
