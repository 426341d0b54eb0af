"""agpo-megatron parity: a layout scaled down, a model like the config's, a verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agpo_megatron import cli
from agpo_megatron.config.schema import PolicyConfig
from agpo_megatron.conversion.weight_map import WeightMap
from agpo_megatron.parity import models
from agpo_megatron.parity.command import scaled_layout, scaled_model


@pytest.mark.parametrize(
    ("asked", "ranks", "expected"),
    [
        ({"tensor_parallel": 8, "pipeline_parallel": 8, "data_parallel": 8}, 8, (2, 2, 1, 2)),
        ({"tensor_parallel": 8, "pipeline_parallel": 4, "context_parallel": 2}, 8, (2, 2, 2, 1)),
        ({"tensor_parallel": 8, "data_parallel": 64}, 8, (4, 1, 1, 2)),
        ({"data_parallel": 3}, 8, (1, 1, 1, 3)),
        ({"tensor_parallel": 2, "pipeline_parallel": 2, "context_parallel": 2}, 4, (1, 2, 2, 1)),
        ({"tensor_parallel": 4}, 1, (1, 1, 1, 1)),
    ],
)
def test_axes_stay_as_long_as_they_can(
    asked: dict[str, int], ranks: int, expected: tuple[int, ...]
) -> None:
    scaled = scaled_layout(PolicyConfig(**asked), ranks, experts=False)
    assert scaled.world_size <= ranks
    assert (
        scaled.tensor_parallel,
        scaled.pipeline_parallel,
        scaled.context_parallel,
        scaled.data_parallel,
    ) == expected


def test_experts_stay_shared_out() -> None:
    asked = PolicyConfig(data_parallel=64, expert_parallel=32, virtual_pipeline=4)
    scaled = scaled_layout(asked, 8, experts=True)
    assert (scaled.expert_parallel, scaled.data_parallel, scaled.virtual_pipeline) == (4, 8, 1)


@pytest.mark.parametrize(
    "config", [models.LLAMA3, models.QWEN2, models.MIXTRAL, models.QWEN3_MOE, None]
)
def test_the_model_keeps_its_features(config: dict[str, Any] | None) -> None:
    policy = PolicyConfig(tensor_parallel=8, pipeline_parallel=2, virtual_pipeline=2)
    shape = WeightMap(scaled_model(config, policy)).shape
    source = WeightMap(config or models.LLAMA).shape
    for feature in ("rope_theta", "rope_scaling", "rms_eps", "tied", "qkv_bias", "qk_norm"):
        assert getattr(shape, feature) == getattr(source, feature)
    assert (shape.experts is None) == (source.experts is None)
    assert shape.heads % 8 == 0 and shape.ffn % 8 == 0 and shape.layers % 4 == 0
    assert shape.kv_heads < shape.heads


def write_config(tmp_path: Path, policy: str) -> str:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(models.LLAMA3))
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{path: {model}}}\ndata: {{path: x.jsonl}}\npolicy: {policy}\n")
    return str(path)


def test_a_verdict_for_each_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, "{context_parallel: 4, data_parallel: 16}")
    loss = ["--set", "algorithm.preset=gspo", "--set", "algorithm.loss.clip={kind: exp, tau: 2}"]
    assert cli.main(["parity", config, "--ranks", "2", *loss]) == 0
    out = capsys.readouterr().out
    assert "loss     gspo, seq_mean_token_mean, adaptive exp" in out
    assert "CP4 DP16 scaled to CP2 = 2 ranks" in out
    assert out.count("gradient model.layers.3.mlp.up_proj.weight") >= 4, "three cuts, and bf16"
    assert "FAIL" not in out
    assert out.splitlines()[-1] == "pass"
