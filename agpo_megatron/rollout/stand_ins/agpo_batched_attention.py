"""Batched torch attention for SGLang on a CPU, loaded through SGLang's own plugin hook (group ``sglang.srt.plugins``).

SGLang's ``torch_native`` backend runs one ``scaled_dot_product_attention`` per sequence and layer in a Python loop;
with 128 sequences that loop is most of a decode step. This subclass computes the same numbers with one call per layer,
over the sequences' key and value rows padded to the longest and masked. Everything it does not cover (cross attention,
sliding windows, prefills of very different lengths) goes to SGLang's own code.

Deterministic inference (agpo_batch_invariance.py): a decoding sequence is padded to a length that follows from its own,
and those padded alike share a call, which computes each by itself. Prefills are SGLang's loop.
"""

from __future__ import annotations

from typing import Any

import torch
from agpo_batch_invariance import wanted as batch_invariance_wanted
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch.nn.functional import scaled_dot_product_attention

# Padded key rows gathered at once; bounds the buffers at [ROWS, kv heads, head size] per call.
ROWS = 65536
# Deterministic inference pads to multiples of it: whole vectors, so that padding changes no order of summation.
STEP = 64

Where = slice | torch.Tensor
"""Sequences of a batch: a run of them, or their indices."""


class BatchedAttention(TorchNativeAttnBackend):
    """``torch_native`` with one attention call per layer instead of one per sequence."""

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        # Lengths as Python ints, once per forward pass: every layer needs them.
        self._lengths: list[int] = forward_batch.seq_lens.tolist()
        self._extends: list[int] = []
        if forward_batch.forward_mode.is_extend():
            self._extends = forward_batch.extend_seq_lens.tolist()
        self._plans: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._parts = self._alike() if batch_invariance_wanted() else self._runs()

    def _runs(self) -> list[tuple[Where, int]]:
        """Cut the batch into runs of sequences whose padded keys fit in ``ROWS`` (at least one sequence each); each
        with the length of its longest."""
        size = max(1, ROWS // max(self._lengths))
        starts = range(0, len(self._lengths), size)
        return [(slice(i, i + size), max(self._lengths[i : i + size])) for i in starts]

    def _alike(self) -> list[tuple[Where, int]]:
        """Divide the batch into sequences of one padded length, with it; as many at once as fit in ``ROWS``."""
        padded = torch.tensor(self._lengths).add(STEP - 1).div(STEP, rounding_mode="floor") * STEP
        parts: list[tuple[Where, int]] = []
        for width in padded.unique().tolist():
            members = (padded == width).nonzero().flatten()
            parts += [(some, width) for some in members.split(max(1, ROWS // width))]
        return parts

    def _plan(
        self,
        part: int,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cache rows ``[n, L]`` (int64) and additive mask (0 or -inf) of the sequences of a part; for all layers.

        Mask: ``[n, 1, 1, L]`` when decoding, ``[n, 1, T, L]`` in a prefill of at most T new tokens, causal.
        """
        if part not in self._plans:
            where, longest = self._parts[part]
            lengths = torch.tensor(self._lengths)[where]
            column = torch.arange(longest)
            inside = column < lengths[:, None]
            rows = req_to_token[req_pool_indices[where], :longest].long()
            rows = torch.where(inside, rows, 0)
            if self._extends:
                extends = torch.tensor(self._extends)[where]
                query = torch.arange(int(extends.max()))
                last = (lengths - extends)[:, None] + query  # position of each query token
                attend = (column <= last[:, :, None])[
                    :, None
                ]  # rows past `extends` are dropped later
            else:
                attend = inside[:, None, None, :]
            mask = torch.zeros(attend.shape, dtype=dtype).masked_fill(~attend, float("-inf"))
            self._plans[part] = rows, mask
        return self._plans[part]

    def _run_sdpa_forward_decode(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> torch.Tensor:
        if encoder_lens is not None or is_cross_attn or sliding_window_size is not None:
            return super()._run_sdpa_forward_decode(
                query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens,
                encoder_lens, scaling, enable_gqa, causal, is_cross_attn, sliding_window_size,
            )  # fmt: skip
        kv_heads = k_cache.shape[1]
        for part, (where, _) in enumerate(self._parts):
            rows, mask = self._plan(part, req_to_token, req_pool_indices, query.dtype)
            # The query heads of a key/value head stand where a prefill has its query tokens: GQA without copies.
            q = query[where].unflatten(1, (kv_heads, -1))
            k, v = (_gather(cache, rows).to(q.dtype) for cache in (k_cache, v_cache))
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
            output[where] = out.flatten(1, 2)
        return output

    def _run_sdpa_forward_extend(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_prefix_lens: torch.Tensor,
        extend_seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> torch.Tensor:
        count, longest = len(self._extends), max(self._extends, default=0)
        # Padding may at most double the work.
        uneven = count * longest > 2 * sum(self._extends)
        special = encoder_lens is not None or is_cross_attn or sliding_window_size is not None
        if special or uneven or not causal or count < 2 or batch_invariance_wanted():
            return super()._run_sdpa_forward_extend(
                query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens,
                extend_prefix_lens, extend_seq_lens, encoder_lens, scaling, enable_gqa, causal,
                is_cross_attn, sliding_window_size,
            )  # fmt: skip
        start = 0
        for part, (where, _) in enumerate(self._parts):
            extends = self._extends[where]
            tokens = sum(extends)
            rows, mask = self._plan(part, req_to_token, req_pool_indices, query.dtype)
            present = torch.arange(max(extends)) < torch.tensor(extends)[:, None]
            q = query.new_zeros(len(extends), max(extends), *query.shape[1:])
            q[present] = query[start : start + tokens]
            k, v = (_gather(cache, rows).to(q.dtype) for cache in (k_cache, v_cache))
            out = scaled_dot_product_attention(
                q.transpose(1, 2), k, v, attn_mask=mask, scale=scaling, enable_gqa=enable_gqa
            )
            output[start : start + tokens] = out.transpose(1, 2)[present]
            start += tokens
        return output


def _gather(cache: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``cache [slots, heads, size]`` at ``rows [n, L]`` -> ``[n, heads, L, size]``."""
    # index_select copies whole rows and is several times faster than cache[rows].
    return cache.index_select(0, rows.flatten()).unflatten(0, rows.shape).transpose(1, 2)


def activate() -> None:
    """Put ``BatchedAttention`` in the place of ``torch_native`` (SGLang treats that name specially elsewhere)."""
    register_attention_backend("torch_native")(BatchedAttention)
