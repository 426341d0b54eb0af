"""One declarative table per architecture: Hugging Face names, Megatron names, and how each tensor is cut.

Megatron names are those of megatron-core 0.19 ``GPTModel`` with *global* layer and expert numbers (a pipeline stage
numbers its own layers from 0, an expert-parallel rank its own experts; the policy adds the offsets). The local layer
spec has separate norms and one linear per expert; the Transformer Engine spec fuses a norm into the linear that
follows it and groups the experts' linears. Its names are ``Rule.te_name``.

Adding an architecture is adding a table to ``ARCHITECTURES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from agpo_megatron.conversion.errors import ConversionError


class Cut(Enum):
    """The way one Megatron parameter is made of Hugging Face tensors and cut over TP ranks."""

    REPLICATED = "replicated"  # the same on every rank
    COLUMN = "column"  # output rows (dim 0)
    ROW = "row"  # input columns (dim 1)
    VOCABULARY = "vocabulary"  # dim 0, padded until TP divides it
    GROUPED_QKV = "grouped_qkv"  # q, k, v -> per KV head [q..q, k, v], then dim 0; weight or bias
    GATED_MLP = "gated_mlp"  # gate, up -> each cut on dim 0, a rank holds [gate; up]


class Place(Enum):
    """The part of the model that a parameter belongs to; decides its pipeline stage."""

    EMBEDDING = "embedding"
    LAYER = "layer"
    FINAL_NORM = "final_norm"
    HEAD = "head"


@dataclass(frozen=True)
class HfTensor:
    """A Hugging Face tensor: its name (``{layer}`` and ``{expert}`` stand for numbers) and its dimensions in words.

    Words: ``vocab``, ``hidden``, ``ffn``, ``q`` (heads x head_dim), ``kv`` (kv_heads x head_dim), ``head`` (head_dim),
    ``experts``, ``expert_ffn``; ``ModelShape.sizes`` gives their values.
    """

    name: str
    dims: tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter and the Hugging Face tensors it is made of, in order.

    ``per_expert``: there is one for each expert; an expert lives whole on one expert-parallel rank, where ``cut`` tells
    how the ranks of its tensor-parallel group share it. ``layer``, ``expert``: the numbers filled in by ``at``.
    """

    megatron: str
    hf: tuple[HfTensor, ...]
    cut: Cut
    place: Place
    te_name: str | None = None
    per_expert: bool = False
    layer: int | None = None
    expert: int | None = None

    def at(self, layer: int, expert: int | None = None) -> Rule:
        """This rule with the global numbers of its layer and, for a rule per expert, its expert filled in."""
        return replace(
            self,
            megatron=self.megatron.format(layer=layer, expert=expert),
            te_name=self.te_name and self.te_name.format(layer=layer, expert=expert),
            hf=tuple(replace(t, name=t.name.format(layer=layer, expert=expert)) for t in self.hf),
            layer=layer,
            expert=expert,
        )

    def megatron_name(self, transformer_engine: bool = False) -> str:
        """The parameter's name under the local or the Transformer Engine layer spec."""
        return self.te_name if transformer_engine and self.te_name else self.megatron


@dataclass(frozen=True)
class Architecture:
    """A supported Hugging Face model class.

    ``required``: config values the table relies on; a config that says otherwise is refused (absent or null means the
    value given). ``defaults`` and ``rope_theta``: what transformers takes for keys that a config of this class leaves
    out, where that is not what ``ModelShape.from_hf`` takes anyway. ``derived``: regular expressions of stored tensors
    that carry nothing (recomputed buffers).
    """

    name: str
    model_type: str
    rules: tuple[Rule, ...]
    required: tuple[tuple[str, Any], ...]
    qkv_bias: bool = False
    qk_norm: bool = False
    defaults: tuple[tuple[str, Any], ...] = ()
    rope_theta: float = 10000.0
    derived: tuple[str, ...] = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)

    @property
    def has_experts(self) -> bool:
        return any(rule.per_expert for rule in self.rules)


def _layer(
    megatron: str, cut: Cut, *hf: tuple[str, tuple[str, ...]], te: str | None = None
) -> Rule:
    prefix = "decoder.layers.{layer}."
    tensors = tuple(HfTensor("model.layers.{layer}." + name, dims) for name, dims in hf)
    return Rule(
        megatron=prefix + megatron,
        hf=tensors,
        cut=cut,
        place=Place.LAYER,
        te_name=prefix + te if te else None,
        per_expert="{expert}" in megatron,
    )


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
_QK_NORM = tuple(
    _layer(
        f"self_attention.{x}_layernorm.weight",
        Cut.REPLICATED,
        (f"self_attn.{x}_norm.weight", ("head",)),
    )
    for x in "qk"
)


def _experts(block: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Norm, router and experts of a mixture-of-experts layer whose Hugging Face tensors are named so."""
    experts = "mlp.experts.local_experts.{expert}."
    return (
        _layer(
            "pre_mlp_layernorm.weight",
            Cut.REPLICATED,
            ("post_attention_layernorm.weight", ("hidden",)),
        ),
        _layer(
            "mlp.router.weight", Cut.REPLICATED, (f"{block}.gate.weight", ("experts", "hidden"))
        ),
        _layer(
            experts + "linear_fc1.weight",
            Cut.GATED_MLP,
            (f"{block}.experts.{{expert}}.{gate}.weight", ("expert_ffn", "hidden")),
            (f"{block}.experts.{{expert}}.{up}.weight", ("expert_ffn", "hidden")),
            te="mlp.experts.linear_fc1.weight{expert}",
        ),
        _layer(
            experts + "linear_fc2.weight",
            Cut.ROW,
            (f"{block}.experts.{{expert}}.{down}.weight", ("hidden", "expert_ffn")),
            te="mlp.experts.linear_fc2.weight{expert}",
        ),
    )


def _decoder(*layer: Rule) -> tuple[Rule, ...]:
    return (_EMBEDDING, *layer, _FINAL_NORM, _HEAD)


_ATTENTION = (_INPUT_NORM, _QKV, _PROJECTION)
_REQUIRED = (("hidden_act", "silu"), ("quantization_config", None))
_NO_BIAS = ("attention_bias", False)
_NO_WINDOW = ("use_sliding_window", False)

LLAMA = Architecture(
    name="LlamaForCausalLM",
    model_type="llama",
    rules=_decoder(*_ATTENTION, *_DENSE_MLP),
    required=(*_REQUIRED, ("mlp_bias", False), _NO_BIAS),
)
QWEN2 = Architecture(
    name="Qwen2ForCausalLM",
    model_type="qwen2",
    rules=_decoder(_INPUT_NORM, _QKV, _QKV_BIAS, _PROJECTION, *_DENSE_MLP),
    required=(*_REQUIRED, _NO_WINDOW),
    qkv_bias=True,
)
QWEN3 = Architecture(
    name="Qwen3ForCausalLM",
    model_type="qwen3",
    rules=_decoder(*_ATTENTION, *_QK_NORM, *_DENSE_MLP),
    required=(*_REQUIRED, _NO_BIAS, _NO_WINDOW),
    qk_norm=True,
    defaults=(("head_dim", 128),),
)
MISTRAL = Architecture(
    name="MistralForCausalLM",
    model_type="mistral",
    rules=LLAMA.rules,
    required=(*_REQUIRED, ("sliding_window", None)),
    defaults=(("sliding_window", 4096), ("num_key_value_heads", 8)),
)
MIXTRAL = Architecture(
    name="MixtralForCausalLM",
    model_type="mixtral",
    rules=_decoder(*_ATTENTION, *_experts("block_sparse_moe", "w1", "w3", "w2")),
    required=(
        *_REQUIRED,
        ("sliding_window", None),
        ("router_jitter_noise", 0.0),
        ("norm_topk_prob", True),
    ),
    defaults=(
        ("num_experts_per_tok", 2),
        ("num_key_value_heads", 8),
        ("rms_norm_eps", 1e-5),
        ("norm_topk_prob", True),
    ),
    rope_theta=1e6,
)
QWEN3_MOE = Architecture(
    name="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    rules=_decoder(*_ATTENTION, *_QK_NORM, *_experts("mlp", "gate_proj", "up_proj", "down_proj")),
    required=(
        *_REQUIRED,
        _NO_BIAS,
        _NO_WINDOW,
        ("decoder_sparse_step", 1),
        ("mlp_only_layers", []),
    ),
    qk_norm=True,
    defaults=(
        ("num_experts_per_tok", 8),
        ("moe_intermediate_size", 768),
        ("num_key_value_heads", 4),
        ("norm_topk_prob", False),
    ),
)
ARCHITECTURES = (LLAMA, QWEN2, QWEN3, MISTRAL, MIXTRAL, QWEN3_MOE)
"""SmolLM2 is a Llama, Qwen2.5 a Qwen2."""


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
    stated = {**dict(architecture.defaults), **config}
    for key, value in architecture.required:
        found = stated.get(key)
        if found not in (value, None):
            raise ConversionError(
                f"config.json: {architecture.name} with {key} = {found!r}"
                f"{'' if key in config else ', which is what its absence means,'} is not supported (needs {value!r})"
            )
    return architecture
