"""Flags and fields that a run hands on to SGLang and Megatron as they are: which of them belong to other keys.

``rollout.server_args`` and ``policy.megatron`` hold any of them. What this project sets itself is refused here, by
name; which others there are only the packages know: ``cluster/pass_through.py`` asks those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .schema import Config

MIN_POOL = 256
SERVER_DEFAULTS = ("mem_fraction_static", "max_total_tokens")
"""Flags with a default of this project, and checked by it."""

_HTTP = "set by the project because its client speaks plain HTTP without a key"
_ONE = "set by the project because a server is one replica, and weights are published to all of its ranks"
_PUBLISHED = "set by the project because servers hold what is published, in rollout.dtype"
OWNED_SERVER_ARGS: Mapping[str, str] = {
    "model_path": "use model.path",
    "tokenizer_path": "use model.path",
    "revision": "use model.path",
    "config": "set by the project because a file of flags would go around these checks; list the flags here",
    "host": "set by the project because each node has its own",
    "port": "use rollout.port",
    "device": "use cluster.device",
    "base_gpu_id": "set by the project because servers get the devices behind the ranks'",
    "dtype": "use rollout.dtype",
    "tp_size": "use rollout.tensor_parallel",
    **dict.fromkeys(("dp_size", "pp_size", "nnodes", "node_rank", "dist_init_addr"), _ONE),
    "random_seed": "use seed",
    "max_running_requests": "use rollout.max_in_flight",
    "weight_version": "set by the project because it says which weights a server holds",
    "load_format": "set by the project because it depends on the kind of model.path",
    **dict.fromkeys(("quantization", "quantization_param_path", "torchao_config"), _PUBLISHED),
    "attention_backend": "",  # on a CPU only: see below
    "sampling_backend": "",
    "sleep_on_idle": "",
    "grammar_backend": "set by the project because responses are free text",
    "sampling_defaults": "use rollout.temperature and its like: each request carries its sampling",
    "preferred_sampling_params": "use rollout.temperature and its like: each request carries its sampling",
    "enable_fp32_lm_head": "set by the project because the policy that trains has fp32 logits",
    "skip_tokenizer_init": "set by the project because texts that end a response need the tokenizer",
    "skip_server_warmup": "set by the project because a real generation is its own",
    "log_level_http": "set by the project because each request would be a line",
    **dict.fromkeys(("api_key", "admin_api_key", "ssl_keyfile", "ssl_certfile"), _HTTP),
}
"""Flag -> what to do instead. The empty ones are set by the project on a CPU, and free on a GPU."""
_ON_A_CPU = "set by the project because the published wheel has nothing else on a CPU"

_LAYOUT = "use policy.{key}"
_MODEL = "set by the project because the checkpoint decides it (model.path)"
_SUM = "set by the project because losses are sums, which no layout may change"
_EVEN = "set by the project because conversion and publishing deal layers evenly"
_AUXILIARY = (
    "set by the project because Megatron multiplies it by token counts that nothing divides here"
)
OWNED_MEGATRON: Mapping[str, str] = {
    **{
        name: _LAYOUT.format(key=key)
        for name, key in {
            "tensor_model_parallel_size": "tensor_parallel",
            "pipeline_model_parallel_size": "pipeline_parallel",
            "virtual_pipeline_model_parallel_size": "virtual_pipeline",
            "context_parallel_size": "context_parallel",
            "expert_model_parallel_size": "expert_parallel",
            "expert_tensor_parallel_size": "tensor_parallel",
            "sequence_parallel": "sequence_parallel",
            "params_dtype": "dtype",
            "pipeline_dtype": "dtype",
            "bf16": "dtype",
            "fp16": "dtype",
            "fp8": "fp8.recipe and policy.fp8.format",
            "fp8_recipe": "fp8.recipe",
            "recompute_granularity": "recompute",
            "transformer_impl": "layers",
        }.items()
    },
    **dict.fromkeys(
        (
            *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups"),
            *("kv_channels", "ffn_hidden_size", "normalization", "layernorm_epsilon"),
            *("layernorm_zero_centered_gamma", "gated_linear_unit", "activation_func"),
            *("activation_func_clamp_value", "glu_linear_offset", "add_bias_linear"),
            *("add_qkv_bias", "qk_layernorm", "qk_l2_norm", "rotary_interleaved", "softmax_scale"),
            *("softmax_type", "window_size", "window_attn_skip_freq", "multi_latent_attention"),
            *("attention_output_gate", "no_rope_freq", "mtp_num_layers", "num_moe_experts"),
            *("experimental_attention_variant", "is_hybrid_model", "use_mup", "moe_layer_freq"),
            *("moe_router_topk", "moe_ffn_hidden_size", "moe_router_pre_softmax"),
            *("moe_router_score_function", "moe_router_topk_scaling_factor"),
            *("moe_router_num_groups", "moe_router_group_topk", "moe_router_enable_expert_bias"),
            *("moe_shared_expert_intermediate_size", "moe_shared_expert_gate", "moe_latent_size"),
            *("apply_residual_connection_post_layernorm", "mlp_chunks_for_training"),
        ),
        _MODEL,
    ),
    **dict.fromkeys(("calculate_per_token_loss", "finalize_model_grads_func"), _SUM),
    **dict.fromkeys(("grad_scale_func", "no_sync_func", "grad_sync_func", "param_sync_func"), _SUM),
    **dict.fromkeys(
        (
            *("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"),
            *("pipeline_model_parallel_layout", "account_for_embedding_in_pipeline_split"),
            *("account_for_loss_in_pipeline_split", "heterogeneous_block_specs"),
        ),
        _EVEN,
    ),
    **dict.fromkeys(
        ("moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_router_load_balancing_type"), _AUXILIARY
    ),
    **dict.fromkeys(
        ("hidden_dropout", "attention_dropout", "moe_input_jitter_eps", "moe_token_dropping"),
        "set by the project because a token's log-prob must not depend on chance or on its neighbours",
    ),
    **dict.fromkeys(
        ("moe_expert_capacity_factor", "moe_pad_expert_input_to_capacity"),
        "set by the project because no token is dropped",
    ),
    **dict.fromkeys(
        ("variable_seq_lengths", "overlap_p2p_comm", "batch_p2p_comm"),
        "set by the project because it follows from the pipeline schedule and packs of several lengths",
    ),
    **dict.fromkeys(
        ("hierarchical_context_parallel_sizes", "hybrid_context_parallel"),
        "set by the project because packs are cut over policy.context_parallel in one way",
    ),
    "perform_initialization": "set by the project because every parameter is loaded before it is used",
    "deallocate_pipeline_outputs": "set by the project because nothing reads a stage's output again",
    "masked_softmax_fusion": "set by the project because packs have no mask",
    "gradient_accumulation_fusion": "set by the project because it needs a kernel of apex",
    "bias_activation_fusion": "set by the project because it is what fuses SwiGLU",
    "bias_dropout_fusion": "set by the project because there is no dropout",
    "apply_rope_fusion": "set by the project because it follows from policy.layers",
    "moe_grouped_gemm": "set by the project because it follows from policy.layers",
    "moe_token_dispatcher_type": "set by the project because packs have several lengths",
}
"""Field of TransformerConfig -> what to do instead."""


def owned_server_arg(name: str, on_cpu: bool | None) -> str:
    """Say what to do in place of giving SGLang the flag ``name`` ("use rollout.port"); "" if it may be given.

    ``on_cpu``: whether servers run on a CPU; None if that is not known yet.
    """
    reason = OWNED_SERVER_ARGS.get(name)
    if reason == "":
        return _ON_A_CPU if on_cpu else ""
    return reason or ""


def check_pass_through(config: Config) -> list[str]:
    """List what ``rollout.server_args`` and ``policy.megatron`` may not hold, and values that cannot be right."""
    on_cpu = None if config.cluster.device == "auto" else config.cluster.device == "cpu"
    args = config.rollout.server_args
    found = [
        f"rollout.server_args.{name}: {reason}"
        for name in args
        if (reason := owned_server_arg(name, on_cpu))
    ]
    found += [
        f"policy.megatron.{name}: {OWNED_MEGATRON[name]}"
        for name in config.policy.megatron
        if name in OWNED_MEGATRON
    ]
    return [*found, *_memory_problems(config)]


def _memory_problems(config: Config) -> Iterator[str]:
    args, key = config.rollout.server_args, "rollout.server_args"
    share = args.get("mem_fraction_static")
    if share is not None and (type(share) not in (int, float) or not 0 < share < 1):
        yield f"{key}.mem_fraction_static: must be a number between 0 and 1, not {share!r}"
    pool = args.get("max_total_tokens")
    if pool is None:
        return
    if type(pool) is not int or pool < MIN_POOL:
        yield f"{key}.max_total_tokens: must be a whole number of at least {MIN_POOL} tokens, not {pool!r}"
        return
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if pool < longest:
        yield (
            f"{key}: max_total_tokens {pool} cannot hold one sample of data.max_prompt_tokens "
            f"{config.data.max_prompt_tokens} + rollout.max_response_tokens {config.rollout.max_response_tokens} = "
            f"{longest} tokens"
        )
