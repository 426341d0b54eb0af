"""Cuts full Hugging Face tensors into the shards of tensor-parallel (TP) ranks, and back. Bit-exact both ways.

Layouts as megatron-core 0.19 ``SelfAttention`` and ``MLP`` read them:
grouped QKV rows are, per KV head g,  [q_{g,1} .. q_{g,n}, k_g, v_g]  (n = heads / kv_heads); with fewer KV heads than
TP ranks the same matrix is simply cut finer and Megatron gathers the activations (attention.py,
``get_query_key_value_tensors``), so one rule serves both. fc1 of a gated MLP is [gate; up] on every rank.
An expert's tensors are cut in the same way, over the ranks that share the expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from agpo_megatron.conversion.errors import ConversionError
from agpo_megatron.conversion.shape import ModelShape
from agpo_megatron.conversion.tables import Cut, Rule

VOCABULARY_MULTIPLE = 64
"""The vocabulary is padded to a multiple of this (and of TP), so that checkpoints of all usual TP sizes agree on it."""


def padded_vocabulary(vocab_size: int, tensor_parallel: int) -> int:
    """Rows of embedding and head over all TP ranks."""
    multiple = math.lcm(VOCABULARY_MULTIPLE, tensor_parallel)
    return -(-vocab_size // multiple) * multiple


def check_layout(shape: ModelShape, tp: int, pp: int = 1, vpp: int = 1, ep: int = 1) -> None:
    """Raise ConversionError with the arithmetic when this layout cannot hold a model of this shape.

    The experts' tensors are cut by ``tp`` as well: Megatron's expert tensor parallelism follows it by default.
    """
    for what, size in (("tensor", tp), ("pipeline", pp), ("virtual pipeline", vpp), ("expert", ep)):
        if size < 1:
            raise ConversionError(f"{what} parallel size must be at least 1, found {size}")
    ffn = ("intermediate_size", shape.ffn)
    if shape.experts:
        ffn = ("the intermediate size of an expert,", shape.experts.ffn)
    for what, size in (("num_attention_heads", shape.heads), ffn):
        if size % tp:
            raise ConversionError(f"tensor_parallel {tp} does not divide {what} {size}")
    if shape.kv_heads % tp and tp % shape.kv_heads:
        raise ConversionError(
            f"tensor_parallel {tp} neither divides nor is a multiple of num_key_value_heads {shape.kv_heads}"
        )
    rows = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    if rows % tp:
        raise ConversionError(f"tensor_parallel {tp} does not divide the {rows} rows of QKV")
    if shape.layers % (pp * vpp):
        raise ConversionError(
            f"pipeline_parallel {pp} x virtual_pipeline {vpp} = {pp * vpp} does not divide "
            f"num_hidden_layers {shape.layers}"
        )
    if ep > 1 and (shape.experts is None or shape.experts.count % ep):
        count = shape.experts.count if shape.experts else 0
        raise ConversionError(f"expert_parallel {ep} does not divide the {count} experts")


def shard_size(rule: Rule, shape: ModelShape, tp: int, padded_vocab: int) -> tuple[int, ...]:
    """Shape of ``rule.megatron`` on each of ``tp`` ranks; see ``shard_to_megatron``."""
    sizes = [shape.sizes(t.dims) for t in rule.hf]
    rows, rest = sum(size[0] for size in sizes), sizes[0][1:]
    match rule.cut:
        case Cut.REPLICATED:
            return sizes[0]
        case Cut.ROW:
            return rows, rest[0] // tp
        case Cut.VOCABULARY:
            return padded_vocab // tp, *rest
        case Cut.COLUMN | Cut.GATED_MLP | Cut.GROUPED_QKV:
            return rows // tp, *rest


def shard_to_megatron(
    rule: Rule,
    hf_tensors: Sequence[Tensor],
    shape: ModelShape,
    tp: int,
    rank: int,
    padded_vocab: int,
) -> Tensor:
    """The parameter ``rule.megatron`` as TP rank ``rank`` of ``tp`` holds it, in the dtype given; may share memory.

    ``hf_tensors``: the full tensors of ``rule.hf``, in that order. ``padded_vocab``: rows of embedding and head over
    all ranks; those beyond the vocabulary are zero, and whoever computes probabilities must leave their logits out.
    Raises ConversionError for wrong shapes and for a ``tp`` that does not divide.
    """
    check_layout(shape, tp)
    if not 0 <= rank < tp:
        raise ConversionError(f"{rule.megatron}: rank {rank} is outside 0..{tp - 1}")
    expected = [shape.sizes(t.dims) for t in rule.hf]
    found = [tuple(t.shape) for t in hf_tensors]
    if found != expected:
        raise ConversionError(
            f"{rule.megatron}: {', '.join(t.name for t in rule.hf)} must have shapes {expected}, found {found}"
        )
    match rule.cut:
        case Cut.REPLICATED:
            return hf_tensors[0]
        case Cut.COLUMN:
            return _piece(hf_tensors[0], 0, tp, rank)
        case Cut.ROW:
            return _piece(hf_tensors[0], 1, tp, rank)
        case Cut.GATED_MLP:
            return torch.cat([_piece(t, 0, tp, rank) for t in hf_tensors])
        case Cut.GROUPED_QKV:
            return _piece(_group_qkv(hf_tensors, shape), 0, tp, rank)
        case Cut.VOCABULARY:
            return _vocabulary_piece(hf_tensors[0], tp, rank, padded_vocab)


def hf_from_shards(rule: Rule, shards: Sequence[Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """The full tensors of ``rule.hf`` by name, in order, from the shards of all TP ranks in rank order.

    Vocabulary padding is dropped. With one shard the results may be views of it.
    Raises ConversionError when the shards are not those of this parameter.
    """
    if not shards:
        raise ConversionError(f"{rule.megatron}: no shards")
    match rule.cut:
        case Cut.REPLICATED:
            full = [shards[0]]
        case Cut.COLUMN:
            full = [_join(shards, 0)]
        case Cut.ROW:
            full = [_join(shards, 1)]
        case Cut.GATED_MLP:
            halves = [shard.chunk(2, 0) for shard in shards]
            full = [_join([half[i] for half in halves], 0) for i in range(2)]
        case Cut.GROUPED_QKV:
            full = _ungroup_qkv(_join(shards, 0), shape, rule)
        case Cut.VOCABULARY:
            full = [_join(shards, 0)[: shape.vocab_size]]
    expected = [shape.sizes(t.dims) for t in rule.hf]
    found = [tuple(t.shape) for t in full]
    if found != expected:
        raise ConversionError(
            f"{rule.megatron}: {len(shards)} shards of shape {[list(s.shape) for s in shards]} give {found}, "
            f"not the {expected} of {', '.join(t.name for t in rule.hf)}"
        )
    return {t.name: tensor for t, tensor in zip(rule.hf, full, strict=True)}


def _piece(tensor: Tensor, dim: int, tp: int, rank: int) -> Tensor:
    size = tensor.shape[dim] // tp
    return tensor.narrow(dim, rank * size, size).contiguous()


def _join(shards: Sequence[Tensor], dim: int) -> Tensor:
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim)


def _vocabulary_piece(tensor: Tensor, tp: int, rank: int, rows: int) -> Tensor:
    """Rows [rank * n, (rank + 1) * n) of the padded tensor, n = rows / tp; only this piece is ever built."""
    vocab = tensor.shape[0]
    if rows < vocab or rows % tp:
        raise ConversionError(
            f"padded vocabulary {rows} must be a multiple of tensor_parallel {tp} and hold {vocab} tokens"
        )
    size = rows // tp
    real = tensor[rank * size : (rank + 1) * size]
    if real.shape[0] == size:
        return real.contiguous()
    return torch.cat([real, real.new_zeros(size - real.shape[0], *tensor.shape[1:])])


def _group_qkv(tensors: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """q [heads*d, ...], k and v [kv_heads*d, ...] -> [kv_heads * (heads/kv_heads + 2) * d, ...]."""
    groups = [t.reshape(shape.kv_heads, -1, *t.shape[1:]) for t in tensors]
    return torch.cat(groups, 1).flatten(0, 1)


def _ungroup_qkv(grouped: Tensor, shape: ModelShape, rule: Rule) -> list[Tensor]:
    d, per_group = shape.head_dim, shape.heads // shape.kv_heads
    rows = shape.kv_heads * (per_group + 2) * d
    if grouped.shape[0] != rows:
        raise ConversionError(
            f"{rule.megatron}: the shards hold {grouped.shape[0]} rows in all, expected {rows}"
        )
    groups = grouped.reshape(shape.kv_heads, (per_group + 2) * d, *grouped.shape[1:])
    parts = torch.split(groups, [per_group * d, d, d], dim=1)
    return [part.flatten(0, 1) for part in parts]
