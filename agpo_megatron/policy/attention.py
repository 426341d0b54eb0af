"""Layer modules that give megatron-core's local spec what Transformer Engine gives on a GPU: a norm that works under
sequence parallelism, rotary embedding that restarts with each packed sequence, and attention over packed sequences.

Right padding and a causal mask need no mask tensor: a real query never looks to its right, where the padding is, and
what padding queries compute is dropped. So sequences of similar length go through one dense, causal SDPA call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

PACKED = "packed"
"""``qkv_format`` of packs made here. Megatron treats only ``'thd'`` specially: it would rotate one sequence at a time.
With any other name q, k, v stay [T, 1, heads, head_dim] and are rotated at once by per-token angles."""


@dataclass(frozen=True)
class Bucket:
    """A run of neighbouring sequences attended to in one call, padded to [``count``, ``longest``].

    ``tokens``: how many packed tokens it covers; ``slots`` [tokens] int64, on the device of what is attended to: where
    each goes in the dense [count * longest], or None when all sequences are equally long.
    """

    tokens: int
    count: int
    longest: int
    slots: Tensor | None


def buckets_of(lengths: Sequence[int], device: torch.device) -> tuple[Bucket, ...]:
    """Cut ``lengths`` (longest first) wherever padding would more than double a sequence. ``device``: of ``slots``."""
    cuts = [0]
    for i, n in enumerate(lengths):
        if 2 * n < lengths[cuts[-1]]:
            cuts.append(i)
    cuts.append(len(lengths))
    return tuple(_bucket(lengths[a:b], device) for a, b in pairwise(cuts))


def _bucket(lengths: Sequence[int], device: torch.device) -> Bucket:
    longest, tokens = max(lengths), sum(lengths)
    if tokens == longest * len(lengths):
        return Bucket(tokens, len(lengths), longest, None)
    sizes = torch.tensor(lengths)
    starts = torch.arange(len(lengths)) * longest - (sizes.cumsum(0) - sizes)
    slots = torch.arange(tokens) + torch.repeat_interleave(starts, sizes)
    return Bucket(tokens, len(lengths), longest, slots.to(device, non_blocking=True))


@dataclass
class PackedSequences(PackedSeqParams):
    """What the modules of this file need to know of a pack. ``positions`` [T] int64."""

    positions: Tensor | None = None
    buckets: tuple[Bucket, ...] = ()

    @staticmethod
    def of(positions: Tensor, lengths: Sequence[int]) -> PackedSequences:
        """``positions`` [T] int64 on the model's device, ``lengths`` longest first (padding sequences may be shorter
        and come last)."""
        return PackedSequences(
            qkv_format=PACKED,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
            positions=positions,
            buckets=buckets_of(lengths, positions.device),
        )


def transformer_engine_params(lengths: Sequence[int], device: torch.device) -> PackedSeqParams:
    """The same pack for Transformer Engine: ``cu_seqlens`` [sequences + 1] int32."""
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    ends = ends.to(device, non_blocking=True)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


class SequenceParallelRMSNorm(torch.nn.Module):
    """RMSNorm in fp32. megatron-core's own wrapper refuses sequence parallelism, although all that is needed is the
    mark by which ``finalize_model_grads`` sums the weight's gradient over TP."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., hidden] in any dtype; the same back."""
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


class PackedRotary(RotaryEmbedding):
    """Rotary angles of each packed token from its own position.

    GPTModel asks ``get_rotary_seq_len`` and hands the answer to ``forward``; here that answer is the position tensor.
    """

    def get_rotary_seq_len(
        self, inference_context: Any, transformer: Any, transformer_input: Any, *args: Any, **_: Any
    ) -> Any:
        packed = args[1]
        return packed.positions

    def forward(self, max_seq_len: Any, *_: Any, **__: Any) -> Tensor:
        """Positions [T] to angles [T, 1, 1, head_dim] fp32."""
        angles = torch.outer(max_seq_len.to(self.inv_freq.dtype), self.inv_freq)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]


class _ToDense(torch.autograd.Function):
    """Packed [tokens, ...] to dense [count * longest, ...], zeros between. Backward is a plain gather (autograd's own
    backward of indexing would add up, row by row)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(slots)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, slots, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return grad.index_select(0, slots), None, None


class _FromDense(torch.autograd.Function):
    """Inverse of ``_ToDense``."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.size = dense.shape[0]
        return dense.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slots,) = ctx.saved_tensors
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, slots, grad), None


class PackedAttention(torch.nn.Module):
    """Core attention of a layer spec: causal, within each packed sequence, grouped-query, on any device."""

    def __init__(
        self, config: TransformerConfig, *_: Any, softmax_scale: float | None = None, **__: Any
    ) -> None:
        super().__init__()
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels or 1)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """``query`` [T, 1, heads, d], ``key``/``value`` [T, 1, kv_heads, d]; returns [T, 1, heads * d]."""
        buckets: tuple[Bucket, ...] = packed_seq_params.buckets
        sizes = [b.tokens for b in buckets]
        parts = [
            self._attend(q, k, v, bucket)
            for q, k, v, bucket in zip(
                query.squeeze(1).split(sizes),
                key.squeeze(1).split(sizes),
                value.squeeze(1).split(sizes),
                buckets,
                strict=True,
            )
        ]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.reshape(query.shape[0], 1, -1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bucket: Bucket) -> Tensor:
        """One bucket: q [n, heads, d], k and v [n, kv_heads, d] to [n, heads, d]."""
        heads, dim = q.shape[1:]
        size, slots = bucket.count * bucket.longest, bucket.slots
        if slots is not None:
            q, k, v = (_ToDense.apply(x, slots, size) for x in (q, k, v))
        q, k, v = (x.view(bucket.count, bucket.longest, -1, dim).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        out = out.transpose(1, 2).reshape(size, heads, dim)
        return out if slots is None else _FromDense.apply(out, slots)
