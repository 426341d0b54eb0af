"""The publish manifest: what each stage sends, in which order, in which buckets."""

from __future__ import annotations

import pytest
from conversion_models import LLAMA, QWEN2

from agpo_megatron.conversion.errors import ConversionError
from agpo_megatron.conversion.manifest import buckets, publish_manifest
from agpo_megatron.conversion.shape import TensorSpec
from agpo_megatron.conversion.weight_map import WeightMap

LAYER = [
    "input_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
]


def test_stages_get_their_tensors_in_order():
    first, last = publish_manifest(LLAMA, [[0], [1]], "bfloat16")
    assert [s.name for s in first] == [
        "model.embed_tokens.weight",
        *(f"model.layers.0.{name}" for name in LAYER),
    ]
    assert [s.name for s in last] == [
        *(f"model.layers.1.{name}" for name in LAYER),
        "model.norm.weight",
        "lm_head.weight",
    ]
    assert first[2] == TensorSpec("model.layers.0.self_attn.q_proj.weight", (24, 24), "bfloat16")
    assert first[3].shape == (12, 24)
    assert first[3].nbytes == 12 * 24 * 2


def test_tied_models_publish_the_embedding_from_the_first_stage_only():
    config = {**LLAMA, "tie_word_embeddings": True}
    first, last = publish_manifest(config, [range(1), range(1, 2)], "float32")
    assert first[0].name == "model.embed_tokens.weight"
    assert last[-1].name == "model.norm.weight"


def test_any_pipeline_layout_publishes_every_tensor_once():
    config = {**QWEN2, "num_hidden_layers": 4}
    everything = WeightMap(config).hf_shapes()
    for stages in ([range(4)], [range(2), range(2, 4)], [[0, 2], [1, 3]], [[0], [1], [2], [3]]):
        listed = [spec for stage in publish_manifest(config, stages, "float32") for spec in stage]
        assert {s.name: s.shape for s in listed} == everything
        assert len(listed) == len(everything)
    interleaved = publish_manifest(config, [[0, 2], [1, 3]], "float32")
    assert interleaved[1][0].name == "model.layers.1.input_layernorm.weight"
    assert interleaved[0][-1].name == "model.layers.2.mlp.down_proj.weight"


@pytest.mark.parametrize("stages", [[[0]], [[0], [0, 1]], [[0, 1, 2]], []])
def test_layouts_that_miss_or_repeat_a_layer_are_refused(stages):
    with pytest.raises(ConversionError, match="not each of 0..1 once"):
        publish_manifest(LLAMA, stages, "float32")


def test_unknown_dtype_and_bucket_size_are_refused():
    with pytest.raises(ConversionError, match="unknown dtype 'fp32'"):
        publish_manifest(LLAMA, [[0, 1]], "fp32")
    with pytest.raises(ConversionError, match="bucket size must be positive"):
        buckets([], 0)


def test_buckets_are_consecutive_full_and_bounded():
    specs = [TensorSpec(str(i), (n,), "float32") for i, n in enumerate([3, 2, 5, 9, 1, 1])]
    grouped = [[int(spec.name) for spec in bucket] for bucket in buckets(specs, 20)]
    assert grouped == [[0, 1], [2], [3], [4, 5]]  # 12+8 fills 20 exactly; 36 bytes alone
    assert buckets(iter(specs), 20) == buckets(specs, 20)
    assert buckets([], 20) == []
    assert len(buckets(specs, 10**6)) == 1
