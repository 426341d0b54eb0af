"""Context parallelism: the tokens of a pack on this rank, and its exchange with the other ranks.

Each sequence is cut into 2 CP equal chunks; rank r holds chunks r and 2 CP - 1 - r of every sequence, so that causal
attention costs all ranks the same (the order that Transformer Engine expects of packed sequences). Rows are selected
before the cut: the row of position t goes to the rank that holds t, with its target t + 1, across any border.

A token's log-prob is computed by its rank alone and then gathered, so that every rank has the loss of the whole pack,
with the terms over whole sequences. Its gradient reaches only the rank's own rows; summing parameter gradients over CP
then counts each row once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from agpo_megatron.algorithm.loss_rows import LossRows
from agpo_megatron.policy.packing import PackedBatch


def zigzag(length: int, ranks: int, rank: int) -> Tensor:
    """Return the positions [length / ranks] on ``rank`` of ``length`` tokens, a multiple of 2 ``ranks``."""
    chunk = length // (2 * ranks)
    within = torch.arange(chunk)
    return torch.cat([rank * chunk + within, (2 * ranks - 1 - rank) * chunk + within])


def held_tokens(lengths: Sequence[int], ranks: int, rank: int) -> Tensor:
    """Return the indices [T / ranks] of the tokens on ``rank`` in a pack of sequences of ``lengths``, in its order."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    parts = [start + zigzag(n, ranks, rank) for start, n in zip(starts, lengths, strict=True)]
    return torch.cat(parts)


@dataclass(frozen=True)
class Share:
    """This rank's part of a pack of T tokens and N rows; all of it without context parallelism.

    ``tokens``, ``positions`` [T / CP] int64: positions in their sequences. ``rows`` [n] int64, on the host: indices
    into ``tokens``; ``targets`` [n] int64: the tokens they predict. ``exchange``: None without context parallelism.
    """

    tokens: Tensor
    positions: Tensor
    rows: Tensor
    targets: Tensor
    exchange: Exchange | None = None

    def own(self, rows: LossRows) -> LossRows:
        """Select this rank's rows."""
        return rows if self.exchange is None else rows.part(self.exchange.own_rows)

    def whole(self, logprob: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        """Gather log-prob and entropy of this rank's rows, [n], to those of the whole pack, [N], differentiable."""
        if self.exchange is None:
            return logprob, entropy
        both: tuple[Tensor, Tensor] = _GatherRows.apply(logprob, entropy, self.exchange)
        return both


@dataclass(frozen=True)
class Exchange:
    """The exchange between the ranks of ``group``. ``token_order`` [T]: index of each token of the pack in the
    concatenation over ranks; ``own_tokens`` [T / CP]: indices of this rank's tokens in the pack. ``counts``: rows of
    each rank; ``row_order`` [N], ``own_rows`` [n]: the same for rows, which are padded to the largest count."""

    group: dist.ProcessGroup
    token_order: Tensor
    own_tokens: Tensor
    counts: tuple[int, ...]
    row_order: Tensor
    own_rows: Tensor


def share_of(batch: PackedBatch, group: dist.ProcessGroup) -> Share:
    """Return the part of ``batch`` (on the model's device) for this rank of the context-parallel ``group``."""
    ranks, rank = group.size(), group.rank()
    if ranks == 1:
        return Share(batch.tokens, batch.positions, batch.rows, batch.targets)
    held = torch.stack([held_tokens(batch.lengths, ranks, r) for r in range(ranks)])
    token_order = _inverse(held.flatten())
    of_rows = token_order[batch.rows]
    holder, place = of_rows // held.shape[1], of_rows % held.shape[1]
    mine = [(holder == r).nonzero()[:, 0] for r in range(ranks)]
    counts = tuple(len(m) for m in mine)
    row_order = torch.empty(len(of_rows), dtype=torch.int64)
    for r, indices in enumerate(mine):
        row_order[indices] = r * max(counts) + torch.arange(len(indices))
    device = batch.tokens.device

    def there(x: Tensor) -> Tensor:
        return x.to(device, non_blocking=True)

    own_tokens, own_rows = there(held[rank]), there(mine[rank])
    return Share(
        tokens=batch.tokens[own_tokens],
        positions=batch.positions[own_tokens],
        rows=place[mine[rank]],
        targets=batch.targets[own_rows],
        exchange=Exchange(
            group, there(token_order), own_tokens, counts, there(row_order), own_rows
        ),
    )


def all_keys(keys: Tensor, exchange: Exchange) -> Tensor:
    """Gather ``keys`` [T / CP, ...] of this rank's tokens to [T, ...] of the pack's, in its order. Backward sums the
    gradients of this rank's keys over the ranks."""
    whole: Tensor = _GatherTokens.apply(
        keys, exchange.token_order, exchange.own_tokens, exchange.group
    )
    return whole


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, order: Tensor, own: Tensor, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.save_for_backward(own)
        ctx.group = group
        gathered = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
        return gathered.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (own,) = ctx.saved_tensors
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad.index_select(0, own), None, None, None


class _GatherRows(torch.autograd.Function):
    """Backward takes this rank's rows and communicates nothing: all ranks have the same loss, which counts once."""

    @staticmethod
    def forward(
        ctx: Any, logprob: Tensor, entropy: Tensor, exchange: Exchange
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(exchange.own_rows)
        ctx.set_materialize_grads(False)
        longest, ranks = max(exchange.counts), len(exchange.counts)
        padded = logprob.new_zeros(longest, 2)
        padded[: len(logprob)] = torch.stack((logprob, entropy), 1)
        gathered = logprob.new_empty(ranks * longest, 2)
        dist.all_gather_into_tensor(gathered, padded, group=exchange.group)
        return gathered.index_select(0, exchange.row_order).unbind(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (own,) = ctx.saved_tensors
        return (*(None if g is None else g.index_select(0, own) for g in grads), None)


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    return inverse
