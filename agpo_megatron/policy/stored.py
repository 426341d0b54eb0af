"""Computes the place of each parameter in a Megatron checkpoint from the tables alone: no Megatron, no files.

``dist_checkpointing`` (format ``torch_dist``) stores global tensors by key, in pieces. Layers are stacked along a
leading axis and experts along a second one (megatron-core 0.19, ``TransformerBlock.sharded_state_dict`` and
``SequentialMLP.sharded_state_dict``); of a parameter's two names the one of the Transformer Engine spec is the key,
except for experts. fc1 of a gated MLP is stored as [gate; up], each cut on its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from agpo_megatron.conversion.cutting import (
    check_layout,
    hf_from_shards,
    padded_vocabulary,
    shard_size,
    shard_to_megatron,
)
from agpo_megatron.conversion.shape import DTYPES, ModelShape
from agpo_megatron.conversion.tables import Cut, Rule
from agpo_megatron.conversion.weight_map import WeightMap

MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")
"""Beginnings of the keys of weights; what a run stores besides (optimizer state, for instance) begins otherwise."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""A part of a tensor: (offset, size)."""


@dataclass(frozen=True)
class ParallelSizes:
    """The layout that a checkpoint is cut for: a rank of it reads whole pieces. Every other layout can load it too."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1

    def stage_of(self, layer: int, layers: int) -> int:
        """Pipeline stage of a layer; with an interleaved schedule the stages take turns."""
        return layer // (layers // (self.pp * self.vpp)) % self.pp


@dataclass(frozen=True)
class Stored:
    """A parameter's place: the part of the global tensor ``key`` of shape ``size`` that begins with ``lead`` indices.

    ``body``: shape of the parameter itself, over all TP ranks. ``object_lead``: sizes of the leading axes.
    """

    key: str
    lead: tuple[int, ...]
    lead_size: tuple[int, ...]
    body: tuple[int, ...]

    @property
    def size(self) -> tuple[int, ...]:
        return self.lead_size + self.body

    def at(self, box: Box) -> Box:
        """A box of the parameter as a box of the stored tensor."""
        offset, size = box
        return self.lead + offset, (1,) * len(self.lead) + size


def stored(rule: Rule, shape: ModelShape, padded_vocab: int) -> Stored:
    """Find the place of the parameter of ``rule``; ``padded_vocab``: rows of embedding and head."""
    name = rule.megatron if rule.expert is not None else rule.megatron_name(transformer_engine=True)
    key = re.sub(r"^decoder\.layers\.\d+\.", "decoder.layers.", name)
    key = re.sub(r"local_experts\.\d+\.", "experts.", key)
    lead: tuple[int, ...] = ()
    lead_size: tuple[int, ...] = ()
    if rule.layer is not None:
        lead, lead_size = (rule.layer,), (shape.layers,)
    if rule.expert is not None and shape.experts is not None:
        lead, lead_size = (*lead, rule.expert), (*lead_size, shape.experts.count)
    return Stored(key, lead, lead_size, shard_size(rule, shape, 1, padded_vocab))


def boxes(rule: Rule, body: Sequence[int], tp: int) -> Iterator[Box]:
    """The pieces that the TP ranks hold of a parameter of shape ``body``, without overlap, covering it."""
    origin, size = (0,) * len(body), tuple(body)
    if rule.cut is Cut.REPLICATED:
        yield origin, size
        return
    axis = 1 if rule.cut is Cut.ROW else 0
    pieces = tp * (2 if rule.cut is Cut.GATED_MLP else 1)
    length = size[axis] // pieces
    piece = (*size[:axis], length, *size[axis + 1 :])
    for i in range(pieces):
        yield (*origin[:axis], i * length, *origin[axis + 1 :]), piece


def pieces_of(
    rule: Rule, tensors: Sequence[Tensor], shape: ModelShape, tp: int, padded_vocab: int
) -> Iterator[tuple[Box, Tensor]]:
    """The boxes of ``boxes`` with their values, from the full Hugging Face tensors; views where possible."""
    body = shard_size(rule, shape, 1, padded_vocab)
    if rule.cut is Cut.GATED_MLP:
        halves = [piece for tensor in tensors for piece in tensor.chunk(tp)]
        yield from zip(boxes(rule, body, tp), halves, strict=True)
        return
    if rule.cut is Cut.VOCABULARY:  # padded piece by piece
        for rank, box in enumerate(boxes(rule, body, tp)):
            yield box, shard_to_megatron(rule, tensors, shape, tp, rank, padded_vocab)
        return
    whole = shard_to_megatron(rule, tensors, shape, 1, 0, padded_vocab)
    for offset, size in boxes(rule, body, tp):
        part = whole
        for axis, (start, length) in enumerate(zip(offset, size, strict=True)):
            part = part.narrow(axis, start, length)
        yield (offset, size), part


def hf_boxes(rule: Rule, shape: ModelShape) -> list[Box]:
    """The boxes of the parameter that its Hugging Face tensors are made of (``hf_of``): without vocabulary padding,
    gate and up apart."""
    if rule.cut is Cut.GATED_MLP:
        size = shape.sizes(rule.hf[0].dims)
        return [((0, 0), size), ((size[0], 0), size)]
    body = shard_size(rule, shape, 1, shape.vocab_size)
    return [((0,) * len(body), body)]


def hf_of(rule: Rule, parts: Sequence[Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """The Hugging Face tensors of ``rule`` from the values of ``hf_boxes``."""
    if rule.cut is Cut.GATED_MLP:
        return {t.name: part for t, part in zip(rule.hf, parts, strict=True)}
    return hf_from_shards(rule, parts, shape)


@dataclass(frozen=True)
class StorePlan:
    """The plan of ``to-megatron``: ``files`` maps each file to the rules of the parameters in it."""

    weights: WeightMap
    sizes: ParallelSizes
    dtype: str
    padded_vocab: int
    files: dict[str, list[Rule]]

    @staticmethod
    def of(weights: WeightMap, sizes: ParallelSizes, dtype: str, max_bytes: int) -> StorePlan:
        """Deal the parameters to files. ``dtype``: a key of ``DTYPES``; ``max_bytes``: limit of a file (a single
        parameter may be larger).

        Each pipeline stage has files of its own. Raises ConversionError when the layout cannot hold the model.
        """
        shape = weights.shape
        check_layout(shape, sizes.tp, sizes.pp, sizes.vpp, sizes.ep)
        plan = StorePlan(
            weights, sizes, dtype, padded_vocabulary(shape.vocab_size, sizes.tp), files={}
        )
        for stage in range(sizes.pp):
            layers = [i for i in range(shape.layers) if sizes.stage_of(i, shape.layers) == stage]
            room, count = 0, 0
            for rule in weights.stage_rules(layers, stage == 0, stage == sizes.pp - 1):
                if not count or plan.nbytes(rule) > room:
                    name, room = f"__{stage}_{count}.distcp", max_bytes
                    plan.files[name] = []
                    count += 1
                plan.files[name].append(rule)
                room -= plan.nbytes(rule)
        return plan

    def stored(self, rule: Rule) -> Stored:
        return stored(rule, self.weights.shape, self.padded_vocab)

    def nbytes(self, rule: Rule) -> int:
        return math.prod(self.stored(rule).body) * DTYPES[self.dtype].itemsize

    @property
    def rules(self) -> Iterator[Rule]:
        return (rule for held in self.files.values() for rule in held)
