"""llama.cpp (GGUF) files of the Llama family -> a Hugging Face checkpoint in bf16 that transformers and SGLang load.

llama.cpp stores q and k with the rows of each head reordered for its interleaved RoPE (``LlamaModel.permute`` of its
convert_hf_to_gguf.py); this undoes it. Quantised tensors are dequantised one at a time.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agpo_megatron.conversion.building import Pace, refuse_existing
from agpo_megatron.conversion.errors import ConversionError
from agpo_megatron.conversion.hf_writer import HfTarget, TensorGroup, write_hf_groups
from agpo_megatron.conversion.shape import TensorSpec
from agpo_megatron.conversion.weight_map import WeightMap

log = logging.getLogger(__name__)

_GLOBAL_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER_NAMES = {
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
_ROPE_FACTORS = "rope_freqs.weight"  # not a weight: what llama.cpp divides the RoPE frequencies by


def convert_gguf(
    gguf_file: str | os.PathLike[str], out_dir: str | os.PathLike[str], pace: Pace | None = None
) -> None:
    """Write ``out_dir``: bf16 safetensors, config, generation config, and the tokenizer if the file holds one.

    Needs the ``gguf`` package; the tokenizer also needs ``transformers``.
    Raises ConversionError for a damaged file, another model family, or a tensor that no rule covers.
    """
    path = Path(gguf_file)
    metadata, tensors = _read(path)
    config = _config(metadata, tensors)
    weights = WeightMap(config)
    source_names = {name: _gguf_name(name) for name in weights.hf_shapes()}
    unmapped = sorted(set(tensors) - set(source_names.values()) - {_ROPE_FACTORS})
    missing = sorted(set(source_names.values()) - set(tensors))
    if unmapped or missing:
        raise ConversionError(
            f"{path}: tensors {unmapped[:3]} have no rule and {missing[:3]} are missing"
        )

    def load(spec: TensorSpec) -> dict[str, list[Tensor]]:
        tensor = _dequantised(path, tensors[source_names[spec.name]])
        if tuple(tensor.shape) != spec.shape:
            raise ConversionError(
                f"{path}: {spec.name} has shape {list(tensor.shape)}, not {spec.shape}"
            )
        if spec.name.endswith("self_attn.q_proj.weight"):
            tensor = _undo_rope_order(tensor, weights.shape.heads)
        elif spec.name.endswith("self_attn.k_proj.weight"):
            tensor = _undo_rope_order(tensor, weights.shape.kv_heads)
        return {spec.name: [tensor.to(torch.bfloat16)]}

    specs = [TensorSpec(n, shape, "bfloat16") for n, shape in weights.hf_shapes().items()]
    groups = [TensorGroup((spec,), partial(load, spec)) for spec in specs]
    stat = path.stat()
    identity = {"gguf": str(path.absolute()), "size": stat.st_size, "changed": stat.st_mtime_ns}
    refuse_existing(Path(out_dir))
    with tempfile.TemporaryDirectory(prefix="gguf-tokenizer-") as side:
        _write_tokenizer(path, metadata, Path(side))
        write_hf_groups(
            HfTarget(Path(out_dir), config, Path(side)), groups, identity, pace or Pace()
        )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metadata values, tensors by name) of a GGUF file; tensor data stays on disk."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ConversionError(
            "reading GGUF files needs the gguf package: pip install gguf"
        ) from error
    if not path.is_file():
        raise ConversionError(f"GGUF file {path} does not exist")
    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # the reader raises whatever numpy met in a damaged file
        raise ConversionError(f"{path} is truncated or not a GGUF file ({error})") from error
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _gguf_name(hf_name: str) -> str:
    stem, kind = hf_name.rsplit(".", 1)
    if stem in _GLOBAL_NAMES:
        return f"{_GLOBAL_NAMES[stem]}.{kind}"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{_LAYER_NAMES[part]}.{kind}"


def _dequantised(path: Path, tensor: Any) -> Tensor:
    from gguf import dequantize

    try:
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    except (NotImplementedError, ValueError) as error:
        raise ConversionError(f"{path}: cannot dequantise {tensor.name} ({error})") from error


def _undo_rope_order(weight: Tensor, heads: int) -> Tensor:
    """[heads * d, hidden]: rows (pair, half) of each head, as llama.cpp interleaves them, back to (half, pair)."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    family = metadata.get("general.architecture")
    if family != "llama":
        raise ConversionError(f"GGUF architecture {family!r} is not supported (supported: llama)")
    if metadata.get("llama.expert_count"):
        raise ConversionError("GGUF mixture-of-experts files are not supported")
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ConversionError(f"GGUF rope scaling {scaling!r} is not supported")
    try:
        heads = metadata["llama.attention.head_count"]
        hidden = metadata["llama.embedding_length"]
        head_dim = metadata.get("llama.attention.key_length", hidden // heads)
        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": metadata["llama.feed_forward_length"],
            "num_hidden_layers": metadata["llama.block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
            "head_dim": head_dim,
            # GGUF lists dimensions fastest first: [hidden, vocab].
            "vocab_size": int(tensors["token_embd.weight"].shape[1]),
            "max_position_embeddings": metadata["llama.context_length"],
            # Stored as fp32; %g gives back the 1e-05 it was written from.
            "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:g}"),
            "rope_theta": float(metadata.get("llama.rope.freq_base", 10000.0)),
            "tie_word_embeddings": "output.weight" not in tensors,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            **_special_tokens(metadata),
        }
    except KeyError as error:
        raise ConversionError(f"the GGUF file lacks {error}") from error
    rotated = metadata.get("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ConversionError(
            f"the GGUF file rotates {rotated} of {head_dim} dimensions: not supported"
        )
    if _ROPE_FACTORS in tensors:
        stored = torch.from_numpy(tensors[_ROPE_FACTORS].data.copy()).float().flatten()
        config["rope_scaling"] = _llama3_scaling(stored, config["rope_theta"])
    return config


def _special_tokens(metadata: Mapping[str, Any]) -> dict[str, int | None]:
    return {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _llama3_scaling(stored: Tensor, theta: float) -> dict[str, Any]:
    """The Llama-3 rope scaling whose frequency divisors are ``stored`` [head_dim / 2].

    GGUF keeps the divisors, not the settings. All published Llama 3.x models use low 1, high 4, 8192 positions, so
    only the factor is looked for (the largest divisor), and the result is checked against every stored value.
    """
    factor, low, high, positions = round(float(stored.max()), 3), 1.0, 4.0, 8192
    expected = []
    for i in range(len(stored)):
        wavelength = 2 * math.pi * theta ** (i / len(stored))
        if wavelength < positions / high:
            expected.append(1.0)
        elif wavelength > positions / low:
            expected.append(factor)
        else:
            smooth = (positions / wavelength - low) / (high - low)
            expected.append(1 / ((1 - smooth) / factor + smooth))
    if not torch.allclose(stored, torch.tensor(expected), rtol=1e-4):
        raise ConversionError("the GGUF file's rope_freqs are not a known Llama-3 rope scaling")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": positions,
    }


def _write_tokenizer(path: Path, metadata: Mapping[str, Any], side: Path) -> None:
    (side / "generation_config.json").write_text(
        json.dumps(_special_tokens(metadata)), encoding="utf-8"
    )
    if "tokenizer.ggml.model" not in metadata:
        log.warning("%s holds no tokenizer: none is written", path)
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        str(path.absolute().parent), gguf_file=path.name, local_files_only=True
    )
    tokenizer.save_pretrained(side)
    settings_file = side / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    for how_it_was_loaded in ("local_files_only", "is_local"):
        settings.pop(how_it_was_loaded, None)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        # transformers 5 alone knows that name; this one every version reads.
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings_file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
