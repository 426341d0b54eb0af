"""The rows that matter, out of a tensor parallel rank's hidden states, before anything is done to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def select_rows(
    hidden: Tensor, rows: Tensor, *, group: dist.ProcessGroup | None, sequence_parallel: bool
) -> Tensor:
    """``hidden[rows]``, [N, H], the same on all ranks of ``group``.

    ``hidden`` [T, H], or with ``sequence_parallel`` [T / shards, H], the positions
    [rank * T / shards, (rank + 1) * T / shards). ``rows`` [N] int64, increasing, positions in
    [0, T), on the host: sizes are known without asking the device. ``group``: tensor parallel group;
    None for one rank.

    Backward adds up the gradients of all ranks, each of them a partial sum. Collectives: with
    ``sequence_parallel`` an all_gather of the selected rows and a reduce_scatter of their
    gradients, both padded to the rank with the most; without, an all_reduce of the gradients. They
    take place for N = 0, too.
    """
    if group is None:
        return hidden.index_select(0, rows.to(hidden.device, non_blocking=True))
    if not sequence_parallel:
        chosen = hidden.index_select(0, rows.to(hidden.device, non_blocking=True))
        return _SumGradients.apply(chosen, group)  # type: ignore[no-untyped-call, no-any-return]
    plan = _plan(hidden.shape[0], rows, hidden.device, group)
    return _GatherRows.apply(hidden, plan, group)  # type: ignore[no-untyped-call, no-any-return]


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


@dataclass(frozen=True)
class _Plan:
    """``mine`` [n]: this rank's rows, local positions. ``slots`` [N]: where each row arrives when
    every rank sends ``widest`` of them."""

    mine: Tensor
    slots: Tensor
    widest: int


def _plan(local: int, rows: Tensor, device: torch.device, group: dist.ProcessGroup) -> _Plan:
    rank, shards = dist.get_rank(group), dist.get_world_size(group)
    owner = rows.div(local, rounding_mode="floor")
    counts = owner.bincount(minlength=shards)
    widest = max(int(counts.max()), 1)
    before = counts.cumsum(0) - counts
    slots = torch.arange(len(rows)) - before[owner] + owner * widest
    mine = rows[owner == rank] - rank * local
    return _Plan(mine.to(device, non_blocking=True), slots.to(device, non_blocking=True), widest)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, plan: _Plan, group: dist.ProcessGroup) -> Tensor:
        ctx.plan, ctx.group, ctx.local = plan, group, hidden.shape[0]
        sent = hidden.new_zeros(plan.widest, hidden.shape[1])
        sent[: len(plan.mine)] = hidden[plan.mine]
        every = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, sent, group=group)
        return torch.cat(every).index_select(0, plan.slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        plan: _Plan = ctx.plan
        shards, width = dist.get_world_size(ctx.group), gradient.shape[1]
        sent = gradient.new_zeros(shards * plan.widest, width)
        sent[plan.slots] = gradient
        sums = gradient.new_empty(plan.widest, width)
        dist.reduce_scatter(sums, list(sent.chunk(shards)), group=ctx.group)
        d_hidden = gradient.new_zeros(ctx.local, width)
        d_hidden[plan.mine] = sums[: len(plan.mine)]
        return d_hidden, None, None
