"""The tables: every tensor of real transformers models is covered, sizes and settings are read, the rest is refused."""

from __future__ import annotations

import json

import pytest
import torch
from conversion_models import ALL, LLAMA, LLAMA3_SCALING, MISTRAL, MIXTRAL, QWEN2, QWEN3_MOE
from transformers import AutoConfig, AutoModelForCausalLM

from agpo_megatron.conversion.errors import ConversionError
from agpo_megatron.conversion.hf_checkpoint import HfCheckpoint
from agpo_megatron.conversion.shape import ModelShape, with_both_spellings
from agpo_megatron.conversion.tables import architecture_of
from agpo_megatron.conversion.weight_map import WeightMap


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_tables_name_and_shape_exactly_the_tensors_that_transformers_saves(tmp_path, config, tied):
    settings = {k: v for k, v in config.items() if k != "architectures"}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**settings, tie_word_embeddings=tied)
    )
    model.save_pretrained(tmp_path)
    checkpoint = HfCheckpoint(tmp_path)
    weights = checkpoint.weight_map()
    assert weights.shape.tied is tied
    assert weights.hf_shapes() == {name: spec.shape for name, spec in checkpoint.specs.items()}
    # The config as transformers 5 wrote it, and as it reads it back from ours, mean the same model.
    ours = with_both_spellings({**config, "tie_word_embeddings": tied})
    assert ModelShape.from_hf(ours) == weights.shape
    (tmp_path / "config.json").write_text(json.dumps(ours))
    again = AutoConfig.from_pretrained(tmp_path, local_files_only=True).to_dict()
    theirs = model.config.to_dict()
    differ = {k for k in again if again[k] != theirs.get(k)} - {
        "architectures",
        "dtype",
        "_name_or_path",
    }
    assert differ == set()


@pytest.mark.parametrize(
    ("sizes", "parameters"),
    [
        # Llama-3-70B and Qwen2.5-72B as published.
        (
            {
                **LLAMA,
                "hidden_size": 8192,
                "intermediate_size": 28672,
                "num_hidden_layers": 80,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "vocab_size": 128256,
            },
            70_553_706_496,
        ),
        # Qwen3-30B-A3B and Mixtral-8x7B.
        (
            {
                **QWEN3_MOE,
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "moe_intermediate_size": 768,
                "num_experts": 128,
                "num_hidden_layers": 48,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "head_dim": 128,
                "vocab_size": 151936,
            },
            30_532_122_624,
        ),
        (
            {
                **MIXTRAL,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_local_experts": 8,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "vocab_size": 32000,
            },
            46_702_792_704,
        ),
        (
            {
                **QWEN2,
                "hidden_size": 8192,
                "intermediate_size": 29568,
                "num_hidden_layers": 80,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "vocab_size": 152064,
            },
            72_706_203_648,
        ),
    ],
)
def test_parameter_counts_of_published_models(sizes, parameters):
    shapes = WeightMap(sizes).hf_shapes().values()
    assert sum(torch.Size(shape).numel() for shape in shapes) == parameters


def test_megatron_names_in_both_spellings():
    weights = WeightMap(QWEN2)
    norm = weights.for_megatron("decoder.layers.1.input_layernorm.weight")
    assert [t.name for t in norm.hf] == ["model.layers.1.input_layernorm.weight"]
    fused = "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"
    assert weights.for_megatron(fused) == norm
    assert norm.megatron_name(transformer_engine=True) == fused
    assert norm.megatron_name() == "decoder.layers.1.input_layernorm.weight"
    mlp_norm = weights.for_megatron("decoder.layers.0.mlp.linear_fc1.layer_norm_weight")
    assert mlp_norm.megatron == "decoder.layers.0.pre_mlp_layernorm.weight"
    assert mlp_norm.hf[0].name == "model.layers.0.post_attention_layernorm.weight"
    bias = weights.for_megatron("decoder.layers.0.self_attention.linear_qkv.bias")
    assert [t.name for t in bias.hf] == [f"model.layers.0.self_attn.{x}_proj.bias" for x in "qkv"]
    with pytest.raises(ConversionError, match=r"no rule covers .*layers\.2\.input_layernorm"):
        weights.for_megatron("decoder.layers.2.input_layernorm.weight")
    with pytest.raises(
        ConversionError, match=r"LlamaForCausalLM: no rule covers .*linear_qkv\.bias"
    ):
        WeightMap(LLAMA).for_megatron("decoder.layers.0.self_attention.linear_qkv.bias")


def test_tied_head_is_the_embedding_and_is_published_once():
    weights = WeightMap({**LLAMA, "tie_word_embeddings": True})
    head = weights.for_megatron("output_layer.weight")
    assert [t.name for t in head.hf] == ["model.embed_tokens.weight"]
    names = [rule.megatron for rule in weights.rules()]
    assert "output_layer.weight" not in names
    assert len(names) == len(set(names))
    untied = WeightMap(LLAMA)
    assert untied.for_megatron("output_layer.weight").hf[0].name == "lm_head.weight"


def test_shape_reads_sizes_and_both_rope_spellings():
    shape = ModelShape.from_hf({**QWEN2, "rope_theta": 5e5, "rms_norm_eps": 1e-5, "head_dim": 8})
    assert shape == ModelShape(
        hidden=24,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        ffn=40,
        vocab_size=131,
        max_positions=64,
        rms_eps=1e-5,
        rope_theta=5e5,
        rope_scaling=None,
        tied=False,
        qkv_bias=True,
    )
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING}
    new = {**LLAMA, "rope_parameters": {**LLAMA3_SCALING, "rope_theta": 5e5}}
    ancient = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {**LLAMA3_SCALING, "type": "llama3"}}
    ancient["rope_scaling"].pop("rope_type")
    for config in (old, new, ancient, with_both_spellings(new), with_both_spellings(old)):
        shape = ModelShape.from_hf(config)
        assert (shape.rope_theta, shape.rope_scaling) == (5e5, LLAMA3_SCALING)
        assert not shape.qkv_bias
        assert shape.head_dim == 6
    for both in (with_both_spellings(old), with_both_spellings(new)):
        assert both["rope_theta"] == 5e5
        assert both["rope_scaling"] == LLAMA3_SCALING
        assert both["rope_parameters"] == {**LLAMA3_SCALING, "rope_theta": 5e5}
    plain = with_both_spellings({**LLAMA, "rope_theta": 7.0})
    assert plain["rope_parameters"] == {"rope_type": "default", "rope_theta": 7.0}
    assert plain["rope_scaling"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM.*not supported.*LlamaFor"),
        ({"architectures": None, "model_type": "gpt2"}, "gpt2.*not supported"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"vocab_size": None}, "vocab_size must be a positive whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive whole number, found 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "5 does not divide hidden_size 24"),
        ({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}}, "disagree"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "lacks low_freq_factor"),
        ({"rope_scaling": "llama3"}, "rope_scaling must be an object"),
        (
            {
                "rope_scaling": LLAMA3_SCALING,
                "rope_parameters": {**LLAMA3_SCALING, "factor": 2.0},
            },
            "disagree",
        ),
    ],
)
def test_what_the_tables_cannot_carry_is_refused(change, message):
    with pytest.raises(ConversionError, match=message):
        WeightMap({**LLAMA, **change})


def test_what_a_left_out_key_means_is_what_transformers_means():
    """MistralConfig has a window of 4096 unless told otherwise, MixtralConfig another RoPE base."""
    with pytest.raises(ConversionError, match=r"sliding_window = 4096, which is what its absence"):
        WeightMap({k: v for k, v in MISTRAL.items() if k != "sliding_window"})
    for config in ALL.values():
        short = {k: v for k, v in config.items() if k not in ("architectures", "head_dim")}
        theirs = AutoConfig.for_model(**short)
        shape = ModelShape.from_hf(short)
        assert shape.rope_theta == theirs.rope_parameters["rope_theta"]
        assert shape.rms_eps == theirs.rms_norm_eps
        assert shape.kv_heads == theirs.num_key_value_heads
        assert shape.head_dim == (getattr(theirs, "head_dim", None) or 6)
        if shape.experts:
            assert shape.experts.per_token == theirs.num_experts_per_tok
            assert shape.experts.renormalised == getattr(theirs, "norm_topk_prob", True)


def test_both_spellings_of_the_number_of_experts():
    other = {**QWEN3_MOE, "num_local_experts": QWEN3_MOE["num_experts"]}
    del other["num_experts"]
    assert ModelShape.from_hf(other) == ModelShape.from_hf(QWEN3_MOE)
    both = with_both_spellings(other)
    assert both["num_experts"] == both["num_local_experts"] == 4
    with pytest.raises(ConversionError, match=r"num_experts and num_local_experts disagree"):
        WeightMap({**both, "num_experts": 5})
    with pytest.raises(ConversionError, match="num_experts must be a positive whole number"):
        WeightMap({k: v for k, v in other.items() if k != "num_local_experts"})
    with pytest.raises(ConversionError, match="num_experts_per_tok 5 of 4 experts"):
        WeightMap({**other, "num_experts_per_tok": 5})


def test_names_of_experts_in_both_spellings():
    weights = WeightMap(QWEN3_MOE)
    rule = weights.for_megatron("decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight")
    assert weights.for_megatron("decoder.layers.1.mlp.experts.linear_fc1.weight3") == rule
    assert (rule.layer, rule.expert) == (1, 3)
    assert [t.name for t in rule.hf] == [
        f"model.layers.1.mlp.experts.3.{x}_proj.weight" for x in ("gate", "up")
    ]
    router = weights.for_megatron("decoder.layers.0.mlp.router.weight")
    assert (router.hf[0].name, router.expert) == ("model.layers.0.mlp.gate.weight", None)
    with pytest.raises(ConversionError, match="no rule covers"):
        weights.for_megatron("decoder.layers.1.mlp.experts.local_experts.4.linear_fc1.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
    ],
)
def test_what_the_table_of_qwen3_moe_cannot_carry(change, message):
    with pytest.raises(ConversionError, match=message):
        WeightMap({**QWEN3_MOE, **change})


def test_qwen2_sliding_window_is_refused_and_model_type_alone_is_enough():
    with pytest.raises(ConversionError, match="use_sliding_window"):
        WeightMap({**QWEN2, "use_sliding_window": True})
    nameless = {key: value for key, value in QWEN2.items() if key != "architectures"}
    assert architecture_of(nameless).name == "Qwen2ForCausalLM"


def test_check_hf_names_what_does_not_fit():
    weights = WeightMap(LLAMA)
    shapes = weights.hf_shapes()
    weights.check_hf(shapes)
    weights.check_hf({**shapes, "model.layers.0.self_attn.rotary_emb.inv_freq": (3,)})
    with pytest.raises(ConversionError, match=r"lacks model\.norm\.weight"):
        weights.check_hf({k: v for k, v in shapes.items() if k != "model.norm.weight"})
    with pytest.raises(ConversionError, match=r"holds .*q_proj\.bias, which no rule of LlamaFor"):
        weights.check_hf({**shapes, "model.layers.0.self_attn.q_proj.bias": (24,)})
    with pytest.raises(
        ConversionError, match=r"lm_head\.weight has shape \[130, 24\].*\[131, 24\]"
    ):
        weights.check_hf({**shapes, "lm_head.weight": (130, 24)})
