"""Excerpts of a server's weights, read back by Hugging Face name and compared bit by bit with what was sent.

``/get_weights_by_name`` (SGLang 0.5.23, models/llama.py) answers with the leading rows of the part that the server's
first rank holds, as fp32. Only Llama's class, and Mistral's which derives from it, have it. It turns the whole part
into a Python list before it cuts off the rest, so large tensors are never asked for.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

READABLE = ("LlamaForCausalLM", "MistralForCausalLM")
MAX_PART = 1 << 22
"""Values of a rank's part that the server may turn into Python numbers: 130 MB and some tenths of a second."""
MAX_VALUES = 1 << 14
"""Values of one excerpt, which cross HTTP as text."""
AT_ONCE = 4
"""Excerpts per publish."""
PADDED_TO = 32
"""Multiple of an MLP's width: SGLang pads others on a CPU, and then looks for ``up_proj`` at a wrong place."""


def readable_rows(
    config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], ranks: int
) -> dict[str, int]:
    """Select the tensors of ``shapes`` that a server of ``ranks`` tensor-parallel ranks gives back exactly, with the
    number of leading rows to ask for. ``config``: the model's config.json."""
    if (config.get("architectures") or [""])[0] not in READABLE:
        return {}
    found = {}
    for name, shape in shapes.items():
        columns = int(np.prod(shape[1:]))
        rows, part = _rows_of_first_rank(name, shape[0], config, ranks)
        if rows and part * columns <= MAX_PART:
            found[name] = min(rows, max(1, MAX_VALUES // columns))
    return found


def _rows_of_first_rank(
    name: str, rows: int, config: Mapping[str, Any], ranks: int
) -> tuple[int, int]:
    """(leading rows of the tensor that the answer begins with, rows that the server turns into numbers); (0, 0) where
    the answer is not the tensor's beginning."""
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    kv_heads = kv_heads or heads
    if re.search(r"\.[qkv]_proj\.", name):
        # The endpoint computes the size of a head, and counts a rank's heads by division.
        head_dim = config["hidden_size"] // heads
        usual = config.get("head_dim") in (None, head_dim) and kv_heads % ranks == 0
        return (rows // ranks, rows // ranks) if usual else (0, 0)
    if re.search(r"\.(gate|up)_proj\.", name):
        return (rows // ranks, rows // ranks) if rows % (ranks * PADDED_TO) == 0 else (0, 0)
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return rows // ranks, -(-rows // ranks)
    return rows, rows  # norms, and those cut along their rows, which the endpoint gathers


def chosen(readable: Mapping[str, int], step: int) -> dict[str, int]:
    """Choose the excerpts of a publish: others at each step, all in turn, the same when a step is sent again."""
    names = sorted(readable, key=lambda name: hashlib.sha256(name.encode()).digest())
    first = step * AT_ONCE
    picked = [names[(first + i) % len(names)] for i in range(min(AT_ONCE, len(names)))]
    return {name: readable[name] for name in picked}


def excerpt_digest(rows: Any) -> str:
    """Digest of numbers as fp32, whatever their nesting. Raises ValueError for what is not numbers."""
    try:
        values = np.asarray(rows, dtype=np.float32)
    except TypeError as error:
        raise ValueError(f"not numbers: {error}") from error
    return hashlib.sha256(values.tobytes()).hexdigest()[:16]
