"""Parameters of this rank's chunks <-> Hugging Face tensors, one parameter at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from agpo_megatron.conversion.cutting import (
    hf_from_shards,
    padded_vocabulary,
    shard_size,
    shard_to_megatron,
)
from agpo_megatron.conversion.hf_checkpoint import HfCheckpoint
from agpo_megatron.conversion.tables import Rule
from agpo_megatron.conversion.weight_map import WeightMap
from agpo_megatron.policy import backend
from agpo_megatron.policy.model import unwrap
from agpo_megatron.policy.parallel import Layout
from agpo_megatron.policy.stored_reader import StoredModel


def global_parameters(chunks: Sequence[Any]) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by Megatron name with global layer and expert numbers, over all its chunks."""
    found: dict[str, torch.nn.Parameter] = {}
    for chunk in chunks:
        model = unwrap(chunk)
        for name, parameter in model.named_parameters():
            found[_global_name(name, model)] = parameter
    return found


def layer_numbers(chunks: Sequence[Any]) -> list[int]:
    """Global numbers, from 0, of this rank's layers in ascending order."""
    return sorted(layer.layer_number - 1 for c in chunks for layer in unwrap(c).decoder.layers)


@torch.no_grad()
def load_hf(
    chunks: Sequence[Any], weights: WeightMap, source: HfCheckpoint, layout: Layout
) -> None:
    """Fill this rank's parameters from a checkpoint folder; each reads only the tensors it holds a part of.

    Raises ConversionError as ``conversion`` does.
    """
    shape = weights.shape
    rows = padded_vocabulary(shape.vocab_size, layout.tp)
    for name, parameter in global_parameters(chunks).items():
        rule = weights.for_megatron(name)
        tensors = [source.load(t.name) for t in rule.hf]
        shard = shard_to_megatron(rule, tensors, shape, layout.tp, layout.tp_rank, rows)
        parameter.copy_(shard)


@torch.no_grad()
def load_stored(chunks: Sequence[Any], source: StoredModel, layout: Layout) -> None:
    """Fill this rank's parameters from a converted checkpoint, cut for whatever layout; each reads only what it holds.

    Without Megatron's loader, which would unpickle a part of a folder that may come from anywhere. Raises
    CheckpointError.
    """
    for name, parameter in global_parameters(chunks).items():
        rule = source.weights.for_megatron(name)
        parameter.copy_(source.load_shard(rule, layout.tp, layout.tp_rank))


@torch.no_grad()
def named_hf_tensors(
    chunks: Sequence[Any], weights: WeightMap, layout: Layout
) -> Iterator[tuple[str, Tensor]]:
    """Full tensors of this pipeline stage, in the order of ``WeightMap.stage_rules``, on its TP0 rank of DP0.

    Every rank that holds a part of that replica (the TP ranks of DP0, and of the expert-parallel ranks beside it) must
    exhaust the iterator, for it takes part in the gathers; only that one rank gets anything. Holds one parameter at a
    time. A yielded tensor may be a view of the live parameter: copy it to keep it.
    """
    yield from _whole(chunks, weights, layout, lambda parameter: parameter.detach())


@torch.no_grad()
def named_hf_gradients(
    chunks: Sequence[Any], weights: WeightMap, layout: Layout
) -> Iterator[tuple[str, Tensor]]:
    """Gather the fp32 gradients of the last backward pass, summed over all replicas, like ``named_hf_tensors``. Every
    rank must exhaust it. Where the optimizer clipped them in place they are the clipped ones."""
    for chunk in chunks:
        for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
            if not group.ddp_config.use_distributed_optimizer:
                continue  # every replica holds the whole sum
            over = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                parts = list(bucket.grad_data.chunk(over.size()))
                dist.all_gather(parts, parts[over.rank()].clone(), group=over)
    yield from _whole(chunks, weights, layout, lambda parameter: parameter.main_grad)


def _whole(
    chunks: Sequence[Any],
    weights: WeightMap,
    layout: Layout,
    value: Callable[[Any], Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Gather ``value`` of each parameter into whole Hugging Face tensors."""
    if layout.expert_dp_rank != 0:
        return
    parameters = global_parameters(chunks)
    rules = weights.stage_rules(layer_numbers(chunks), layout.first_stage, layout.last_stage)
    for rule in rules:
        owner = _owner(rule, weights, layout)
        shards: list[Tensor] = []
        if layout.ep_rank == owner:
            parameter = parameters.get(rule.megatron_name())
            if parameter is None:
                parameter = parameters[rule.megatron_name(transformer_engine=True)]
            shards = _gather(value(parameter), layout)
        if owner != 0 and layout.tp_rank == 0:
            dtype = value(next(iter(parameters.values()))).dtype
            size = shard_size(rule, weights.shape, layout.tp, 0)
            shards = _handed_over(shards, owner, size, dtype, layout)
        if layout.tp_rank == 0 and layout.ep_rank == 0:
            yield from hf_from_shards(rule, shards, weights.shape).items()


def _owner(rule: Rule, weights: WeightMap, layout: Layout) -> int:
    """The expert-parallel rank that holds the parameter: experts are dealt out in runs of equal length."""
    if rule.expert is None:
        return 0
    assert weights.shape.experts is not None
    return rule.expert // (weights.shape.experts.count // layout.ep)


def _gather(shard: Tensor, layout: Layout) -> list[Tensor]:
    """All TP ranks' shards on TP0; nothing elsewhere."""
    if layout.tp == 1:
        return [shard]
    shard = shard.contiguous()
    parts = [torch.empty_like(shard) for _ in range(layout.tp)] if layout.tp_rank == 0 else None
    dist.gather(shard, parts, dst=dist.get_global_rank(layout.tp_group, 0), group=layout.tp_group)
    return parts or []


def _handed_over(
    shards: list[Tensor], owner: int, size: tuple[int, ...], dtype: torch.dtype, layout: Layout
) -> list[Tensor]:
    """An expert's shards from TP0 of its owner on TP0 of expert-parallel rank 0, in whose ``ep_group`` both are."""
    group, device = layout.ep_group, backend.current().device
    if layout.ep_rank == owner:
        for shard in shards:
            dist.send(shard.contiguous(), dist.get_global_rank(group, 0), group=group)
    elif layout.ep_rank == 0:
        shards = [torch.empty(size, dtype=dtype, device=device) for _ in range(layout.tp)]
        for shard in shards:
            dist.recv(shard, dist.get_global_rank(group, owner), group=group)
    return shards


_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+")
_EXPERT = re.compile(r"(?<=local_experts\.)\d+|(?<=experts\.linear_fc[12]\.weight)\d+")


def _global_name(name: str, model: Any) -> str:
    """Renumber layers (0 of a stage that begins at global layer 12 is 12) and experts in a parameter's name."""
    if not name.startswith("decoder.layers."):
        return name
    layers = model.decoder.layers
    local = int(_LAYER.search(name)[0])  # type: ignore[index]
    name = _LAYER.sub(str(layers[local].layer_number - 1), name)
    first = getattr(layers[local].mlp, "local_expert_indices", [0])[0]
    return _EXPERT.sub(lambda found: str(first + int(found[0])), name)
