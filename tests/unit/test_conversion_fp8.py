"""FP8 blocks: against an independent quantiser and dequantiser, and the export as a user gets it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conversion_models import LLAMA, QWEN3_MOE, random_weights
from converter import convert
from hypothesis import given, settings
from hypothesis import strategies as st

from agpo_megatron.conversion.errors import ConversionError
from agpo_megatron.conversion.fp8 import (
    quantise_blocks,
    quantised_names,
    quantised_tensors,
)
from agpo_megatron.conversion.hf_checkpoint import HfCheckpoint
from agpo_megatron.conversion.hf_writer import write_hf_checkpoint
from agpo_megatron.conversion.weight_map import WeightMap


def e4m3_values() -> torch.Tensor:
    """Every finite value of E4M3 (OCP FP8: 4 exponent bits, bias 7, 3 mantissa bits; all ones is NaN)."""
    found = []
    for exponent in range(16):
        for mantissa in range(8):
            if (exponent, mantissa) != (15, 7):
                scale = 2.0 ** (exponent - 7) if exponent else 2.0**-6
                found.append(scale * ((1 if exponent else 0) + mantissa / 8))
    positive = torch.tensor(sorted(found), dtype=torch.float64)
    return torch.cat([-positive.flip(0), positive[1:]])


def dequantise_blocks(quantised: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """W ~ Q * S_B in fp32."""
    rows, columns = quantised.shape
    full = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return quantised.float() * full


def worst_excess(weight, quantised, scales):
    """Each value must be a representable one next to w/s; > 0 is further than the nearest."""
    table = e4m3_values()
    worst = 0.0
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            rows, columns = slice(i * 128, i * 128 + 128), slice(j * 128, j * 128 + 128)
            block = weight[rows, columns].double() / scales[i, j].double()
            taken = quantised[rows, columns].double()
            nearest = (table - block.reshape(-1, 1)).abs().amin(1)
            excess = (taken.reshape(-1) - block.reshape(-1)).abs() - nearest
            worst = max(worst, float((excess / block.abs().amax().clamp_min(1e-30)).max()))
    return worst


@pytest.mark.parametrize("shape", [(128, 128), (131, 300), (1, 257), (40, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_value_is_the_nearest_representable_one(shape, dtype):
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.05).to(dtype)
    quantised, scales = quantise_blocks(weight)
    assert (quantised.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert quantised.shape == weight.shape
    assert scales.shape == (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = weight[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128].float()
            assert scales[i, j].item() == pytest.approx(block.abs().max().item() / 448, rel=1e-6)
    # w / s is rounded to fp32 before it is rounded to E4M3: a tie may fall the other way.
    assert worst_excess(weight, quantised, scales) < 1e-6
    error = (dequantise_blocks(quantised, scales) - weight.float()).norm() / weight.float().norm()
    assert 0.01 < error < 0.03


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.floats(-30, 30), st.integers(0, 2**20))
def test_quantising_what_was_dequantised_changes_nothing(rows, columns, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 2.0**exponent
    quantised, scales = quantise_blocks(weight)
    again, same = quantise_blocks(dequantise_blocks(quantised, scales))
    assert torch.equal(again.view(torch.uint8), quantised.view(torch.uint8))
    assert torch.allclose(same, scales, rtol=1e-6)
    assert quantised.float().abs().max() == 448


def test_zeros_outliers_and_what_is_refused():
    weight = torch.zeros(200, 200)
    weight[199, 199] = 1e30
    quantised, scales = quantise_blocks(weight)
    assert scales[0, 0] == 1
    assert torch.equal(quantised[:128].float(), torch.zeros(128, 200))
    assert quantised[199, 199].float() == 448
    assert dequantise_blocks(quantised, scales)[199, 199].item() == pytest.approx(1e30, rel=1e-6)
    for bad in (float("inf"), float("nan")):
        weight[0, 0] = bad
        with pytest.raises(ConversionError, match="not finite"):
            quantise_blocks(weight)
    with pytest.raises(ConversionError, match="only matrices"):
        quantise_blocks(torch.ones(3))


@pytest.mark.parametrize("config", [LLAMA, QWEN3_MOE], ids=["llama", "qwen3_moe"])
def test_export(tmp_path, config):
    config = {**config, "hidden_size": 160, "intermediate_size": 136, "tie_word_embeddings": True}
    tensors = random_weights(config, torch.bfloat16)
    write_hf_checkpoint(tmp_path / "hf", config, tensors.items())
    assert convert("to-megatron", tmp_path / "hf", tmp_path / "m", "--tp", 2) == 0
    command = ("to-hf", tmp_path / "m", tmp_path / "fp8", "--dtype", "fp8-block")
    assert convert(*command, "--max-shard-size", "200KB") == 0
    found = HfCheckpoint(tmp_path / "fp8")
    quantised = {n for n in found.specs if found.specs[n].dtype == "float8_e4m3fn"}
    assert quantised == quantised_names(WeightMap(config))
    assert all(("_proj" in n) for n in quantised)
    assert set(found.specs) == set(tensors) | {f"{n}_scale_inv" for n in quantised}
    for name, tensor in tensors.items():
        held = found.load(name)
        if name not in quantised:
            assert torch.equal(held, tensor), name
            continue
        values = dequantise_blocks(held, found.load(f"{name}_scale_inv"))
        assert (values - tensor.float()).abs().max() <= tensor.float().abs().max() * 2.0**-4, name
    settings = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "fp8"
    assert settings["weight_block_size"] == [128, 128]
    kept = set(settings["modules_to_not_convert"])
    assert {"lm_head", "model.embed_tokens"} <= kept
    assert not kept & {n.removesuffix(".weight") for n in quantised}
    if config["model_type"] == "qwen3_moe":
        assert "model.layers.1.mlp.gate" in kept
    assert convert("verify", tmp_path / "fp8", tmp_path / "fp8") == 0


def test_the_stream_for_publishing_names_a_tensor_that_cannot_be_quantised():
    weights = WeightMap(LLAMA)
    tensors = random_weights(LLAMA)
    names = quantised_names(weights)
    streamed = dict(quantised_tensors(tensors.items(), names))
    assert len(streamed) == len(tensors) + len(names)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    with pytest.raises(ConversionError, match=r"layers\.1\.mlp\.up_proj\.weight: .* not finite"):
        dict(quantised_tensors(tensors.items(), names))
