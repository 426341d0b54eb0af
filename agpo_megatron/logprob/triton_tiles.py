"""``Tiles`` as two Triton kernels, for CUDA. They compile; NOT YET EXECUTED ON A GPU.

The same numbers as ``TorchTiles`` (tiles.py has the definitions), one program per row. What is tested
without a GPU: their results in Triton's interpreter, and that they compile for sm_80, sm_90 and sm_100.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from agpo_megatron.logprob.tiles import NO_COLUMNS, RowGradients

BLOCK = 4096
WARPS = 8
INTERPRETED: bool = triton.knobs.runtime.interpret
_LOWEST = tl.constexpr(NO_COLUMNS)
"""Value of lanes without a column. Finite: its weight 2^(y - m) is 0, and so is (y - m) 2^(y - m)."""


@triton.jit  # type: ignore[untyped-decorator]
def statistics_kernel(
    y_ptr: tl.tensor,
    target_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """stats [4, rows] of y [rows, columns]: online, over blocks of columns."""
    row = tl.program_id(0)
    y_ptr += row.to(tl.int64) * columns
    m = tl.full((), _LOWEST, tl.float32)
    s = tl.zeros((), tl.float32)
    u = tl.zeros((), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        y = tl.load(y_ptr + column, column < columns, _LOWEST)
        top = tl.maximum(m, tl.max(y, 0))
        shift, relative = m - top, y - top
        weight, e = tl.exp2(shift), tl.exp2(relative)
        u = weight * (u + shift * s) + tl.sum(e * relative, 0)
        s = weight * s + tl.sum(e, 0)
        m = top
    target = tl.load(target_ptr + row)
    inside = (target >= 0) & (target < columns)
    tl.store(stats_ptr + row, m)
    tl.store(stats_ptr + rows + row, s)
    tl.store(stats_ptr + 2 * rows + row, u)
    tl.store(stats_ptr + 3 * rows + row, tl.load(y_ptr + target, inside, 0.0))


@triton.jit  # type: ignore[untyped-decorator]
def gradient_kernel(
    y_ptr: tl.tensor,
    d_ptr: tl.tensor,
    target_ptr: tl.tensor,
    top_ptr: tl.tensor,
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    at_target_ptr: tl.tensor,
    columns: tl.tensor,
    bound: tl.tensor,
    HAS_B: tl.constexpr,
    HAS_BOUND: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """d = 2^(y - top) (a + b (y - top)), bent by the soft-cap; ``at_target`` at the target."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = row.to(tl.int64) * columns
    y = tl.load(y_ptr + first + column, column < columns, 0.0)
    relative = y - tl.load(top_ptr + row)
    factor = tl.load(a_ptr + row)
    if HAS_B:
        factor += tl.load(b_ptr + row) * relative
    d = tl.exp2(relative) * factor
    if HAS_BOUND:
        d *= 1.0 - (y / bound) * (y / bound)
    d = tl.where(column == tl.load(target_ptr + row), tl.load(at_target_ptr + row), d)
    tl.store(d_ptr + first + column, d.to(d_ptr.dtype.element_ty), column < columns)


class TritonTiles:
    """``dtype``: of the gradient, that of the matmul's other operand. ``bound``: see ``TorchTiles``."""

    def __init__(self, dtype: torch.dtype, device: torch.device, bound: float | None) -> None:
        if device.type != "cuda" and not INTERPRETED:
            raise RuntimeError(
                f"Triton kernels do not run on {device.type}; "
                "let the kernels be auto or torch there (tests set TRITON_INTERPRET=1)"
            )
        self._dtype, self._bound = dtype, bound

    def statistics(self, y: Tensor, target: Tensor) -> Tensor:
        rows, columns = y.shape
        stats = torch.empty(4, rows, dtype=torch.float32, device=y.device)
        if rows:
            statistics_kernel[(rows,)](
                y, target, stats, rows, columns, BLOCK=BLOCK, num_warps=WARPS
            )
        return stats

    def gradient(self, y: Tensor, m: Tensor, target: Tensor, rows: RowGradients) -> Tensor:
        d = torch.empty(y.shape, dtype=self._dtype, device=y.device)
        count, columns = y.shape
        gradient_kernel[(count, triton.cdiv(columns, BLOCK))](
            y,
            d,
            target,
            rows.top,
            rows.a,
            rows.top if rows.b is None else rows.b,
            rows.at_target,
            columns,
            self._bound or 1.0,
            HAS_B=rows.b is not None,
            HAS_BOUND=self._bound is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
        return d
