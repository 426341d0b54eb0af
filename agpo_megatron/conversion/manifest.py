"""Lists the tensors that each pipeline stage publishes: names, shapes, dtypes, order and buckets.

Derived from the Hugging Face config and the pipeline layout alone, so the controller (which names the tensors to the
rollout servers) and the trainer (which broadcasts them) compute the same lists without talking to each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from agpo_megatron.conversion.errors import ConversionError
from agpo_megatron.conversion.shape import DTYPES, TensorSpec
from agpo_megatron.conversion.weight_map import WeightMap


class Sized(Protocol):
    """Anything with a size in bytes: a tensor, or tensors that stay together."""

    @property
    def nbytes(self) -> int: ...


Item = TypeVar("Item", bound=Sized)


def publish_manifest(
    config: Mapping[str, Any], stage_layers: Sequence[Sequence[int]], dtype: str
) -> list[list[TensorSpec]]:
    """List the tensors of each pipeline stage in the order of ``WeightMap.stage_rules``.

    ``stage_layers``: global layer numbers of each stage (several runs of them with an interleaved schedule), every
    layer exactly once. ``dtype``: a key of ``DTYPES``, the same for all tensors.
    Raises ConversionError for a layout that misses or repeats a layer, or an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ConversionError(f"unknown dtype {dtype!r} (known: {', '.join(DTYPES)})")
    weights = WeightMap(config)
    listed = sorted(layer for layers in stage_layers for layer in layers)
    if listed != list(range(weights.shape.layers)):
        raise ConversionError(
            f"pipeline stages hold layers {[list(x) for x in stage_layers]}, "
            f"which is not each of 0..{weights.shape.layers - 1} once"
        )
    last = len(stage_layers) - 1
    return [
        [
            TensorSpec(tensor.name, weights.shape.sizes(tensor.dims), dtype)
            for rule in weights.stage_rules(layers, first=stage == 0, last=stage == last)
            for tensor in rule.hf
        ]
        for stage, layers in enumerate(stage_layers)
    ]


def buckets(items: Iterable[Item], max_bytes: int) -> list[list[Item]]:
    """Group consecutive items greedily into buckets of at most ``max_bytes``; order is kept.

    An item larger than ``max_bytes`` is a bucket of its own. Raises ConversionError for a size that is not positive.
    """
    if max_bytes < 1:
        raise ConversionError(f"bucket size must be positive, found {max_bytes} bytes")
    result: list[list[Item]] = []
    room = 0
    for item in items:
        if not result or item.nbytes > room:
            result.append([])
            room = max_bytes
        result[-1].append(item)
        room -= item.nbytes
    return result
