"""The real policy on one rank of a device, and what the reference says of the same step."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from agpo_megatron.policy import backend

Layers = Literal["auto", "local"]


def activate(device: str, layers: Layers) -> None:
    """Before anything imports megatron."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    backend.activate("cuda" if device == "cuda" else "cpu", layers)
    torch.backends.cuda.matmul.allow_tf32 = False


@contextmanager
def built(folder: Path, policy: Any, train: Any) -> Iterator[Any]:
    """A ``Policy`` of a Hugging Face folder, alone in the world."""
    import torch.distributed as dist

    from agpo_megatron.policy import parallel
    from agpo_megatron.policy.policy import Policy

    try:
        yield Policy.build(folder, policy, train, temperature=1.0, seed=1)
    finally:
        taken_down(parallel, dist)


def taken_down(parallel: Any, dist: Any) -> None:
    parallel.shutdown()
    if dist.is_initialized():
        dist.destroy_process_group()
    if backend.current().device_type == "cuda":
        torch.cuda.empty_cache()


def compared(folder: Path, model: dict[str, Any], policy: Any, limits: Any) -> list[Any]:
    """Deviations of one optimizer step from the fp64 reference: loss, log-probs, entropy, gradients, weights."""
    from agpo_megatron.parity.comparison import deviations

    case, expected, weights = case_of(folder, model, policy)
    with built(folder, policy, case.train) as rank:
        found = result_of(rank, case)
    return deviations(found, expected, weights, case.train, limits)


def case_of(folder: Path, model: dict[str, Any], policy: Any) -> tuple[Any, Any, Any]:
    """One step of the recorded batch on a model that is written to ``folder``: the case, the truth, the weights."""
    from agpo_megatron.parity import models
    from agpo_megatron.parity.batch import recorded, split, train_sequences
    from agpo_megatron.parity.cases import Case
    from agpo_megatron.parity.contract import loss_settings, one_step
    from agpo_megatron.parity.reference import Objective, truth

    models.write(folder, model)
    weights, objective = models.weights_of(folder), Objective()
    batch = recorded(vocab=model["vocab_size"])
    expected = truth(weights, model, batch, objective)
    together = train_sequences(batch, objective.aggregation, objective.norm_length)
    plan = split(together, policy.data_parallel, how="packed")
    case = Case(str(folder), policy, one_step(expected), [plan], loss_settings(objective))
    return case, expected, weights


def result_of(policy: Any, case: Any) -> Any:
    """What this rank finds, its tensors on the host."""
    from agpo_megatron.parity.cases import execute_on

    found = execute_on(policy, case)
    for tensors in (found.weights, found.gradients):
        tensors.update({name: t.cpu() for name, t in tensors.items()})
    return found


@contextmanager
def random_policy(config: dict[str, Any], policy: Any) -> Iterator[Any]:
    """A policy of the shape of ``config`` with random weights that no file holds."""
    import torch.distributed as dist

    from agpo_megatron.config.schema import TrainConfig
    from agpo_megatron.conversion.weight_map import WeightMap
    from agpo_megatron.policy import parallel, step
    from agpo_megatron.policy.policy import Policy

    layout = parallel.initialize(policy, 1)
    weight_map = WeightMap(config)
    head = step.HeadSettings(
        weight_map.shape.vocab_size, 1.0, policy.logprob_chunk, policy.logprob_kernels
    )
    built_policy = Policy(policy, TrainConfig(), weight_map, head, layout)
    try:
        with torch.no_grad(), built_policy.backend.scope():
            for chunk in built_policy.chunks:
                for parameter in chunk.parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(0.0, 0.02)
            built_policy.optimizer.reload_model_params()
        yield built_policy
    finally:
        del built_policy
        taken_down(parallel, dist)


def train_sequence(name: str, tokens: list[int], prompt: int, columns: dict[str, Any]) -> Any:
    """``prompt`` tokens (at least one, which nothing predicts), then a response of which every token trains."""
    import numpy as np

    from agpo_megatron.samples import TrainSequence

    first = max(prompt, 1)
    parts = (np.array(part, dtype=np.int32) for part in (tokens[:first], tokens[first:]))
    mask = np.ones(len(tokens) - first, dtype=np.uint8)
    return TrainSequence(name, *parts, mask, columns)


def sequences(lengths: list[int], vocabulary: int) -> list[Any]:
    """Whole samples: the first eighth is prompt, everything after it trains."""
    make = torch.Generator().manual_seed(3)
    total = sum(lengths)
    return [
        train_sequence(
            f"g0.{i}",
            torch.randint(0, vocabulary, (n,), generator=make).tolist(),
            n // 8,
            {"loss_weight": 1.0 / total, "advantage": 1.0 if i % 2 else -1.0},
        )
        for i, n in enumerate(lengths)
    ]


def llama(hidden: int, ffn: int, layers: int, heads: int, kv: int, vocab: int) -> dict[str, Any]:
    """A ``config.json``."""
    from agpo_megatron.parity.models import LLAMA

    return json.loads(json.dumps(LLAMA)) | {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
    }
