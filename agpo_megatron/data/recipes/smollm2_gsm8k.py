"""GSM8K for SmolLM2, from a folder with the published train.jsonl and test.jsonl."""

from __future__ import annotations

from pathlib import Path

from agpo_megatron.config.schema import Config
from agpo_megatron.data.problems import DataError, read_texts
from agpo_megatron.data.recipes.smollm2 import write_smollm2
from agpo_megatron.data.recipes.writing import data_is_complete, needs_data, write_jsonl


def prepare_smollm2_gsm8k(config: Config) -> None:
    """Write train and eval files (question, number after ####) and the checkpoint ``model.path``."""
    source = config.prepare.source
    if not source:
        raise DataError(
            "recipe smollm2_gsm8k reads GSM8K: set prepare.source to the folder that holds its train.jsonl and "
            "test.jsonl (github.com/openai/grade-school-math)"
        )
    made_from = {"recipe": config.prepare.recipe, "source": source}
    if needs_data(config, made_from):
        write_jsonl(config.data.path, _rows(Path(source) / "train.jsonl", config))
        if config.eval.sets:
            write_jsonl(config.eval.sets[0].path, _rows(Path(source) / "test.jsonl", config))
        data_is_complete(config, made_from)
    write_smollm2(config.model.path)


def _rows(file: Path, config: Config) -> list[dict[str, str]]:
    rows = []
    for number, row in enumerate(read_texts(str(file), ("question", "answer")), start=1):
        _, mark, answer = row["answer"].rpartition("####")
        if not mark:
            raise DataError(f"{file}, line {number}: the answer has no ####; is this GSM8K?")
        rows.append(
            {config.data.prompt_key: row["question"], config.data.answer_key: answer.strip()}
        )
    return rows
