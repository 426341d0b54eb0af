"""Converts llama.cpp (GGUF) files to a Hugging Face checkpoint in bf16 that transformers and SGLang load.

transformers reads the file: config, tokenizer, names, dequantisation, the order of rows for RoPE. This module refuses
what transformers would drop without a word, recovers the rope scaling of Llama 3, and writes the folder.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agpo_megatron.conversion.building import refuse_existing
from agpo_megatron.conversion.errors import ConversionError
from agpo_megatron.conversion.hf_writer import write_hf_checkpoint
from agpo_megatron.conversion.weight_map import WeightMap

_ROPE_FACTORS = "rope_freqs.weight"
"""Tensor of the divisors of RoPE's frequencies: no weight of the model."""


def convert_gguf(gguf_file: str | os.PathLike[str], out_dir: str | os.PathLike[str]) -> None:
    """Write ``out_dir``: bf16 safetensors, config, generation config, tokenizer.

    Needs the packages ``gguf`` and ``transformers``, and memory for all weights in bf16.
    Raises ConversionError for a damaged file, a file without a tokenizer, a model that the tables do not carry, and a
    tensor too many or too few.
    """
    path = Path(gguf_file)
    refuse_existing(Path(out_dir))
    scaling, stored = _read_what_transformers_drops(path)
    config, model = _empty_model(path, scaling)
    weights = WeightMap(config)  # refuses another family before anything large is read
    tensors = _tensors(path, model)
    weights.check_hf({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if stored != len(tensors):
        raise ConversionError(
            f"{path}: {stored - len(tensors)} of its tensors have no place in {weights.architecture.name}"
        )
    with tempfile.TemporaryDirectory(prefix="gguf-tokenizer-") as side:
        _write_tokenizer(path, config, Path(side))
        write_hf_checkpoint(out_dir, config, tensors.items(), source_dir=side)


def _read_what_transformers_drops(path: Path) -> tuple[Mapping[str, Any] | None, int]:
    """Return (Llama-3 rope scaling or None, number of tensors that are weights). Raises ConversionError."""
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
        fields, tensors = reader.fields, {tensor.name: tensor for tensor in reader.tensors}
        family = fields["general.architecture"].contents()
    except Exception as error:  # the reader raises whatever numpy met in a damaged file
        raise ConversionError(f"{path} is truncated or not a GGUF file ({error})") from error
    if "tokenizer.ggml.tokens" not in fields:
        raise ConversionError(f"{path} holds no tokenizer; convert a file that has one")
    scaling = fields.get(f"{family}.rope.scaling.type")
    if scaling is not None and scaling.contents() != "none":
        raise ConversionError(f"GGUF rope scaling {scaling.contents()!r} is not supported")
    if _ROPE_FACTORS not in tensors:
        return None, len(tensors)
    divisors = torch.from_numpy(tensors[_ROPE_FACTORS].data.copy()).float().flatten()
    theta = fields.get(f"{family}.rope.freq_base")
    return _llama3_scaling(divisors, theta.contents() if theta else 10000.0), len(tensors) - 1


def _empty_model(path: Path, scaling: Mapping[str, Any] | None) -> tuple[dict[str, Any], Any]:
    """Return (config as transformers writes it, the model without values). Raises ConversionError."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        settings = AutoConfig.for_model(**load_gguf_checkpoint(str(path))["config"])
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings)
    except Exception as error:  # whatever transformers met in a file it does not know
        raise ConversionError(f"{path}: transformers cannot read it ({error})") from error
    config: dict[str, Any] = settings.to_diff_dict()
    config["architectures"] = [type(model).__name__]
    if "rms_norm_eps" in config:  # stored as fp32: 1e-05 again
        config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:g}")
    if scaling:
        config["rope_parameters"] = {**config["rope_parameters"], **scaling}
    return config, model


def _tensors(path: Path, model: Any) -> dict[str, Tensor]:
    """Read every tensor that ``model`` has a place for, in bf16, by Hugging Face name. Raises ConversionError."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        loaded = load_gguf_checkpoint(
            str(path), return_tensors=True, model_to_load=model, torch_dtype=torch.bfloat16
        )
    except (NotImplementedError, ValueError) as error:
        raise ConversionError(f"{path}: transformers cannot read it ({error})") from error
    return dict(loaded["tensors"])


def _llama3_scaling(stored: Tensor, theta: float) -> dict[str, Any]:
    """The Llama-3 rope scaling whose frequency divisors are ``stored`` [head_dim / 2].

    GGUF keeps the divisors, not the settings. All published Llama 3.x models use low 1, high 4, 8192 positions, so
    only the factor is looked for (the largest divisor), and the result is checked against every stored value.
    """
    factor, low, high, positions = round(float(stored.max()), 3), 1.0, 4.0, 8192
    wavelengths = (2 * math.pi * theta ** (i / len(stored)) for i in range(len(stored)))
    smooth = [min(max((positions / w - low) / (high - low), 0.0), 1.0) for w in wavelengths]
    expected = torch.tensor([1 / ((1 - s) / factor + s) for s in smooth])
    if not torch.allclose(stored, expected, rtol=1e-4):
        raise ConversionError("the GGUF file's rope_freqs are not a known Llama-3 rope scaling")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": positions,
    }


def _write_tokenizer(path: Path, config: Mapping[str, Any], side: Path) -> None:
    """Write tokenizer and generation config as every version of transformers reads them."""
    from transformers import AutoTokenizer

    special = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (side / "generation_config.json").write_text(json.dumps(special), encoding="utf-8")
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
