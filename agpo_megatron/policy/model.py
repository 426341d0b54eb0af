"""GPTModel from a Hugging Face configuration: the only module that knows GPTModel, so that moving to another Megatron
model class stays a small change."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from agpo_megatron.config.schema import PolicyConfig
from agpo_megatron.conversion.cutting import check_layout, padded_vocabulary
from agpo_megatron.conversion.errors import ConversionError
from agpo_megatron.conversion.shape import ModelShape
from agpo_megatron.policy import backend
from agpo_megatron.policy.attention import (
    PackedAttention,
    PackedRotary,
    SequenceParallelRMSNorm,
)
from agpo_megatron.policy.megatron_fields import given_fields
from agpo_megatron.policy.parallel import Layout


class ModelError(ValueError):
    """A model that this layout or this machine cannot hold."""


def parameter_dtype(policy: PolicyConfig) -> torch.dtype:
    return torch.bfloat16 if policy.dtype == "bf16" else torch.float32


def transformer_config(shape: ModelShape, policy: PolicyConfig) -> TransformerConfig:
    """Megatron's configuration for ``shape`` in the layout of ``policy``.

    ``calculate_per_token_loss`` makes Megatron sum: no 1/micro-batches, no 1/dp, no x cp (design, idea 1).
    ``policy.megatron`` adds fields. Raises ModelError for sizes that the layout does not divide, for FP8 without
    Transformer Engine, which megatron-core would ignore silently, and for fields that there are not.
    """
    _check_divides(shape, policy)
    fields = {**own_fields(shape, policy, backend.current()), **given_fields(policy.megatron)}
    return TransformerConfig(**fields)


def own_fields(shape: ModelShape, policy: PolicyConfig, device: backend.Backend) -> dict[str, Any]:
    """The fields that follow from the model and from keys of this project. ``config/pass_through.py`` lists them, so
    that ``policy.megatron`` gives others."""
    dtype = parameter_dtype(policy)
    interleaved = policy.virtual_pipeline > 1
    return dict(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=policy.tensor_parallel,
        pipeline_model_parallel_size=policy.pipeline_parallel,
        virtual_pipeline_model_parallel_size=policy.virtual_pipeline if interleaved else None,
        context_parallel_size=policy.context_parallel,
        sequence_parallel=policy.sequence_parallel,
        params_dtype=dtype,
        bf16=policy.dtype == "bf16",
        pipeline_dtype=dtype,
        perform_initialization=False,  # every parameter is loaded before it is used
        calculate_per_token_loss=True,
        # 1F1B exchanges the shape of each micro-batch. Interleaved, with two stages, next and previous are the same
        # rank, and messages of one batch of sends would be mixed up: single sends, all packs of one length.
        variable_seq_lengths=policy.pipeline_parallel > 1 and not interleaved,
        moe_token_dispatcher_type="alltoall",  # checked without experts too: the default refuses the above
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        deallocate_pipeline_outputs=True,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=True,
        bias_dropout_fusion=False,
        apply_rope_fusion=device.transformer_engine,
        qk_layernorm=shape.qk_norm,
        **_experts(shape, policy, device),
        **_recompute(policy),
        **_fp8(policy, device),
    )


def _check_divides(shape: ModelShape, policy: PolicyConfig) -> None:
    try:
        check_layout(
            shape,
            policy.tensor_parallel,
            policy.pipeline_parallel,
            policy.virtual_pipeline,
            policy.expert_parallel,
        )
    except ConversionError as error:
        raise ModelError(str(error)) from None
    if shape.experts and policy.tensor_parallel > 1 and not policy.sequence_parallel:
        raise ModelError(
            f"tensor_parallel {policy.tensor_parallel} of a model with experts needs sequence_parallel: megatron-core "
            "refuses to train it otherwise; set policy.sequence_parallel to true"
        )


def _experts(shape: ModelShape, policy: PolicyConfig, device: backend.Backend) -> dict[str, Any]:
    """Mixture of experts as transformers computes it: softmax router, no load-balancing loss, no token dropped.

    Softmax over all experts, then the chosen ones renormalised, equals softmax over the chosen ones.
    Auxiliary and z losses stay off: Megatron multiplies them by token counts that it divides by when it averages, and
    here nothing divides, so their weight would depend on the layout.
    """
    if shape.experts is None:
        return {}
    return {
        "num_moe_experts": shape.experts.count,
        "moe_router_topk": shape.experts.per_token,
        "moe_ffn_hidden_size": shape.experts.ffn,
        "moe_router_pre_softmax": not shape.experts.renormalised,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": device.transformer_engine,
        "expert_model_parallel_size": policy.expert_parallel,
        "expert_tensor_parallel_size": policy.tensor_parallel,
    }


def _recompute(policy: PolicyConfig) -> dict[str, Any]:
    if policy.recompute == "none":
        return {}
    if policy.recompute == "selective":
        return {"recompute_granularity": "selective"}
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }


def _fp8(policy: PolicyConfig, device: backend.Backend) -> dict[str, Any]:
    if policy.fp8.recipe == "none":
        return {}
    if not device.transformer_engine:
        raise ModelError(
            f"policy.fp8.recipe {policy.fp8.recipe} needs Transformer Engine on a GPU, which is not in use here; "
            "set policy.layers to auto or policy.fp8.recipe to none (megatron-core would silently train without FP8)"
        )
    return {"fp8": policy.fp8.format, "fp8_recipe": policy.fp8.recipe}


def build_chunks(
    shape: ModelShape, config: TransformerConfig, layout: Layout
) -> list[torch.nn.Module]:
    """This rank's model chunks (one, or one per virtual stage), parameters not initialised."""
    chunks: list[torch.nn.Module] = []
    for stage in range(layout.vpp):
        virtual = stage if layout.vpp > 1 else None
        first = layout.first_stage and stage == 0
        last = layout.last_stage and stage == layout.vpp - 1
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=_layer_spec(config, virtual),
            vocab_size=padded_vocabulary(shape.vocab_size, layout.tp),
            max_sequence_length=shape.max_positions,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=shape.tied,
            position_embedding_type="rope",
            rotary_base=shape.rope_theta,  # type: ignore[arg-type]
            parallel_output=True,
            vp_stage=virtual,
        )
        _rotary(chunk, shape)
        chunks.append(Float16Module(config, chunk) if config.bf16 else chunk)
    return chunks


def wrap_chunks(
    chunks: list[torch.nn.Module], config: TransformerConfig, policy: PolicyConfig
) -> list[DistributedDataParallel]:
    """Chunks with gradient buffers, gradients in fp32, summed (not averaged) over DP x CP."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=policy.distributed_optimizer,
        average_in_collective=False,
    )
    return [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]


def unwrap(module: torch.nn.Module) -> Any:
    """The GPTModel inside its wrappers."""
    while not isinstance(module, GPTModel):
        module = module.module  # type: ignore[assignment]
    return module


def _layer_spec(config: TransformerConfig, virtual: int | None) -> Any:
    experts = config.num_moe_experts
    if backend.current().transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts,
            moe_grouped_gemm=experts is not None,
            qk_layernorm=config.qk_layernorm,
        )
    spec = get_gpt_layer_local_spec(
        num_experts=experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = SequenceParallelRMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = SequenceParallelRMSNorm
    if experts is not None:
        # As Transformer Engine's spec stores it: the norm before a router is not part of a linear.
        del layer.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    layers = get_num_layers_to_build(config, vp_stage=virtual)
    return TransformerBlockSubmodules(
        layer_specs=[spec] * layers, layer_norm=SequenceParallelRMSNorm
    )


def _rotary(chunk: Any, shape: ModelShape) -> None:
    """Rotary frequencies as the checkpoint's config asks, llama3 scaling with all four of its numbers (GPTModel takes
    only the factor)."""
    rotary = chunk.rotary_pos_emb
    if not backend.current().transformer_engine:
        packed = PackedRotary(
            kv_channels=shape.head_dim,
            rotary_percent=1.0,
            rotary_base=shape.rope_theta,
            cp_group=rotary.cp_group,
        )
        chunk.rotary_pos_emb = rotary = packed
    scaling = shape.rope_scaling
    if scaling is not None:
        rotary.inv_freq = rotary._apply_scaling(
            rotary.inv_freq,
            factor=scaling["factor"],
            low_freq_factor=scaling["low_freq_factor"],
            high_freq_factor=scaling["high_freq_factor"],
            original_max_position_embeddings=scaling["original_max_position_embeddings"],
        )
