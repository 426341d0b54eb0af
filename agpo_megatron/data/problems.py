"""Problems from a JSONL file: read through `datasets`, turned into prompt tokens once."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agpo_megatron.config.schema import DataConfig


class DataError(ValueError):
    """A data file that cannot be used; the message names file, line and fix."""


@dataclass(frozen=True)
class Problem:
    """``tokens``: what the policy sees. ``text``: the problem as the file has it."""

    text: str
    answer: str
    tokens: list[int]


def read_jsonl(path: str, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of a JSONL file that all have ``keys``. Raises DataError with file, line and fix."""
    file = Path(path)
    if not file.exists():
        raise DataError(
            f"data file {file} does not exist; correct its path in the config, or prepare the data"
        )
    if file.stat().st_size == 0:
        raise DataError(f"data file {file} is empty; it needs one JSON object a line")
    from datasets import Dataset, disable_progress_bars
    from datasets.exceptions import DatasetGenerationError

    disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as cache:  # the rows stay in memory
            rows = Dataset.from_json(str(file), keep_in_memory=True, cache_dir=cache).to_list()
    except (DatasetGenerationError, ValueError) as error:
        raise DataError(f"{file}: {first_bad_line(file)}") from error
    for number, row in enumerate(rows, start=1):
        missing = [key for key in keys if row.get(key) is None]
        if missing:
            raise DataError(
                f"{file}, line {number}: no field {missing[0]!r} "
                f"(it has {sorted(k for k in row if row[k] is not None)}); "
                "name the right fields with data.prompt_key and data.answer_key"
            )
    return rows


def first_bad_line(file: Path) -> str:
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1):
        try:
            if not isinstance(json.loads(line), dict):
                return f"line {number} is not a JSON object"
        except json.JSONDecodeError as error:
            return f"line {number} is not JSON ({error.msg})"
    return "the lines are JSON, but of types that do not fit each other"


def load_problems(path: str, data: DataConfig, tokenizer: Any) -> list[Problem]:
    """All problems of a file in file order. Raises DataError, also for a prompt over ``data.max_prompt_tokens``."""
    problems = []
    for number, row in enumerate(read_jsonl(path, (data.prompt_key, data.answer_key)), start=1):
        text = f"{data.prefix}{row[data.prompt_key]}{data.suffix}"
        tokens = prompt_tokens(text, data.chat_template, tokenizer)
        if not 0 < len(tokens) <= data.max_prompt_tokens:
            raise DataError(
                f"{path}, line {number}: the prompt has {len(tokens)} tokens, allowed are 1 to "
                f"data.max_prompt_tokens {data.max_prompt_tokens}; raise it or drop the line"
            )
        problems.append(Problem(str(row[data.prompt_key]), str(row[data.answer_key]), tokens))
    return problems


def prompt_tokens(text: str, chat_template: bool, tokenizer: Any) -> list[int]:
    """Tokens of a prompt: a user message through the chat template, or the text, after BOS if the tokenizer adds it."""
    if chat_template:
        rendered: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        return list(tokenizer.encode(rendered, add_special_tokens=False))
    return list(tokenizer.encode(text, add_special_tokens=True))
