"""The numbers of a model, read from its Hugging Face config, and the description of a tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from agpo_megatron.conversion.errors import ConversionError
from agpo_megatron.conversion.tables import architecture_of

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
"""Name (as torch, Hugging Face configs and SGLang's HTTP API spell it) of each dtype a checkpoint may hold."""

EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts")
"""transformers 4 writes Qwen3-MoE's under the first, transformers 5 and every Mixtral under the second."""

LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype: ``torch.bfloat16`` is ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its values. ``dtype``: a key of ``DTYPES``."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class ExpertShape:
    """Sizes of a mixture-of-experts layer. ``ffn``: width of one expert; ``renormalised``: the weights of the
    ``per_token`` chosen experts sum to 1 (otherwise they are what the softmax over all experts gave them)."""

    count: int
    per_token: int
    ffn: int
    renormalised: bool


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder that decide parameter shapes and the forward pass.

    ``rope_scaling``: None, or the Llama-3 dictionary (``rope_type``, ``factor``, ``low_freq_factor``,
    ``high_freq_factor``, ``original_max_position_embeddings``). ``qkv_bias`` and ``qk_norm`` (a norm of each query and
    key head) are set by the architecture. ``experts``: None for a dense model; ``ffn`` is unused otherwise.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab_size: int
    max_positions: int
    rms_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    tied: bool
    qkv_bias: bool
    qk_norm: bool = False
    experts: ExpertShape | None = None

    @staticmethod
    def from_hf(config: Mapping[str, Any]) -> ModelShape:
        """Read ``config.json`` as transformers 4 or 5 wrote it. Absent optional keys get transformers' own defaults.

        Raises ConversionError for an unsupported architecture, a missing or non-positive size, or a feature that the
        tables do not carry (it would be dropped silently otherwise).
        """
        architecture = architecture_of(config)
        config = {**dict(architecture.defaults), **config}
        heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
        kv_heads = _size(config, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise ConversionError(
                f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}"
            )
        if config.get("head_dim") is None and hidden % heads:
            raise ConversionError(
                f"num_attention_heads {heads} does not divide hidden_size {hidden} and the config has no head_dim"
            )
        theta, scaling = rope_of(config, architecture.rope_theta)
        return ModelShape(
            hidden=hidden,
            layers=_size(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=_size(config, "head_dim", hidden // heads),
            ffn=_size(config, "intermediate_size"),
            experts=_experts(config) if architecture.has_experts else None,
            qk_norm=architecture.qk_norm,
            vocab_size=_size(config, "vocab_size"),
            max_positions=_size(config, "max_position_embeddings", 2048),
            rms_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=architecture.qkv_bias,
        )

    def sizes(self, dims: tuple[str, ...]) -> tuple[int, ...]:
        """Translate the words of ``HfTensor.dims`` into a shape."""
        experts = self.experts or ExpertShape(0, 0, 0, False)
        words = {
            "experts": experts.count,
            "expert_ffn": experts.ffn,
            "head": self.head_dim,
            "vocab": self.vocab_size,
            "hidden": self.hidden,
            "ffn": self.ffn,
            "q": self.heads * self.head_dim,
            "kv": self.kv_heads * self.head_dim,
        }
        return tuple(words[word] for word in dims)


def _experts(config: Mapping[str, Any]) -> ExpertShape:
    """Read sizes of experts: Qwen3-MoE has a width of its own, Mixtral the dense one; the count has two spellings."""
    counts = [config[k] for k in EXPERT_COUNT_KEYS if config.get(k) is not None]
    if len(set(counts)) > 1:
        raise ConversionError(f"config.json: {' and '.join(EXPERT_COUNT_KEYS)} disagree ({counts})")
    count = (
        _size({"num_experts": counts[0]}, "num_experts") if counts else _size(config, "num_experts")
    )
    per_token = _size(config, "num_experts_per_tok")
    if per_token > count:
        raise ConversionError(
            f"config.json: num_experts_per_tok {per_token} of {count} experts cannot be chosen"
        )
    ffn = _size(config, "moe_intermediate_size", _size(config, "intermediate_size"))
    return ExpertShape(count, per_token, ffn, bool(config.get("norm_topk_prob")))


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConversionError(
            f"config.json: {key} must be a positive whole number, found {value!r}"
        )
    return value


def rope_of(
    config: Mapping[str, Any], default_theta: float = 10000.0
) -> tuple[float, dict[str, Any] | None]:
    """Read RoPE from ``rope_theta`` and ``rope_scaling`` (transformers 4), ``rope_parameters`` (5) or both.

    Returns (theta, scaling); scaling is None for plain RoPE. Raises ConversionError when the two spellings disagree and
    for a scaling other than ``llama3``.
    """
    old = _rope_section(config, "rope_scaling")
    new = _rope_section(config, "rope_parameters")
    thetas = [s["rope_theta"] for s in (config, old, new) if s.get("rope_theta") is not None]
    if len(set(thetas)) > 1:
        raise ConversionError(
            f"config.json: rope_theta and rope_parameters disagree ({thetas}); keep one of them"
        )
    scalings = [_scaling(section) for section in (old, new) if section]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise ConversionError(
            f"config.json: rope_scaling {old} and rope_parameters {new} disagree; keep one of them"
        )
    return float(thetas[0]) if thetas else default_theta, scalings[0] if scalings else None


def _rope_section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = config.get(key) or {}
    if not isinstance(section, Mapping):
        raise ConversionError(f"config.json: {key} must be an object, found {section!r}")
    return section


def _scaling(section: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = section.get("rope_type", section.get("type", "default"))
    if kind in ("default", None):
        return None
    if kind != "llama3":
        raise ConversionError(
            f"config.json: rope scaling {kind!r} is not supported (supported: default, llama3)"
        )
    missing = [key for key in LLAMA3_KEYS if key not in section]
    if missing:
        raise ConversionError(f"config.json: llama3 rope scaling lacks {', '.join(missing)}")
    return {"rope_type": "llama3", **{key: section[key] for key in LLAMA3_KEYS}}


def with_both_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Spell RoPE and the number of experts for readers of transformers 4 and of transformers 5 alike."""
    architecture = architecture_of(config)
    theta, scaling = rope_of(config, architecture.rope_theta)
    spelled = {
        **config,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": theta},
    }
    if architecture.has_experts:
        count = ModelShape.from_hf(config).experts
        assert count is not None
        spelled |= dict.fromkeys(EXPERT_COUNT_KEYS, count.count)
    return spelled
