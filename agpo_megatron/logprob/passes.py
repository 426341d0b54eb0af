"""The two ways through the head, without autograd: in one pass over the logits, or in two.

With y = logits log2 e of one row over the whole vocabulary, and its statistics m, s, u (tiles.py):

    p = 2^(y - m) / s,      logprob = ln 2 (y_target - m) - ln s,
    entropy = -sum p ln p = ln s - ln 2 u / s

With gradients g of the log-prob and h of the entropy:

    dL/dlogit_j = g (1[j = target] - p_j) - h p_j (ln p_j + entropy)
        = 2^(y_j - m) (a + b (y_j - m)),  a = -(g + b u) / s,  b = -h ln 2 / s,        j != target
        = -g expm1(logprob) - h p (logprob + entropy),                                 j  = target
"""

from __future__ import annotations

import importlib.util
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from agpo_megatron.logprob.projection import Gradients, Head, Shard, kept_buffer
from agpo_megatron.logprob.tiles import NO_COLUMNS, RowGradients, Tiles, TorchTiles, combine

TokenGradient = Callable[[Tensor, Tensor, slice], tuple[Tensor, Tensor | None]]
"""(logprob [n], entropy [n], their rows) to (g [n], h [n] or None)."""

LN_2 = math.log(2.0)
ONE_PASS_COLUMNS = 1984
"""Size of a tile. The rows of a tile are those of the buffer."""
TWO_PASS_ROWS, TWO_PASS_COLUMNS = 1024, 992
"""Size of a tile, which is all that two passes hold."""


def values(stats: Tensor) -> tuple[Tensor, Tensor]:
    """(logprob, entropy) of statistics [4, n], each [n]."""
    m, s, u, y_target = stats
    log_s = s.log()
    return LN_2 * (y_target - m) - log_s, log_s - LN_2 * u / s


def row_statistics(head: Head) -> Tensor:
    """(m, s, u, y_target) of every row over the whole vocabulary, [4, N]. One collective."""
    rows_of, columns_of, buffer, tiles = _two_pass_tiles(head)
    local = torch.empty(4, len(head.targets), dtype=head.dtype, device=head.targets.device)
    for rows in rows_of:
        local[:, rows] = _of_shard(
            head,
            rows,
            [
                tiles.statistics(head.logits(buffer, rows, c), head.target(rows, c))
                for c in columns_of
            ],
        )
    return _gather(local, head.shard.group)()


def two_pass_gradients(
    head: Head, stats: Tensor, g: Tensor, h: Tensor | None, gradients: Gradients
) -> None:
    """Add to ``gradients`` what follows from g, h [N]; the logits are computed again."""
    rule = _row_gradients(head.shard, stats, g, h)
    rows_of, columns_of, buffer, tiles = _two_pass_tiles(head)
    for rows in rows_of:
        gradients.add(
            rows,
            (
                (
                    c,
                    tiles.gradient(
                        head.logits(buffer, rows, c),
                        rule.top[rows],
                        head.target(rows, c),
                        rule[rows],
                    ),
                )
                for c in columns_of
            ),
        )


@dataclass(frozen=True)
class _Chunk:
    """Rows whose logits are in a buffer, in ``parts``: columns, tile, its maxima m. ``stats`` waits
    for their statistics over the whole vocabulary."""

    rows: slice
    parts: list[tuple[slice, Tensor, Tensor]]
    stats: Callable[[], Tensor]


def one_pass(
    head: Head, token_gradient: TokenGradient, gradients: Gradients, *, entropy_gradient: bool
) -> Tensor:
    """(logprob, entropy), [2, N]. Adds to ``gradients`` what follows from ``token_gradient``.

    Over a group two buffers take turns: while the statistics of one chunk are exchanged, the logits
    of the next are computed.
    """
    shard = head.shard
    turns = 1 if shard.group is None else 2
    rows_of = _blocks(len(head.targets), max(shard.chunk // turns, 1))
    columns_of = _blocks(shard.columns, ONE_PASS_COLUMNS)
    size = _length(rows_of) * shard.columns
    tiles = _tiles(head, _length(rows_of) * _length(columns_of), exponentiate=not entropy_gradient)
    result = torch.empty(2, len(head.targets), dtype=head.dtype, device=head.targets.device)

    def start(rows: slice, buffer: Tensor) -> _Chunk:
        parts, stats = [], []
        for c in columns_of:
            y = head.logits(buffer[(rows.stop - rows.start) * c.start :], rows, c)
            stats.append(tiles.statistics(y, head.target(rows, c)))
            parts.append((c, y, stats[-1][0]))
        return _Chunk(rows, parts, _gather(_of_shard(head, rows, stats), shard.group))

    def finish(chunk: _Chunk) -> None:
        rows, stats = chunk.rows, chunk.stats()
        logprob, entropy = values(stats)
        result[:, rows] = torch.stack([logprob, entropy])
        rule = _row_gradients(shard, stats, *token_gradient(logprob, entropy, rows))
        gradients.add(
            rows,
            ((c, tiles.gradient(y, m, head.target(rows, c), rule)) for c, y, m in chunk.parts),
        )

    waiting: deque[_Chunk] = deque()
    with kept_buffer(head, size * min(turns, len(rows_of))) as memory:
        for i, rows in enumerate(rows_of):
            waiting.append(start(rows, memory[size * (i % turns) :]))
            if len(waiting) == turns:
                finish(waiting.popleft())
        while waiting:
            finish(waiting.popleft())
    return result


def _row_gradients(shard: Shard, stats: Tensor, g: Tensor, h: Tensor | None) -> RowGradients:
    """The equations above, of dL/d(hidden . weight): over the temperature, bent by a soft-cap."""
    m, s, u, y_target = stats
    logprob, entropy = values(stats)
    g = g / shard.temperature
    a, b, at_target = -g / s, None, -g * logprob.expm1()
    if h is not None:
        h = h / shard.temperature
        b = -h * LN_2 / s
        a = a - b * u / s
        at_target = at_target - h * logprob.exp() * (logprob + entropy)
    if shard.bound is not None:
        at_target = at_target * (1.0 - (y_target / shard.bound).square())
    return RowGradients(m, a, b, at_target)


def _of_shard(head: Head, rows: slice, parts: list[Tensor]) -> Tensor:
    """Statistics [4, n] of this rank's columns, from those of its tiles."""
    if parts:
        stats = combine(torch.stack(parts))
    else:  # pure padding
        stats = torch.zeros(4, rows.stop - rows.start, dtype=head.dtype, device=head.targets.device)
        stats[0] = NO_COLUMNS
    targets = head.targets[rows]
    if targets.device.type != "cpu":  # where they were checked
        outside = (targets < 0) | (targets >= head.shard.vocab_size)
        stats[3].masked_fill_(outside, float("nan"))
    return stats


def _gather(local: Tensor, group: dist.ProcessGroup | None) -> Callable[[], Tensor]:
    """Start to exchange the statistics of the shards; the result waits for them, combined [4, n].

    A gather, not a reduction: every rank combines the same numbers in the same order, so that all
    get bit-identical results.
    """
    if group is None:
        return lambda: local
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    work = dist.all_gather(parts, local, group=group, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return combine(torch.stack(parts))

    return wait


def _two_pass_tiles(head: Head) -> tuple[list[slice], list[slice], Tensor, Tiles]:
    """(blocks of rows, blocks of columns, a buffer for one tile, what is done to it)."""
    rows_of = _blocks(len(head.targets), TWO_PASS_ROWS)
    columns_of = _blocks(head.shard.columns, TWO_PASS_COLUMNS)
    elements = _length(rows_of) * _length(columns_of)
    return rows_of, columns_of, head.buffer(elements), _tiles(head, elements, exponentiate=False)


def _blocks(n: int, most: int) -> list[slice]:
    """[0, n) in as few blocks of at most ``most`` as it takes, about as long as each other: whole
    multiples of 64 where that fits, since matmuls want aligned rows (a third of their time on a CPU).
    """
    count = max(-(-n // most), 1)
    size = max(min(most, -(-n // (count * 64)) * 64), 1)
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def _length(blocks: list[slice]) -> int:
    return max((block.stop - block.start for block in blocks), default=0)


def _tiles(head: Head, elements: int, *, exponentiate: bool) -> Tiles:
    kernels, bound, device = head.shard.kernels, head.shard.bound, head.hidden.device
    if kernels == "auto":
        triton = device.type == "cuda" and importlib.util.find_spec("triton") is not None
        kernels = "triton" if triton else "torch"
    if kernels == "triton":
        from agpo_megatron.logprob.triton_tiles import TritonTiles

        return TritonTiles(head.hidden.dtype, device, bound)
    return TorchTiles(elements, head.dtype, device, bound, exponentiate=exponentiate)
