"""Worked solutions for the cold start: a prompt and the response to imitate."""

from __future__ import annotations

from typing import Any

import numpy as np

from agpo_megatron.config.task import DataConfig
from agpo_megatron.data.problems import DataError, prompt_tokens, read_texts
from agpo_megatron.samples import UNKNOWN, Group, Prompt, Sample


def load_sft_examples(path: str, data: DataConfig, tokenizer: Any) -> list[Group]:
    """One group of one sample per line ``{"prompt", "response"}``; the loss covers the response and EOS.

    Raises DataError with file and line.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no EOS token, so a response could not end; set eos_token"
        )
    groups = []
    for position, row in enumerate(read_texts(path, ("prompt", "response"))):
        prompt = Prompt(position, prompt_tokens(row["prompt"], data, tokenizer), "", row["prompt"])
        response = tokenizer.encode(row["response"], add_special_tokens=False)
        response = [*response, tokenizer.eos_token_id]
        sample = Sample(
            group_id=prompt.group_id,
            index=0,
            prompt_tokens=prompt.tokens,
            response_tokens=np.array(response, np.int32),
            rollout_logprobs=np.full(len(response), UNKNOWN, np.float32),
            loss_mask=np.ones(len(response), np.uint8),
            versions=(),
            finish_reason="stop",
            text=row["response"],
        )
        groups.append(Group(prompt, [sample]))
    return groups
