"""Softmax statistics and gradients of tiles of logits, and how those of several tiles combine.

All in base 2 (log2 e is folded into the matmul): exp2 is several times as fast as exp on a CPU, and
native on a GPU. A tile holds y = logits log2 e of n rows in some columns of the vocabulary. Of each
row it leaves

    m = max y,   s = sum 2^(y - m),   u = sum (y - m) 2^(y - m)

and the target's y. Everything is relative to m: m + log2 s would lose the digits of a log-prob or
an entropy that is small beside the logits. Tiles of one rank, and then the shards of a tensor
parallel group, combine alike; with M the largest m,

    s = sum_k s_k 2^(m_k - M),      u = sum_k 2^(m_k - M) (u_k + (m_k - M) s_k)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

NO_COLUMNS = -1e30
"""Maximum of a shard of pure padding: finite, so that its weight 2^(m - M) is 0 and not NaN."""


@dataclass(frozen=True)
class RowGradients:
    """The gradient d of each row's loss, all [n]:

    d_j = 2^(y_j - top) (a + b (y_j - top)), ``b`` None for 0, and ``at_target`` at the target.
    """

    top: Tensor
    a: Tensor
    b: Tensor | None
    at_target: Tensor

    def __getitem__(self, rows: slice) -> RowGradients:
        b = None if self.b is None else self.b[rows]
        return RowGradients(self.top[rows], self.a[rows], b, self.at_target[rows])


class Tiles(Protocol):
    """The operations on a tile y [n, columns], contiguous, fp32 (or fp64).

    ``target`` [n] int64: the target's column in the tile, outside [0, columns) where it is elsewhere.
    """

    def statistics(self, y: Tensor, target: Tensor) -> Tensor:
        """(m, s, u, y_target), [4, n]; y_target is 0 where the target is elsewhere."""

    def gradient(self, y: Tensor, m: Tensor, target: Tensor, rows: RowGradients) -> Tensor:
        """d [n, columns] of a tile on which ``statistics`` found ``m``. Uses y up."""


class TorchTiles:
    """``Tiles`` in plain torch, on any device.

    ``elements``: of the largest tile. ``bound``: |y| < bound by a soft-cap, which bends the gradient
    by 1 - (y / bound)^2. ``exponentiate``: ``statistics`` leaves 2^(y - m) in the tile, bent, which
    is all of a gradient but a factor per row; else it leaves y, and ``gradient`` works on fresh
    logits, too, whatever ``m`` is.
    """

    def __init__(
        self,
        elements: int,
        dtype: torch.dtype,
        device: torch.device,
        bound: float | None,
        *,
        exponentiate: bool,
    ) -> None:
        # Allocated once: on a CPU a fresh tensor costs a page fault for every 4 kB.
        self._scratch = torch.empty(2, elements, dtype=dtype, device=device)
        self._bound, self._exponentiate = bound, exponentiate

    def statistics(self, y: Tensor, target: Tensor) -> Tensor:
        relative, e = (part[: y.numel()].view_as(y) for part in self._scratch.unbind())
        bend = self._bend(y) if self._exponentiate else None
        if self._exponentiate:
            e = y
        column, inside = _column(y, target)
        y_target = y.gather(1, column).squeeze(1).masked_fill_(~inside, 0.0)
        m = y.amax(1)
        torch.sub(y, m[:, None], out=relative)
        torch.exp2(relative, out=e)
        stats = torch.stack([m, e.sum(1), relative.mul_(e).sum(1), y_target])
        if bend is not None:
            y.mul_(bend)
        return stats

    def gradient(self, y: Tensor, m: Tensor, target: Tensor, rows: RowGradients) -> Tensor:
        if self._exponentiate:
            y.mul_((rows.a * (m - rows.top).exp2())[:, None])
        else:
            bend = self._bend(y)
            y.sub_(rows.top[:, None])
            if rows.b is None:
                y.exp2_().mul_(rows.a[:, None])
            else:
                e = torch.exp2(y, out=self._scratch[0, : y.numel()].view_as(y))
                y.mul_(rows.b[:, None]).add_(rows.a[:, None]).mul_(e)
            if bend is not None:
                y.mul_(bend)
        column, inside = _column(y, target)
        there = torch.where(inside, rows.at_target, y.gather(1, column).squeeze(1))
        return y.scatter_(1, column, there[:, None])

    def _bend(self, y: Tensor) -> Tensor | None:
        return None if self._bound is None else (y / self._bound).square_().neg_().add_(1.0)


def _column(y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The target's column [n, 1], forced into the tile, and whether it was there [n]."""
    columns = y.shape[1]
    return target.clamp(0, columns - 1)[:, None], (target >= 0) & (target < columns)


def combine(stats: Tensor) -> Tensor:
    """[parts, 4, n] to (m, s, u, y_target) of all columns, [4, n]."""
    m, s, u, y_target = stats.unbind(1)
    top = m.amax(0)
    shift = m - top
    weight = shift.exp2()
    s, u = (s * weight).sum(0), (weight * (u + shift * s)).sum(0)
    return torch.stack([top, s, u, y_target.sum(0)])
