"""``pytorch/attention/rope.py``."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    tensor_format: str = "sbhd",
    start_positions: Tensor | None = None,
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> Tensor:
    """``t`` [T, heads, d]; angles restart with each sequence between two ``cu_seqlens``."""
    assert tensor_format == "thd" and fused and cu_seqlens is not None and cp_size == 1
    ends = cu_seqlens.tolist()
    angles = torch.cat([freqs[: b - a] for a, b in itertools.pairwise(ends)]).squeeze(1)
    left, right = t.chunk(2, dim=-1)
    turned = torch.cat((-right, left), dim=-1)
    return (t * angles.cos() + turned * angles.sin()).to(t.dtype)
