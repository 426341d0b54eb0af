"""Cutting: values against an independent construction, and there-and-back bit-exact for every TP size."""

from __future__ import annotations

import pytest
import torch
from conversion_models import ALL, LLAMA, QWEN2, QWEN3_MOE, random_weights

from agpo_megatron.conversion.cutting import (
    check_layout,
    hf_from_shards,
    shard_size,
    shard_to_megatron,
)
from agpo_megatron.conversion.errors import ConversionError
from agpo_megatron.conversion.weight_map import WeightMap


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_there_and_back_is_bit_exact(config, tied, tp, dtype):
    config = {**config, "tie_word_embeddings": tied}
    weights = WeightMap(config)
    source = random_weights(config, dtype)
    back = {}
    for rule in weights.rules():
        full = [source[t.name] for t in rule.hf]
        shards = [shard_to_megatron(rule, full, weights.shape, tp, rank, 132) for rank in range(tp)]
        assert {shard.dtype for shard in shards} == {dtype}
        assert all(shard.is_contiguous() for shard in shards)
        back.update(hf_from_shards(rule, shards, weights.shape))
    assert list(back) == list(source)
    for name, tensor in source.items():
        assert torch.equal(back[name], tensor), name


def test_grouped_qkv_order_is_megatrons():
    """4 query heads, 2 KV heads, head_dim 6: rows q0 q1 k0 v0 q2 q3 k1 v1; TP 4 cuts the same matrix finer."""
    weights = WeightMap(QWEN2)
    source = random_weights(QWEN2)
    for kind in ("weight", "bias"):
        rule = weights.for_megatron(f"decoder.layers.0.self_attention.linear_qkv.{kind}")
        full = [source[t.name] for t in rule.hf]
        q, k, v = (list(t.split(6)) for t in full)
        expected = torch.cat([q[0], q[1], k[0], v[0], q[2], q[3], k[1], v[1]])
        for tp in (1, 2, 4):
            shards = [shard_to_megatron(rule, full, weights.shape, tp, r, 132) for r in range(tp)]
            assert torch.equal(torch.cat(shards), expected)
            assert {len(shard) for shard in shards} == {len(expected) // tp}


def test_gated_mlp_row_vocabulary_and_replicated_pieces():
    weights, source = WeightMap(LLAMA), random_weights(LLAMA)

    def piece(name, rank, tp=2, padded=132):
        rule = weights.for_megatron(name)
        full = [source[t.name] for t in rule.hf]
        return shard_to_megatron(rule, full, weights.shape, tp, rank, padded)

    gate, up = (source[f"model.layers.1.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    fc1 = piece("decoder.layers.1.mlp.linear_fc1.weight", 1)
    assert torch.equal(fc1, torch.cat([gate[20:], up[20:]]))
    down = source["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(piece("decoder.layers.1.mlp.linear_fc2.weight", 1), down[:, 20:])
    proj = source["model.layers.0.self_attn.o_proj.weight"]
    assert torch.equal(piece("decoder.layers.0.self_attention.linear_proj.weight", 0), proj[:, :12])
    norm = source["model.norm.weight"]
    assert torch.equal(piece("decoder.final_layernorm.weight", 1), norm)
    head = source["lm_head.weight"]
    last = piece("output_layer.weight", 1)
    assert torch.equal(last, torch.cat([head[66:], torch.zeros(1, 24)]))
    # A caller's own padding: 4 ranks of 64 rows, 131 real ones; the last rank holds padding only.
    assert torch.equal(piece("output_layer.weight", 3, tp=4, padded=256), torch.zeros(64, 24))
    third = piece("output_layer.weight", 2, tp=4, padded=256)
    assert torch.equal(third, torch.cat([head[128:], torch.zeros(61, 24)]))


@pytest.mark.parametrize(
    ("change", "tp", "message"),
    [
        ({}, 3, "tensor_parallel 3 does not divide num_attention_heads 4"),
        ({"intermediate_size": 42}, 4, "tensor_parallel 4 does not divide intermediate_size 42"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 3},
            2,
            "2 neither divides nor is a multiple of num_key_value_heads 3",
        ),
        ({}, 0, "must be at least 1"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused_with_the_arithmetic(change, tp, message):
    with pytest.raises(ConversionError, match=message):
        check_layout(WeightMap({**LLAMA, **change}).shape, tp)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"pp": 2, "vpp": 2}, "2 x virtual_pipeline 2 = 4 does not divide num_hidden_layers 2"),
        ({"ep": 3}, "expert_parallel 3 does not divide the 4 experts"),
        ({"tp": 4, "ep": 0}, "expert parallel size must be at least 1"),
    ],
)
def test_layouts_of_stages_and_experts(sizes, message):
    shape = WeightMap(QWEN3_MOE).shape
    check_layout(shape, tp=4, pp=2, vpp=1, ep=4)
    with pytest.raises(ConversionError, match=message):
        check_layout(shape, **{"tp": 1, **sizes})
    with pytest.raises(ConversionError, match="expert_parallel 2 does not divide the 0 experts"):
        check_layout(WeightMap(LLAMA).shape, tp=1, ep=2)


def test_the_size_of_a_shard_is_known_without_it():
    for config in ALL.values():
        weights, source = WeightMap(config), random_weights(config)
        for rule in weights.rules():
            full = [source[t.name] for t in rule.hf]
            for tp in (1, 2, 4):
                shard = shard_to_megatron(rule, full, weights.shape, tp, tp - 1, 192)
                assert tuple(shard.shape) == shard_size(rule, weights.shape, tp, 192)


def test_wrong_shapes_are_refused_by_name():
    weights, source = WeightMap(LLAMA), random_weights(LLAMA)
    rule = weights.for_megatron("decoder.layers.0.mlp.linear_fc1.weight")
    full = [source[t.name] for t in rule.hf]
    with pytest.raises(ConversionError, match=r"linear_fc1\.weight: .*gate_proj.*must have shapes"):
        shard_to_megatron(rule, [full[0], full[1][:-1]], weights.shape, 2, 0, 132)
    with pytest.raises(ConversionError, match="rank 2 is outside"):
        shard_to_megatron(rule, full, weights.shape, 2, 2, 132)
    shards = [shard_to_megatron(rule, full, weights.shape, 2, r, 132) for r in range(2)]
    with pytest.raises(ConversionError, match=r"linear_fc1\.weight: 1 shards"):
        hf_from_shards(rule, shards[:1], weights.shape)
    qkv = weights.for_megatron("decoder.layers.0.self_attention.linear_qkv.weight")
    with pytest.raises(ConversionError, match="hold 10 rows in all, expected 48"):
        hf_from_shards(qkv, [torch.zeros(10, 24)], weights.shape)
    with pytest.raises(ConversionError, match="no shards"):
        hf_from_shards(qkv, [], weights.shape)
    head = weights.for_megatron("output_layer.weight")
    with pytest.raises(ConversionError, match="padded vocabulary 130"):
        shard_to_megatron(head, [source["lm_head.weight"]], weights.shape, 2, 0, 130)
