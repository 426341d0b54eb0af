"""Model FLOPs against models counted tensor by tensor, and by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import write_model
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from agpo_megatron.conversion.hf_checkpoint import read_config
from agpo_megatron.conversion.shape import ModelShape
from agpo_megatron.observe.flops import active_parameters, training_flops, utilisation
from agpo_megatron.parity.models import MIXTRAL


def test_active_parameters_of_a_dense_model(tmp_path: Path) -> None:
    write_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    matrices = sum(p.numel() for n, p in model.model.layers.named_parameters() if p.dim() == 2)
    assert active_parameters(ModelShape.from_hf(read_config(tmp_path))) == matrices


def test_of_experts_the_chosen_ones_count() -> None:
    shape = ModelShape.from_hf(MIXTRAL)
    model = MixtralForCausalLM(
        MixtralConfig(**{k: v for k, v in MIXTRAL.items() if k != "architectures"})
    )
    assert shape.experts is not None
    total = 0
    for name, parameter in model.model.layers.named_parameters():
        if parameter.dim() >= 2:
            chosen = shape.experts.per_token / shape.experts.count if "experts" in name else 1
            total += int(parameter.numel() * chosen)
    assert shape.experts.per_token < shape.experts.count
    assert active_parameters(shape) == total


def test_flops_of_a_step_by_hand(tmp_path: Path) -> None:
    write_model(tmp_path, layers=2)  # hidden 64, ffn 128, 4 heads of 16, 2 KV heads, vocabulary 18
    shape = ModelShape.from_hf(read_config(tmp_path))
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128
    by_hand = 6 * (10 + 20) * 2 * layer + 12 * 2 * 4 * 16 * (10 * 10 + 20 * 20) + 6 * 7 * 18 * 64
    assert training_flops(shape, [10, 20], 7) == by_hand
    assert utilisation(by_hand, 2.0, 1e-6, 4) == pytest.approx(by_hand / 8e6)
