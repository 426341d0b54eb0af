"""GGUF import against files written by the gguf package from known tensors."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from conversion_models import LLAMA, QWEN2, random_weights
from transformers import AutoTokenizer

from agpo_megatron.conversion.errors import ConversionError
from agpo_megatron.conversion.gguf_import import convert_gguf
from agpo_megatron.conversion.hf_checkpoint import HfCheckpoint

gguf = pytest.importorskip("gguf")

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
CONFIG = {**LLAMA, "hidden_size": 64, "intermediate_size": 96}


def llama_cpp_order(weight, heads):
    """As llama.cpp's converter writes it: row 2i+s of a head is row s*d/2+i of Hugging Face."""
    out = torch.empty_like(weight)
    d = weight.shape[0] // heads
    for head in range(heads):
        for i in range(d // 2):
            for s in range(2):
                out[head * d + 2 * i + s] = weight[head * d + s * (d // 2) + i]
    return out


def write_gguf(path, weights, arch="llama", quantise=(), extra=(), tokenizer=True, settings=()):
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(5e5)
    writer.add_layer_norm_rms_eps(1e-5)
    for add, value in settings:
        getattr(writer, add)(value)
    if tokenizer:
        letters = ["<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz", "ab", "\u0120"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(letters + [f"<{i}>" for i in range(131 - len(letters))])
        writer.add_token_types([3] + [1] * 130)
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(0)
        writer.add_pad_token_id(0)
    for name, tensor in weights.items():
        stem, kind = name.rsplit(".", 1)
        if stem in TOP:
            target = TOP[stem]
        else:
            layer, part = stem.removeprefix("model.layers.").split(".", 1)
            target = f"blk.{layer}.{LAYER[part]}"
            if arch == "llama" and part == "self_attn.q_proj":
                tensor = llama_cpp_order(tensor, 4)
            if arch == "llama" and part == "self_attn.k_proj":
                tensor = llama_cpp_order(tensor, 2)
        array = tensor.numpy()
        if target.split(".")[-1] in quantise:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{target}.{kind}", gguf.quantize(array, q8), raw_dtype=q8)
        else:
            writer.add_tensor(f"{target}.{kind}", array)
    for name, array in extra:
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def weights():
    return random_weights(CONFIG)


@pytest.mark.parametrize("tied", [False, True])
def test_tensors_and_config_come_out_as_they_went_in(tmp_path, weights, tied):
    if tied:
        weights.pop("lm_head.weight")
    write_gguf(tmp_path / "m.gguf", weights)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    checkpoint = HfCheckpoint(tmp_path / "out")
    shape = checkpoint.weight_map().shape
    assert (shape.tied, shape.vocab_size, shape.kv_heads, shape.head_dim) == (tied, 131, 2, 16)
    assert (shape.rope_theta, shape.rms_eps, shape.rope_scaling) == (5e5, 1e-5, None)
    assert set(checkpoint.specs) == set(weights)
    for name, tensor in weights.items():
        assert torch.equal(checkpoint.load(name), tensor.to(torch.bfloat16)), name
    config = checkpoint.config
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"] == 5e5
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    assert tokenizer.convert_ids_to_tokens(tokenizer("cab").input_ids) == ["c", "ab"]
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_quantised_tensors_are_dequantised(tmp_path, weights):
    write_gguf(tmp_path / "m.gguf", weights, quantise=("attn_q", "ffn_down", "token_embd"))
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    checkpoint = HfCheckpoint(tmp_path / "out")
    for name, tensor in weights.items():
        # Q8_0: blocks of 32 of a row share a scale of max/127; then bf16 keeps 8 bits.
        error = (checkpoint.load(name).float() - tensor).abs().max()
        assert error <= tensor.abs().max() * (0.5 / 127 + 2**-8), name


def test_other_families_of_the_tables_come_out_as_they_went_in(tmp_path):
    weights = random_weights({**CONFIG, **{k: QWEN2[k] for k in ("architectures", "model_type")}})
    write_gguf(tmp_path / "m.gguf", weights, arch="qwen2")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    checkpoint = HfCheckpoint(tmp_path / "out")
    assert checkpoint.weight_map().shape.qkv_bias
    assert set(checkpoint.specs) == set(weights)
    for name, tensor in weights.items():
        assert torch.equal(checkpoint.load(name), tensor.to(torch.bfloat16)), name


def test_llama3_rope_scaling_is_recovered_from_the_stored_divisors(tmp_path, weights):
    def divisors(factor):
        wavelengths = [2 * math.pi * 5e5 ** (i / 8) for i in range(8)]
        smooth = [min(max((8192 / w - 1) / 3, 0.0), 1.0) for w in wavelengths]
        return np.array([1 / ((1 - s) / factor + s) for s in smooth], dtype=np.float32)

    write_gguf(tmp_path / "m.gguf", weights, extra=[("rope_freqs.weight", divisors(32.0))])
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert HfCheckpoint(tmp_path / "out").weight_map().shape.rope_scaling == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    odd = divisors(32.0)
    odd[4] *= 1.01
    write_gguf(tmp_path / "odd.gguf", weights, extra=[("rope_freqs.weight", odd)])
    with pytest.raises(ConversionError, match="not a known Llama-3 rope scaling"):
        convert_gguf(tmp_path / "odd.gguf", tmp_path / "odd")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "plamo"}, "plamo is not supported"),
        ({"arch": "gpt2"}, "'GPT2LMHeadModel' of config.json is not supported"),
        ({"settings": [("add_rope_dimension_count", 8)]}, r"q_proj.weight has shape \[64, 64\]"),
        ({"tokenizer": False}, "holds no tokenizer"),
        (
            {"settings": [("add_rope_scaling_type", gguf.RopeScalingType.YARN)]},
            "rope scaling 'yarn' is not supported",
        ),
        (
            {"extra": [("blk.0.attn_q.bias", np.zeros(64, np.float32))]},
            "1 of its tensors have no place in LlamaForCausalLM",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused(tmp_path, weights, options, message):
    write_gguf(tmp_path / "m.gguf", weights, **options)
    with pytest.raises(ConversionError, match=message):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_tensors_and_damaged_files_are_refused(tmp_path, weights):
    write_gguf(tmp_path / "m.gguf", weights)
    whole = (tmp_path / "m.gguf").read_bytes()
    for name, content in (("cut", whole[:-100]), ("head", whole[:200]), ("text", b"hello" * 99)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConversionError, match=f"{name} is truncated or not a GGUF file"):
            convert_gguf(tmp_path / name, tmp_path / "out")
    with pytest.raises(ConversionError, match="does not exist"):
        convert_gguf(tmp_path / "gone", tmp_path / "out")
    weights.pop("model.layers.1.self_attn.k_proj.weight")
    write_gguf(tmp_path / "less.gguf", weights)
    with pytest.raises(ConversionError, match=r"lacks model\.layers\.1\.self_attn\.k_proj\.weight"):
        convert_gguf(tmp_path / "less.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
