"""One declarative table per architecture: Hugging Face names, Megatron names, and how each tensor is cut.

Megatron names are those of megatron-core 0.19 ``GPTModel`` with *global* layer numbers (a pipeline stage numbers its
own layers from 0; the policy adds the offset). The local layer spec has separate norms; the Transformer Engine spec
fuses a norm into the linear that follows it and names it ``Rule.te_name``.

Adding an architecture is adding a table to ``ARCHITECTURES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from agpo_megatron.conversion.errors import ConversionError


class Cut(Enum):
    """How one Megatron parameter is made of Hugging Face tensors and cut over TP ranks."""

    REPLICATED = "replicated"  # the same on every rank
    COLUMN = "column"  # output rows (dim 0)
    ROW = "row"  # input columns (dim 1)
    VOCABULARY = "vocabulary"  # dim 0, padded until TP divides it
    GROUPED_QKV = "grouped_qkv"  # q, k, v -> per KV head [q..q, k, v], then dim 0; weight or bias
    GATED_MLP = "gated_mlp"  # gate, up -> each cut on dim 0, a rank holds [gate; up]


class Place(Enum):
    """Where in the model a parameter lives; decides its pipeline stage."""

    EMBEDDING = "embedding"
    LAYER = "layer"
    FINAL_NORM = "final_norm"
    HEAD = "head"


@dataclass(frozen=True)
class HfTensor:
    """A Hugging Face tensor: its name (``{layer}`` stands for the layer) and its dimensions in words.

    Words: ``vocab``, ``hidden``, ``ffn``, ``q`` (heads x head_dim), ``kv`` (kv_heads x head_dim);
    ``ModelShape.sizes`` gives their values.
    """

    name: str
    dims: tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter and the Hugging Face tensors it is made of, in order."""

    megatron: str
    hf: tuple[HfTensor, ...]
    cut: Cut
    place: Place
    te_name: str | None = None

    def at(self, layer: int) -> Rule:
        """This rule with the global ``layer`` number filled in."""
        return replace(
            self,
            megatron=self.megatron.format(layer=layer),
            te_name=self.te_name and self.te_name.format(layer=layer),
            hf=tuple(replace(t, name=t.name.format(layer=layer)) for t in self.hf),
        )

    def megatron_name(self, transformer_engine: bool = False) -> str:
        """The parameter's name under the local or the Transformer Engine layer spec."""
        return self.te_name if transformer_engine and self.te_name else self.megatron


@dataclass(frozen=True)
class Architecture:
    """A supported Hugging Face model class.

    ``required``: config values the table relies on; a config that says otherwise is refused (absent means the value
    given). ``derived``: regular expressions of stored tensors that carry nothing (recomputed buffers).
    """

    name: str
    model_type: str
    rules: tuple[Rule, ...]
    qkv_bias: bool
    required: tuple[tuple[str, Any], ...]
    derived: tuple[str, ...] = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)


def _layer(
    megatron: str, cut: Cut, *hf: tuple[str, tuple[str, ...]], te: str | None = None
) -> Rule:
    prefix = "decoder.layers.{layer}."
    tensors = tuple(HfTensor("model.layers.{layer}." + name, dims) for name, dims in hf)
    return Rule(prefix + megatron, tensors, cut, Place.LAYER, prefix + te if te else None)


_EMBEDDING = Rule(
    "embedding.word_embeddings.weight",
    (HfTensor("model.embed_tokens.weight", ("vocab", "hidden")),),
    Cut.VOCABULARY,
    Place.EMBEDDING,
)
_FINAL_NORM = Rule(
    "decoder.final_layernorm.weight",
    (HfTensor("model.norm.weight", ("hidden",)),),
    Cut.REPLICATED,
    Place.FINAL_NORM,
)
_HEAD = Rule(
    "output_layer.weight",
    (HfTensor("lm_head.weight", ("vocab", "hidden")),),
    Cut.VOCABULARY,
    Place.HEAD,
)
_INPUT_NORM = _layer(
    "input_layernorm.weight",
    Cut.REPLICATED,
    ("input_layernorm.weight", ("hidden",)),
    te="self_attention.linear_qkv.layer_norm_weight",
)
_QKV = _layer(
    "self_attention.linear_qkv.weight",
    Cut.GROUPED_QKV,
    ("self_attn.q_proj.weight", ("q", "hidden")),
    ("self_attn.k_proj.weight", ("kv", "hidden")),
    ("self_attn.v_proj.weight", ("kv", "hidden")),
)
_QKV_BIAS = _layer(
    "self_attention.linear_qkv.bias",
    Cut.GROUPED_QKV,
    ("self_attn.q_proj.bias", ("q",)),
    ("self_attn.k_proj.bias", ("kv",)),
    ("self_attn.v_proj.bias", ("kv",)),
)
_PROJECTION = _layer(
    "self_attention.linear_proj.weight",
    Cut.ROW,
    ("self_attn.o_proj.weight", ("hidden", "q")),
)
_DENSE_MLP = (
    _layer(
        "pre_mlp_layernorm.weight",
        Cut.REPLICATED,
        ("post_attention_layernorm.weight", ("hidden",)),
        te="mlp.linear_fc1.layer_norm_weight",
    ),
    _layer(
        "mlp.linear_fc1.weight",
        Cut.GATED_MLP,
        ("mlp.gate_proj.weight", ("ffn", "hidden")),
        ("mlp.up_proj.weight", ("ffn", "hidden")),
    ),
    _layer("mlp.linear_fc2.weight", Cut.ROW, ("mlp.down_proj.weight", ("hidden", "ffn"))),
)
_DENSE_REQUIRED = (("hidden_act", "silu"), ("mlp_bias", False), ("quantization_config", None))

LLAMA = Architecture(
    name="LlamaForCausalLM",
    model_type="llama",
    rules=(_EMBEDDING, _INPUT_NORM, _QKV, _PROJECTION, *_DENSE_MLP, _FINAL_NORM, _HEAD),
    qkv_bias=False,
    required=(*_DENSE_REQUIRED, ("attention_bias", False)),
)
QWEN2 = Architecture(
    name="Qwen2ForCausalLM",
    model_type="qwen2",
    rules=(_EMBEDDING, _INPUT_NORM, _QKV, _QKV_BIAS, _PROJECTION, *_DENSE_MLP, _FINAL_NORM, _HEAD),
    qkv_bias=True,
    required=(*_DENSE_REQUIRED, ("use_sliding_window", False)),
)
ARCHITECTURES = (LLAMA, QWEN2)


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The table for a Hugging Face config (``architectures``, or ``model_type`` where that is absent).

    Raises ConversionError naming an unsupported architecture, or the config value its table cannot carry.
    """
    names = config.get("architectures") or []
    wanted = names[0] if names else config.get("model_type")
    for architecture in ARCHITECTURES:
        if wanted in (architecture.name, None if names else architecture.model_type):
            break
    else:
        known = ", ".join(a.name for a in ARCHITECTURES)
        raise ConversionError(
            f"architecture {wanted!r} of config.json is not supported (supported: {known})"
        )
    for key, value in architecture.required:
        if config.get(key, value) not in (value, None):
            raise ConversionError(
                f"config.json: {architecture.name} with {key} = {config[key]!r} is not supported (needs {value!r})"
            )
    return architecture
