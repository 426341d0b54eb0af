"""The LM head of one rank: tiles of its logits, and the gradients that come back. Without autograd."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

Kernels = Literal["auto", "torch", "triton"]


@dataclass(frozen=True)
class Shard:
    """Which columns of the vocabulary a rank has, and what the projection onto them means.

    logits = softcap tanh(hidden . weight / softcap) / temperature; no tanh without a softcap.

    ``first``, ``columns``: the vocabulary's [first, first + columns), in the first ``columns`` rows
    of the rank's weight; the rest is padding. ``chunk``: rows of logits that one pass may hold.
    """

    group: dist.ProcessGroup | None
    vocab_size: int
    first: int
    columns: int
    temperature: float
    softcap: float | None
    chunk: int
    kernels: Kernels

    @property
    def scale(self) -> float:
        """log2 e / temperature: the matmul gives logits in base 2 (tiles.py)."""
        return 1.0 / (self.temperature * math.log(2.0))

    @property
    def bound(self) -> float | None:
        """No logit, in base 2, is larger."""
        return None if self.softcap is None else self.softcap * self.scale


@dataclass(frozen=True)
class Head:
    """``hidden`` [N, H], ``weight`` [V_local, H], ``targets`` [N] int64 in the whole vocabulary."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    shard: Shard

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of logits and of sums: fp32 (fp64 for fp64 inputs)."""
        wide: torch.dtype = torch.promote_types(self.hidden.dtype, torch.float32)
        return wide

    def buffer(self, elements: int) -> Tensor:
        """Memory for logits."""
        return torch.empty(elements, dtype=self.dtype, device=self.hidden.device)

    def logits(self, buffer: Tensor, rows: slice, columns: slice) -> Tensor:
        """logits log2 e [rows, columns], contiguous, at the head of the flat ``buffer``."""
        n, width = rows.stop - rows.start, columns.stop - columns.start
        y = buffer[: n * width].view(n, width)
        _matmul(y, self.hidden[rows], self.weight[columns].T, scale=self.shard.scale)
        if self.shard.bound is not None:
            y.div_(self.shard.bound).tanh_().mul_(self.shard.bound)
        return y

    def target(self, rows: slice, columns: slice) -> Tensor:
        """Targets as columns of a tile; outside of it where they are elsewhere."""
        local: Tensor = self.targets[rows] - (self.shard.first + columns.start)
        return local


_kept: dict[torch.dtype, Tensor] = {}


@contextmanager
def kept_buffer(head: Head, elements: int) -> Iterator[Tensor]:
    """``head.buffer``, on a CPU kept for the next call: its page faults would cost more than the
    softmax. Other devices have allocators that keep memory."""
    if head.hidden.device.type != "cpu":
        yield head.buffer(elements)
        return
    memory = _kept.pop(head.dtype, None)
    if memory is None or len(memory) < elements:
        memory = None  # freed before the larger one is there
        memory = head.buffer(elements)
    try:
        yield memory
    finally:
        _kept[head.dtype] = memory


class Gradients:
    """Sums of the gradients of ``hidden`` and ``weight``, as far as they are ``wanted``.

    dW is summed in fp32: in Megatron's ``weight.main_grad`` where there is one. Autograd then gets
    a stand-in, and Megatron's hooks learn from ``grad_added_to_main_grad`` to leave it alone.
    """

    def __init__(self, head: Head, wanted: tuple[bool, bool]) -> None:
        self._head = head
        self.hidden = torch.zeros_like(head.hidden) if wanted[0] else None
        main_grad = getattr(head.weight, "main_grad", None)
        self._in_place = main_grad is not None and main_grad.dtype == head.dtype
        self._weight: Tensor | None = None
        if wanted[1] and self._in_place:
            self._weight = main_grad
        elif wanted[1]:
            self._weight = torch.zeros_like(head.weight, dtype=head.dtype)

    def add(self, rows: slice, tiles: Iterable[tuple[slice, Tensor]]) -> None:
        """Add the contribution of ``rows``; ``tiles``: columns and dL/d(hidden . weight) of them."""
        head = self._head
        shape = (rows.stop - rows.start, head.hidden.shape[1])
        total = torch.zeros(shape, dtype=head.dtype, device=head.hidden.device)
        for columns, d in tiles:
            if self.hidden is not None:
                _matmul(total, d, head.weight[columns], add=True)
            if self._weight is not None:
                _matmul(self._weight[columns], d.T, head.hidden[rows], add=True)
        if self.hidden is not None:
            self.hidden[rows] = total

    def weight(self) -> Tensor | None:
        """Return the weight's gradient as autograd gets it."""
        weight = self._head.weight
        if self._weight is None:
            return None
        if self._in_place:
            weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
            # Megatron's mark of a tied weight: the embedding's gradient will be added to this one.
            tied = getattr(weight, "zero_out_wgrad", False)
            return torch.zeros_like(weight) if tied else torch.empty_like(weight)
        return self._weight.to(weight.dtype)


def _matmul(out: Tensor, a: Tensor, b: Tensor, *, scale: float = 1.0, add: bool = False) -> None:
    """out = scale a @ b, or with ``add`` out += a @ b; ``out`` is wide.

    Products of 16-bit operands are never rounded to 16 bits. Where the device multiplies 16-bit
    operands into fp32, a wide operand beside a 16-bit one (a gradient) is rounded to it.
    """
    narrow = a.dtype if a.dtype != out.dtype else b.dtype
    if narrow == out.dtype or not (out.is_cuda and hasattr(torch.ops.aten.mm, "dtype_out")):
        out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=1.0 if add else 0.0, alpha=scale)
        return
    # torch 2.8 and later; not yet executed on a GPU
    a, b = a.to(narrow), b.to(narrow)
    if add:
        out.add_(torch.mm(a, b, out_dtype=out.dtype))
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
        out.mul_(scale)
