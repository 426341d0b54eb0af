"""LM head, log-prob and entropy as one differentiable function that never holds all logits.

Row chunk by row chunk the logits pass through one reused buffer and leave four numbers per row
behind; backward computes them again. For x = logits / temperature of one row, over the whole
vocabulary:

    m = max x,   s = sum exp(x - m),   u = sum (x - m) exp(x - m),   p = exp(x - m) / s
    logprob = (x_target - m) - log s,      entropy = -sum p log p = log s - u / s

Everything is relative to m: m + log s would lose the digits of a log-prob or an entropy that is
small beside the logits. A vocabulary shard has its own (m, s, u); with M the largest m they combine
as

    s = sum_r s_r e^(m_r - M),      u = sum_r e^(m_r - M) (u_r + (m_r - M) s_r)

With upstream gradients g (log-prob) and h (entropy):

    dL/dx_j = g (1[j = target] - p_j) - h p_j (log p_j + entropy)
            = g 1[j = target] - e^(x_j - m) / s (g + h (x_j - m - u / s))
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

_VOCAB_BLOCK = 8192
"""Columns treated at once beside the buffer: temporaries are [chunk, 8192] or [8192, H]."""
_NO_COLUMNS = -1e30
"""Maximum of a shard of pure padding: finite, so that its weight e^(m - M) is 0 and not NaN."""


@dataclass(frozen=True)
class LogProbs:
    """``logprob`` and ``entropy``: nats, [N], fp32 (fp64 for fp64 inputs), differentiable."""

    logprob: Tensor
    entropy: Tensor


def selected_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    temperature: float,
    chunk: int,
) -> LogProbs:
    """Log-prob of each row's target and entropy of each row's softmax(logits / temperature).

    ``hidden`` [N, H] bf16, fp16, fp32 or fp64: last hidden states of the N rows that matter, the
    same on every rank of ``group`` (gather them first under sequence parallelism). ``weight``
    [V_local, H], same dtype: this rank's rows [rank * V_local, (rank + 1) * V_local) of the LM
    head, padded at the end of the vocabulary. ``targets`` [N] int64: vocabulary ids, not
    shard-local ones. ``group``: tensor parallel group, None for a whole head. ``vocab_size``: real
    vocabulary; columns beyond it take no part in the values and get a gradient of exactly 0.
    ``chunk``: rows per buffer [chunk, V_local] (fp32; fp64 for fp64 inputs).

    Both results are the same on every rank. One collective in forward, an all_gather of [4, N]; it
    also takes place for N = 0. None in backward: THE GRADIENT OF ``hidden`` IS THIS SHARD'S PARTIAL
    SUM, which the caller's mapping must add up over ``group`` (Megatron's
    copy_to_tensor_model_parallel_region all-reduces it, its gather_from_sequence_parallel_region
    reduce-scatters it). The gradient of ``weight`` is complete for its rows, accumulated in fp32
    within a call and returned in the weight's dtype, as autograd demands: a bf16 head's gradient is
    rounded once per micro-batch before Megatron adds it to its fp32 main_grad. That is a known cost,
    until the loss is fused with the head and adds to main_grad itself. Matmuls of
    16-bit inputs accumulate, and keep logits, in fp32. Under ``torch.no_grad()`` nothing is kept.
    Backward runs once; there is no second derivative.

    Raises ValueError for shapes or dtypes that do not fit, a non-positive temperature or chunk, a
    head smaller than the vocabulary, and (CPU tensors; elsewhere the check would stall the device,
    and such a row gives NaN) a target outside the vocabulary.
    """
    rank, shards = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    _check(hidden, weight, targets, shards, vocab_size, temperature, chunk)
    first = rank * weight.shape[0]
    columns = min(max(vocab_size - first, 0), weight.shape[0])
    shard = _Shard(first, columns, vocab_size, float(temperature), chunk, group)
    logprob, entropy = _SelectedLogProbs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, shard
    )
    return LogProbs(logprob, entropy)


@dataclass(frozen=True)
class _Shard:
    """Where this rank's part of the vocabulary lies: real columns [first, first + columns)."""

    first: int
    columns: int
    vocab_size: int
    temperature: float
    chunk: int
    group: dist.ProcessGroup | None


class _SelectedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, shard: _Shard
    ) -> tuple[Tensor, Tensor]:
        local = _shard_statistics(hidden, weight[: shard.columns], targets, shard)
        m, s, u, x_target = _combine(_gather(local, shard.group))
        ctx.save_for_backward(hidden, weight, targets, m, s, u)
        ctx.shard = shard
        ctx.set_materialize_grads(False)
        return (x_target - m) - s.log(), s.log() - u / s

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, targets, m, s, u = ctx.saved_tensors
        shard: _Shard = ctx.shard
        head = weight[: shard.columns]
        d_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=m.dtype) if ctx.needs_input_grad[1] else None
        if grad_logprob is None:
            grad_logprob = torch.zeros_like(m)
        for rows, x in _logit_chunks(hidden, head, shard):
            _logits_to_gradient(
                x,
                targets[rows] - shard.first,
                (m[rows], s[rows], u[rows]),
                grad_logprob[rows] / shard.temperature,
                None if grad_entropy is None else grad_entropy[rows] / shard.temperature,
            )
            if d_hidden is not None:
                d_hidden[rows] = _rows_times_head(x, head)
            if d_weight is not None:
                _add_outer(d_weight, x, hidden[rows])
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None


def _shard_statistics(hidden: Tensor, head: Tensor, targets: Tensor, shard: _Shard) -> Tensor:
    """(m, s, u, x_target) of this shard's columns, [4, N]; x_target 0 where it owns no target."""
    stats = torch.zeros(4, hidden.shape[0], dtype=_wide(hidden.dtype), device=hidden.device)
    stats[0] = _NO_COLUMNS
    for rows, x in _logit_chunks(hidden, head, shard):
        local, owned = _localise(targets[rows] - shard.first, shard.columns)
        stats[3, rows] = x.gather(1, local[:, None]).squeeze(1).masked_fill_(~owned, 0.0)
        m = x.amax(dim=1)
        stats[0, rows] = m
        x.sub_(m[:, None])
        for block in torch.split(x, _VOCAB_BLOCK, dim=1):
            e = block.exp()
            stats[1, rows] += e.sum(dim=1)
            stats[2, rows] += e.mul_(block).sum(dim=1)
    if targets.device.type != "cpu":
        stats[3].masked_fill_((targets < 0) | (targets >= shard.vocab_size), float("nan"))
    return stats


def _gather(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The statistics of all shards in rank order, [shards, 4, N].

    A gather, not a reduction: every rank combines the same numbers in the same order, so that all
    get bit-identical results.
    """
    if group is None:
        return local[None]
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, local, group=group)
    return torch.stack(parts)


def _combine(stats: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[shards, 4, N] to (m, s, u, x_target) of the whole vocabulary, each [N]."""
    m, s, u, x_target = stats.unbind(dim=1)
    top = m.amax(dim=0)
    shift = m - top
    scale = shift.exp()
    u = scale * (u + shift * s)
    return top, (s * scale).sum(dim=0), u.sum(dim=0), x_target.sum(dim=0)


def _logit_chunks(hidden: Tensor, head: Tensor, shard: _Shard) -> Iterator[tuple[slice, Tensor]]:
    """Each row chunk with its x = logits / temperature, [rows, columns].

    One buffer serves all: the next chunk overwrites it. A shard of pure padding yields nothing.
    """
    n, columns = hidden.shape[0], head.shape[0]
    if columns == 0:
        return
    dtype = _wide(hidden.dtype)
    buffer = torch.empty(min(shard.chunk, n), columns, dtype=dtype, device=hidden.device)
    for start in range(0, n, shard.chunk):
        rows = slice(start, min(start + shard.chunk, n))
        x = buffer[: rows.stop - rows.start]
        _matmul(x, hidden[rows], head)
        if shard.temperature != 1.0:
            x.div_(shard.temperature)
        yield rows, x


def _logits_to_gradient(
    x: Tensor, local: Tensor, stats: tuple[Tensor, Tensor, Tensor], g: Tensor, h: Tensor | None
) -> None:
    """Turn x [rows, columns] into dL/dlogits in place; ``g``, ``h`` come divided by temperature."""
    m, s, u = stats
    x.sub_(m[:, None])
    if h is None:
        x.exp_().mul_((-g / s)[:, None])
    else:
        for block in torch.split(x, _VOCAB_BLOCK, dim=1):
            e = block.exp()
            block.sub_((u / s)[:, None]).mul_((-h / s)[:, None]).add_((-g / s)[:, None]).mul_(e)
    local, owned = _localise(local, x.shape[1])
    x.scatter_add_(1, local[:, None], (g * owned)[:, None])


def _localise(local: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Shard-local target ids forced into range, and whether the shard owns them."""
    return local.clamp(0, columns - 1), (local >= 0) & (local < columns)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Dtype of logits and of sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _matmul(out: Tensor, rows: Tensor, head: Tensor) -> None:
    """out = rows @ head.T, wide: 16-bit inputs are never rounded to 16-bit logits."""
    if rows.dtype == out.dtype:
        torch.mm(rows, head.T, out=out)
    elif _has_wide_output(out.device):
        torch.mm(rows, head.T, out_dtype=out.dtype, out=out)
    else:
        wide_rows = rows.to(out.dtype)
        for part, block in zip(
            torch.split(out, _VOCAB_BLOCK, dim=1), torch.split(head, _VOCAB_BLOCK), strict=True
        ):
            torch.mm(wide_rows, block.to(out.dtype).T, out=part)


def _rows_times_head(d: Tensor, head: Tensor) -> Tensor:
    """d @ head, [n, H] wide."""
    if head.dtype == d.dtype:
        return d @ head
    total = torch.zeros(d.shape[0], head.shape[1], dtype=d.dtype, device=d.device)
    for part, block in zip(
        torch.split(d, _VOCAB_BLOCK, dim=1), torch.split(head, _VOCAB_BLOCK), strict=True
    ):
        if _has_wide_output(d.device):
            total += torch.mm(part.to(head.dtype), block, out_dtype=d.dtype)
        else:
            total.addmm_(part, block.to(d.dtype))
    return total


def _add_outer(total: Tensor, d: Tensor, rows: Tensor) -> None:
    """total[:columns] += d.T @ rows.  ``total`` [V_local, H] wide."""
    head_part = total[: d.shape[1]]
    if rows.dtype == d.dtype:
        head_part.addmm_(d.T, rows)
        return
    for part, block in zip(
        torch.split(d, _VOCAB_BLOCK, dim=1), torch.split(head_part, _VOCAB_BLOCK), strict=True
    ):
        if _has_wide_output(d.device):
            block += torch.mm(part.to(rows.dtype).T, rows, out_dtype=d.dtype)
        else:
            block.addmm_(part.T, rows.to(d.dtype))


def _has_wide_output(device: torch.device) -> bool:
    """Whether mm can take 16-bit inputs and write fp32: CUDA, torch 2.8 and later."""
    return device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype_out")


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shards: int,
    vocab_size: int,
    temperature: float,
    chunk: int,
) -> None:
    """Refuse what cannot be right, naming it."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "selected_logprobs needs hidden [N, H] and weight [V_local, H], "
            f"not {list(hidden.shape)} and {list(weight.shape)}"
        )
    if hidden.dtype != weight.dtype or not hidden.dtype.is_floating_point:
        raise ValueError(
            f"hidden is {hidden.dtype} but weight is {weight.dtype}; cast one of them first"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets must be int64 of shape [{hidden.shape[0]}], one per row of hidden, "
            f"not {targets.dtype} of {list(targets.shape)}"
        )
    if not temperature > 0 or chunk < 1:
        raise ValueError(f"temperature {temperature} and chunk {chunk} must be positive")
    if not 0 < vocab_size <= shards * weight.shape[0]:
        raise ValueError(
            f"the LM head has {shards} shards x {weight.shape[0]} rows = "
            f"{shards * weight.shape[0]}, fewer than the vocabulary of {vocab_size}; "
            "pad the head up to a multiple of the tensor parallel size"
        )
    if targets.device.type == "cpu" and targets.numel():
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"target id {low if low < 0 else high} lies outside the vocabulary of "
                f"{vocab_size}; do tokenizer and checkpoint belong together?"
            )
