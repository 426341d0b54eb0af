"""Packing of sequences into balanced micro-batches by their lengths. Pure and deterministic."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence


def plan_micro_batches(
    lengths: Sequence[int],
    *,
    data_parallel: int,
    token_budget: int,
    multiple_of: int = 1,
    hidden_size: int = 4096,
) -> list[list[list[int]]]:
    """Pack sequences into micro-batches: ``plan[dp_rank][micro_batch] = [sequence numbers]``.

    Every DP rank gets the same number of micro-batches, a multiple of ``multiple_of`` (the interleaved pipeline
    schedule wants multiples of PP); missing ones are empty and become weight-0 fillers. Sequences are assigned,
    most costly first, to the cheapest micro-batch with room in ``token_budget``; a sequence longer than the budget
    gets a micro-batch of its own. Cost of n tokens: n + n^2 / (6 h), linear layers plus attention.
    """

    def cost(n: int) -> float:
        return n + n * n / (6 * hidden_size)

    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    per_rank = max(1, -(-sum(lengths) // (token_budget * data_parallel)))
    while True:
        per_rank = -(-per_rank // multiple_of) * multiple_of
        bins = pack(order, lengths, cost, per_rank * data_parallel, token_budget)
        if bins is not None:
            break
        per_rank += max(1, per_rank // 50)
    # Heaviest first, dealt to the ranks back and forth, so that ranks and pipeline slots have similar costs.
    bins.sort(key=lambda b: (-sum(cost(lengths[i]) for i in b), b))
    plan: list[list[list[int]]] = [[] for _ in range(data_parallel)]
    for slot in range(per_rank):
        ranks = range(data_parallel) if slot % 2 == 0 else reversed(range(data_parallel))
        for offset, rank in enumerate(ranks):
            plan[rank].append(sorted(bins[slot * data_parallel + offset]))
    return plan


def pack(
    order: Sequence[int],
    lengths: Sequence[int],
    cost: Callable[[int], float],
    count: int,
    budget: int,
) -> list[list[int]] | None:
    """Pack into ``count`` bins, cheapest bin first; None if a sequence fits in no bin."""
    bins: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    by_cost = [(0.0, b) for b in range(count)]  # a heap: the least costly bin first
    for i in order:
        full = []
        while by_cost and bins[by_cost[0][1]] and tokens[by_cost[0][1]] + lengths[i] > budget:
            full.append(heapq.heappop(by_cost))
        if not by_cost:
            return None
        spent, best = by_cost[0]
        heapq.heapreplace(by_cost, (spent + cost(lengths[i]), best))
        bins[best].append(i)
        tokens[best] += lengths[i]
        for entry in full:
            heapq.heappush(by_cost, entry)
    return bins
