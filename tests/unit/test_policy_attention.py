"""Attention over a pack equals attention over each sequence alone, forward and backward."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from agpo_megatron.policy import backend

backend.activate("cpu")
from agpo_megatron.policy.attention import (  # noqa: E402
    PackedAttention,
    PackedSequences,
    buckets_of,
)
from agpo_megatron.policy.context import Share  # noqa: E402

pytestmark = pytest.mark.processes

HEADS, GROUPS, DIM = 4, 2, 8


def packed_alone(positions: torch.Tensor, lengths: list[int]) -> PackedSequences:
    """A pack that one rank holds whole."""
    nothing = positions[:0]
    return PackedSequences.of(Share(positions, positions, nothing, nothing), lengths)


def alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Plain causal attention of one sequence, fp64: q [n, heads, d], k and v [n, groups, d]."""
    k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(DIM)
    scores = scores.masked_fill(torch.ones(len(q), len(q), dtype=torch.bool).triu(1), -math.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)


@pytest.mark.parametrize(
    "lengths",
    [[1], [16], [7, 7, 7], [9, 5, 5, 2, 1], [50, 24, 3, 3, 2, 1, 1], [40, 39, 38, 4, 60 % 11]],
)
def test_each_sequence_as_if_alone(lengths: list[int]) -> None:
    total = sum(lengths)
    generator = torch.Generator().manual_seed(total)
    shapes = ((HEADS, DIM), (GROUPS, DIM), (GROUPS, DIM))
    leaves = [
        torch.randn(total, 1, *s, generator=generator, dtype=torch.float64).requires_grad_()
        for s in shapes
    ]
    core = PackedAttention(SimpleNamespace(kv_channels=DIM))  # type: ignore[arg-type]
    positions = torch.cat([torch.arange(n) for n in lengths])
    packed = core(*leaves, packed_seq_params=packed_alone(positions, lengths))
    assert packed.shape == (total, 1, HEADS * DIM)
    upstream = torch.randn(packed.shape, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad(packed, leaves, upstream)

    parts = [x.squeeze(1).split(lengths) for x in leaves]
    expected = torch.cat([alone(*qkv) for qkv in zip(*parts, strict=True)])[:, None]
    assert torch.allclose(packed, expected, atol=1e-12)
    for mine, wanted in zip(found, torch.autograd.grad(expected, leaves, upstream), strict=True):
        assert torch.allclose(mine, wanted, atol=1e-12)


def test_padding_never_more_than_doubles() -> None:
    lengths = [100, 90, 50, 49, 30, 24, 12, 1, 1]
    buckets = buckets_of(lengths, torch.device("cpu"))
    assert [b.count for b in buckets] == [3, 2, 2, 2]
    assert sum(b.tokens for b in buckets) == sum(lengths)
    assert all(b.count * b.longest <= 2 * b.tokens for b in buckets)
    assert buckets[3].slots is None, "equal lengths need no padding"


def test_nothing_is_left_on_the_host() -> None:
    """On the meta device, as on a GPU, an index on the CPU would not do."""
    lengths = [9, 5, 5, 2, 1]
    query, key = (torch.empty(22, 1, n, DIM, device="meta") for n in (HEADS, GROUPS))
    packed = packed_alone(torch.arange(22, device="meta"), lengths)
    assert {b.slots.device.type for b in packed.buckets if b.slots is not None} == {"meta"}
    core = PackedAttention(SimpleNamespace(kv_channels=DIM))  # type: ignore[arg-type]
    assert core(query, key, key, packed_seq_params=packed).shape == (22, 1, HEADS * DIM)
