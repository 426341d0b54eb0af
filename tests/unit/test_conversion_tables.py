"""The tables: every tensor of real transformers models is covered, sizes and settings are read, the rest is refused."""

from __future__ import annotations

import pytest
import torch
from conversion_models import LLAMA, LLAMA3_SCALING, QWEN2
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from agpo_megatron.conversion.errors import ConversionError
from agpo_megatron.conversion.shape import ModelShape, with_both_spellings
from agpo_megatron.conversion.tables import architecture_of
from agpo_megatron.conversion.weight_map import WeightMap


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("config", "config_class", "model_class"),
    [(LLAMA, LlamaConfig, LlamaForCausalLM), (QWEN2, Qwen2Config, Qwen2ForCausalLM)],
)
def test_tables_name_and_shape_exactly_the_tensors_of_transformers(
    config, config_class, model_class, tied
):
    config = {**config, "tie_word_embeddings": tied}
    with torch.device("meta"):
        model = model_class(
            config_class(**{k: v for k, v in config.items() if k != "architectures"})
        )
    state = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if tied:
        state.pop("lm_head.weight")
    assert WeightMap(config).hf_shapes() == state


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
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM.*not supported.*LlamaFor"),
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
