"""One-digit sums for SmolLM2: 97 problems beside the three that the config's few-shot prefix shows."""

from __future__ import annotations

import random

from agpo_megatron.config.schema import Config
from agpo_megatron.data.problems import DataError
from agpo_megatron.data.recipes.smollm2 import write_smollm2
from agpo_megatron.data.recipes.writing import data_is_complete, needs_data, write_jsonl


def prepare_smollm2_sums(config: Config) -> None:
    """Write train and eval files and the checkpoint ``model.path``."""
    if not config.eval.sets:
        raise DataError("recipe smollm2_sums writes eval.sets[0].path; set it")
    prepare, seed, data = config.prepare, config.seed, config.data
    made_from = {
        "recipe": prepare.recipe,
        "seed": seed,
        "prefix": data.prefix,
        "eval_problems": prepare.eval_problems,
    }
    if needs_data(config, made_from):
        sums = [(f"{a}+{b}=", str(a + b)) for a in range(10) for b in range(10)]
        sums = [(q, answer) for q, answer in sums if q not in data.prefix]
        if prepare.eval_problems >= len(sums):
            raise DataError(
                f"prepare.eval_problems {prepare.eval_problems} leaves none of the {len(sums)} sums for training; "
                "lower it"
            )
        random.Random(f"smollm2_sums-{seed}").shuffle(sums)
        rows = [{data.prompt_key: q, data.answer_key: answer} for q, answer in sums]
        write_jsonl(config.eval.sets[0].path, rows[: prepare.eval_problems])
        write_jsonl(data.path, rows[prepare.eval_problems :])
        data_is_complete(config, made_from)
    write_smollm2(config.model.path)
