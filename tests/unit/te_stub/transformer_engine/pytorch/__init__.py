"""Layers. Signatures: Transformer Engine 2.20.2, ``pytorch/module/*.py``, ``pytorch/attention/``."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_engine import look_up

CALLS: list[tuple[str, dict[str, Any]]] = []
"""(class, arguments) of every layer that was made."""
FP8_ROWS: list[int] = []
"""Rows of every input of a matmul: what an FP8 recipe looks at."""


class _Module(torch.nn.Module):
    def _made(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        given = {k: v for k, v in arguments.items() if k not in ("self", "__class__")}
        ours = [c.__name__ for c in type(self).__mro__ if c.__module__ == __name__]
        CALLS.append((ours[0], given))

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None: ...


def _weight(out: int, columns: int, dtype: Any) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(out, columns, dtype=dtype))


class _Linear(_Module):
    """What ``Linear`` and ``LayerNormLinear`` share. Of one tensor-parallel rank only: nothing is exchanged."""

    def _build(self, given: dict[str, Any]) -> None:
        self._made(given)
        if given["tp_size"] != 1:
            raise NotImplementedError("the stub has one tensor-parallel rank")
        dtype = given["params_dtype"]
        self.weight = _weight(given["out_features"], given["in_features"], dtype)
        if given["bias"]:
            self.bias = torch.nn.Parameter(torch.zeros(given["out_features"], dtype=dtype))
        else:
            self.bias = torch.Tensor()
        self.use_bias, self.returns_bias = given["bias"], given["return_bias"]

    def _multiply(self, x: Tensor) -> Any:
        FP8_ROWS.append(math.prod(x.shape[:-1]))
        bias = self.bias if self.use_bias else None
        y = F.linear(x, self.weight, None if self.returns_bias else bias)
        return (y, bias) if self.returns_bias else y


class Linear(_Linear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: Any = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        self._build(dict(locals()))

    def forward(
        self,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> Any:
        return self._multiply(inp)


class LayerNormLinear(_Linear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-05,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        init_method: Any = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: Any = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        parameters_split: Any = None,
        zero_centered_gamma: bool = False,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        name: str | None = None,
    ) -> None:
        if normalization != "RMSNorm" or zero_centered_gamma:
            raise NotImplementedError("the stub normalises as RMSNorm does")
        self._build(dict(locals()))
        self.eps = eps
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(in_features, dtype=params_dtype))

    def forward(
        self,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> Any:
        normal = F.rms_norm(inp.float(), (inp.shape[-1],), self.layer_norm_weight.float(), self.eps)
        return self._multiply(normal.to(inp.dtype))


class RMSNorm(_Module):
    def __init__(
        self,
        normalized_shape: Any = None,
        eps: float = 1e-05,
        sequence_parallel: bool | None = None,
        params_dtype: Any = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        device: Any = "cuda",  # of its base class, ``ops/basic/rmsnorm.py``
        dtype: Any = None,
    ) -> None:
        self._made(dict(locals()))
        self.eps = eps
        size = normalized_shape or hidden_size
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=params_dtype or dtype))
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


class DotProductAttention(_Module):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: Any,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: Any = None,
        bottom_right_diagonal: bool | None = None,
        softcap: float = 0.0,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: Any = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool | None = False,
        name: str | None = None,
    ) -> None:
        self._made(dict(locals()))
        self.heads, self.scale = num_attention_heads, softmax_scale

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Any = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: Any = None,
        bottom_right_diagonal: bool | None = None,
        softcap: float | None = None,
        checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        fast_zero_fill: bool = True,
        inference_params: Any = None,
        pad_between_seqs: bool | None = None,
        fp8_output: bool | None = False,
        bf16_backward: bool | None = False,
        num_splits: int | None = 1,
        score_mod: Any = None,
        score_mod_bprop: Any = None,
        score_mod_tensors: Any = None,
        score_mod_bprop_tensors: Any = None,
        qkv_layer: Tensor | None = None,
        kv_layer: Tensor | None = None,
        qkv_interleave_dim: int = -3,
        thd_attention_policies: Any = None,
        thd_attention_policy_dispatch: str = "auto",
    ) -> Tensor:
        """q [T, heads, d], k, v [T, groups, d]; causal within each sequence (``cu_seqlens``)."""
        assert qkv_format == "thd" and attn_mask_type == "padding_causal"
        assert query_layer.dim() == 3 and cu_seqlens_q is not None
        assert cu_seqlens_q.dtype == torch.int32 and int(cu_seqlens_q[-1]) == len(query_layer)
        ends = cu_seqlens_q.tolist()
        longest = max(b - a for a, b in itertools.pairwise(ends))
        assert max_seqlen_q == max_seqlen_kv == longest
        parts = []
        for a, b in itertools.pairwise(ends):
            q, k, v = (x[a:b].transpose(0, 1) for x in (query_layer, key_layer, value_layer))
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, enable_gqa=len(q) != len(k)
            )
            parts.append(out.transpose(0, 1))
        return torch.cat(parts).flatten(1)


def __getattr__(name: str) -> Any:
    return look_up(__name__, name)
