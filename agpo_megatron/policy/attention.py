"""Layer modules that give megatron-core's local spec what Transformer Engine gives on a GPU: a norm that works under
sequence parallelism, rotary embedding that restarts with each packed sequence, and attention over packed sequences.

Right padding and a causal mask need no mask tensor: a real query never looks to its right, where the padding is, and
what padding queries compute is dropped. So sequences of similar length go through one dense, causal SDPA call.

Under context parallelism a rank has some queries of every sequence and gathers all keys and values; which of them a
query may see is then a mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from agpo_megatron.policy.context import Exchange, Share, all_keys, zigzag

PACKED = "packed"
"""The ``qkv_format`` of packs made here. Megatron treats ``'thd'`` alone specially: it would rotate each sequence.
With any other name q, k, v stay [T, 1, heads, head_dim] and are rotated at once by per-token angles."""


@dataclass(frozen=True)
class LengthBucket:
    """A run of neighbouring sequences attended to in one call, padded to [``count``, ``longest``].

    ``tokens``: how many packed tokens it covers; ``slots`` [tokens] int64, on the device of what is attended to: where
    each goes in the dense [count * longest], or None when all sequences are equally long.
    Under context parallelism it is the bucket of the queries; ``keys`` is that of the whole sequences, ``visible``
    [count, 1, longest, keys.longest] bool what each query sees. Otherwise both are None, and attention is causal.
    """

    tokens: int
    count: int
    longest: int
    slots: Tensor | None
    keys: LengthBucket | None = None
    visible: Tensor | None = None


def buckets_of(
    lengths: Sequence[int], device: torch.device, ranks: int = 1, rank: int = 0
) -> tuple[LengthBucket, ...]:
    """Cut ``lengths`` (longest first) wherever padding would more than double a sequence. ``device``: of the indices.
    ``ranks``, ``rank``: of the context-parallel group."""
    cuts = [0]
    for i, n in enumerate(lengths):
        if 2 * n < lengths[cuts[-1]]:
            cuts.append(i)
    cuts.append(len(lengths))
    runs = [lengths[a:b] for a, b in pairwise(cuts)]
    if ranks == 1:
        return tuple(_bucket(run, device) for run in runs)
    return tuple(_shared_bucket(run, device, ranks, rank) for run in runs)


def _bucket(lengths: Sequence[int], device: torch.device) -> LengthBucket:
    longest, tokens = max(lengths), sum(lengths)
    if tokens == longest * len(lengths):
        return LengthBucket(tokens, len(lengths), longest, None)
    sizes = torch.tensor(lengths)
    starts = torch.arange(len(lengths)) * longest - (sizes.cumsum(0) - sizes)
    slots = torch.arange(tokens) + torch.repeat_interleave(starts, sizes)
    return LengthBucket(tokens, len(lengths), longest, slots.to(device, non_blocking=True))


def _shared_bucket(
    lengths: Sequence[int], device: torch.device, ranks: int, rank: int
) -> LengthBucket:
    """The bucket of this rank's queries. Slots between sequences get position 0, so that no softmax is empty."""
    keys, queries = _bucket(lengths, device), _bucket([n // ranks for n in lengths], device)
    positions = torch.zeros(queries.count, queries.longest, dtype=torch.int64)
    for i, n in enumerate(lengths):
        positions[i, : n // ranks] = zigzag(n, ranks, rank)
    visible = torch.arange(keys.longest) <= positions[:, None, :, None]
    return replace(queries, keys=keys, visible=visible.to(device, non_blocking=True))


@dataclass
class PackedSequences(PackedSeqParams):
    """The facts about a pack that the modules of this file need. ``positions`` [T / CP] int64. ``exchange``: None
    without context parallelism."""

    positions: Tensor | None = None
    buckets: tuple[LengthBucket, ...] = ()
    exchange: Exchange | None = None

    @staticmethod
    def of(share: Share, lengths: Sequence[int]) -> PackedSequences:
        """Describe a pack. ``share``: this rank's, on the model's device; ``lengths``: of the whole sequences,
        longest first (padding sequences may be shorter and come last)."""
        e = share.exchange
        ranks, rank = (e.group.size(), e.group.rank()) if e else (1, 0)
        return PackedSequences(
            qkv_format=PACKED,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
            positions=share.positions,
            buckets=buckets_of(lengths, share.positions.device, ranks, rank),
            exchange=e,
        )


def transformer_engine_params(lengths: Sequence[int], device: torch.device) -> PackedSeqParams:
    """The same pack for Transformer Engine: ``cu_seqlens`` [sequences + 1] int32, of whole sequences; it knows the
    context-parallel ranks, and the chunks they hold, by itself. Not yet executed on a GPU."""
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
        """Normalise ``x`` [..., hidden] of any dtype; shape and dtype are kept."""
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
        """Attend: ``query`` [T, 1, heads, d], ``key``/``value`` [T, 1, kv_heads, d] to [T, 1, heads * d]. Under context
        parallelism T / CP tokens."""
        buckets: tuple[LengthBucket, ...] = packed_seq_params.buckets
        keys = torch.cat((key, value), dim=1)  # [T, 2, kv_heads, d]: one exchange for both
        if packed_seq_params.exchange is not None:
            keys = all_keys(keys, packed_seq_params.exchange)
        parts = [
            self._attend(q, kv, bucket)
            for q, kv, bucket in zip(
                query.squeeze(1).split([b.tokens for b in buckets]),
                keys.split([(b.keys or b).tokens for b in buckets]),
                buckets,
                strict=True,
            )
        ]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.reshape(query.shape[0], 1, -1)

    def _attend(self, q: Tensor, kv: Tensor, bucket: LengthBucket) -> Tensor:
        """One bucket: q [n, heads, d], kv [m, 2, kv_heads, d] to [n, heads, d]; n = m without context parallelism."""
        k, v = kv.unbind(1)
        seen = bucket.keys or bucket
        out = F.scaled_dot_product_attention(
            _spread(q, bucket),
            _spread(k, seen),
            _spread(v, seen),
            attn_mask=bucket.visible,
            is_causal=bucket.visible is None,
            scale=self.scale,
            enable_gqa=q.shape[1] != kv.shape[2],
        )
        out = out.transpose(1, 2).flatten(0, 1)
        return out if bucket.slots is None else _FromDense.apply(out, bucket.slots)


def _spread(x: Tensor, bucket: LengthBucket) -> Tensor:
    """Packed [tokens, heads, d] to dense [count, heads, longest, d]."""
    if bucket.slots is not None:
        x = _ToDense.apply(x, bucket.slots, bucket.count * bucket.longest)
    return x.reshape(bucket.count, bucket.longest, *x.shape[1:]).transpose(1, 2)
