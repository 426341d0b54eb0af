"""FP8 weights in 128 x 128 blocks, as SGLang and vLLM load them (DeepSeek-V3's format, arXiv:2412.19437, section 3.3).

A weight W [n, k] becomes Q [n, k] in E4M3 and ``weight_scale_inv`` S [ceil(n/128), ceil(k/128)] fp32, one scale per
block B:

    S_B = max|W_B| / 448,    Q = E4M3(clamp(W / S_B, -448, 448)),    W ~ Q * S_B

Clamped before the cast: what a cast beyond +-448 gives differs between devices. An all-zero block has scale 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from agpo_megatron.conversion.errors import ConversionError
from agpo_megatron.conversion.shape import TensorSpec
from agpo_megatron.conversion.tables import Cut
from agpo_megatron.conversion.weight_map import WeightMap

BLOCK = 128
E4M3_MAX = 448.0
SCALE_SUFFIX = "_scale_inv"


def quantise_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise ``weight`` [n, k] of any float dtype: (Q [n, k] float8_e4m3fn, S [ceil(n/128), ceil(k/128)] fp32).

    Ragged edges make smaller blocks. Works on 128 rows at a time: beside the result it holds little.
    Raises ConversionError for a tensor that is not a matrix, or not finite.
    """
    if weight.dim() != 2:
        raise ConversionError(f"only matrices are quantised in blocks, found {list(weight.shape)}")
    rows, columns = weight.shape
    quantised = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = weight.new_empty(-(-rows // BLOCK), -(-columns // BLOCK), dtype=torch.float32)
    for i, strip in enumerate(weight.split(BLOCK)):
        values = strip.float()
        largest = torch.stack([block.abs().amax() for block in values.split(BLOCK, dim=1)])
        scale = torch.where(largest == 0, 1.0, largest / E4M3_MAX)
        scales[i] = scale
        values = values / scale.repeat_interleave(BLOCK)[:columns]
        quantised[i * BLOCK : i * BLOCK + len(strip)] = values.clamp(-E4M3_MAX, E4M3_MAX).to(
            torch.float8_e4m3fn
        )
    if not bool(scales.isfinite().all()):
        raise ConversionError("the weight holds values that are not finite")
    return quantised, scales


def quantised_names(weights: WeightMap) -> frozenset[str]:
    """Hugging Face names of the tensors that are quantised: the matrices of the linear layers. Embedding, head, norms,
    router and biases keep their precision."""
    linear = (Cut.COLUMN, Cut.ROW, Cut.GROUPED_QKV, Cut.GATED_MLP)
    return frozenset(
        t.name
        for rule in weights.rules()
        if rule.cut in linear
        for t in rule.hf
        if len(t.dims) == 2
    )


def quantised_specs(specs: Iterable[TensorSpec], names: frozenset[str]) -> Iterator[TensorSpec]:
    """Describe what ``quantised_tensors`` yields for tensors of these descriptions."""
    for spec in specs:
        if spec.name not in names:
            yield spec
            continue
        rows, columns = spec.shape
        blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
        yield TensorSpec(spec.name, spec.shape, "float8_e4m3fn")
        yield TensorSpec(spec.name + SCALE_SUFFIX, blocks, "float32")


def quantised_tensors(
    tensors: Iterable[tuple[str, Tensor]], names: frozenset[str]
) -> Iterator[tuple[str, Tensor]]:
    """Replace the tensors of ``names`` in a stream of (name, tensor) by Q and S: for a file, or for publishing live."""
    for name, tensor in tensors:
        if name not in names:
            yield name, tensor
            continue
        try:
            quantised, scales = quantise_blocks(tensor)
        except ConversionError as error:
            raise ConversionError(f"{name}: {error}") from None
        yield name, quantised
        yield name + SCALE_SUFFIX, scales


def quantization_config(weights: WeightMap) -> dict[str, Any]:
    """Build the ``quantization_config`` of config.json, as SGLang, vLLM and transformers read it."""
    kept = [t.name for rule in weights.rules() for t in rule.hf if len(t.dims) == 2]
    names = quantised_names(weights)
    modules = sorted({n.removesuffix(".weight") for n in kept if n not in names} | {"lm_head"})
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": modules,
    }
