"""From finished groups to a step record, and from a step record to micro-batches. Pure and deterministic."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from agpo_megatron.algorithm.adaptive_loss import length_advantage_covariance
from agpo_megatron.algorithm.advantage import group_advantages, is_zero_variance
from agpo_megatron.algorithm.aggregation import token_weights
from agpo_megatron.algorithm.length_reward import agpo_length_bonus
from agpo_megatron.config.schema import AlgorithmConfig, RewardConfig
from agpo_megatron.journal.records import StepRecord, StepRow
from agpo_megatron.journal.writer import JournaledGroup
from agpo_megatron.types import Group, Sample, WeightVersion


@dataclass(frozen=True)
class ScoredGroup:
    """What the algorithm says of one group; lists are in sample order."""

    rewards: list[float]
    bonuses: list[float]
    advantages: list[float]
    zero_variance: bool


def score_group(group: Group, algorithm: AlgorithmConfig, reward: RewardConfig) -> ScoredGroup:
    """Raw reward, length bonus and advantage of every sample of a group."""
    correct = [sample.accuracy > 0.5 for sample in group.samples]
    raw = [reward.correct if c else reward.wrong for c in correct]
    lengths = [len(sample.response_tokens) for sample in group.samples]
    bonuses = [0.0] * len(raw)
    if algorithm.length_reward.kind == "agpo":
        bonuses = agpo_length_bonus(correct, lengths, algorithm.length_reward.weight)
    shaped = [r + b for r, b in zip(raw, bonuses, strict=True)]
    advantage = algorithm.advantage
    advantages = group_advantages(
        raw,
        shaped,
        zero_variance=advantage.zero_variance,
        tol=advantage.zero_variance_tol,
        std_eps=advantage.std_eps,
        r_max=reward.correct,
        r_min=reward.wrong,
    )
    return ScoredGroup(
        shaped, bonuses, advantages, is_zero_variance(raw, advantage.zero_variance_tol)
    )


def build_step(
    journaled: Sequence[JournaledGroup],
    *,
    step: int,
    attempt: int,
    cursor: int,
    version: WeightVersion,
    algorithm: AlgorithmConfig,
    reward: RewardConfig,
) -> StepRecord:
    """Rewards, advantages and loss weights of one optimizer step, from all its groups at once (design, idea 1).

    Every sample gets a row, also one without weight, so that the record tells the whole step.
    """
    scored = [score_group(j.group, algorithm, reward) for j in journaled]
    samples = [sample for j in journaled for sample in j.group.samples]
    kept = [
        not (algorithm.loss.mask.zero_variance and s.zero_variance)
        for s in scored
        for _ in s.rewards
    ]
    weights = token_weights(
        [sample.loss_mask for sample in samples],
        kept,
        algorithm.loss.aggregation,
        norm_length=algorithm.loss.norm_length,
    )
    refs = [ref for j in journaled for ref in j.refs]
    rewards = [r for s in scored for r in s.rewards]
    advantages = [a for s in scored for a in s.advantages]
    rows = [
        StepRow(
            sample_id=sample.sample_id,
            ref=refs[i],
            tokens=len(sample.prompt_tokens) + len(sample.response_tokens),
            reward=rewards[i],
            advantage=advantages[i],
            # A = 0 gives no gradient: without weight the sequence is not packed either.
            loss_weights=weights[i] if advantages[i] != 0.0 else [0.0] * len(weights[i]),
        )
        for i, sample in enumerate(samples)
    ]
    return StepRecord(
        step=step,
        attempt=attempt,
        cursor=cursor,
        weight_version=str(version),
        segments={ref.segment: j.digest for j in journaled for ref in j.refs},
        rows=rows,
        metrics=step_metrics(journaled, scored, rows, kept, step - 1),
    )


def step_metrics(
    journaled: Sequence[JournaledGroup],
    scored: Sequence[ScoredGroup],
    rows: Sequence[StepRow],
    kept: Sequence[bool],
    current_step: int,
) -> dict[str, float]:
    """Everything about a step that is known before training on it."""
    samples = [sample for j in journaled for sample in j.group.samples]
    lengths = [len(sample.response_tokens) for sample in samples]
    correct_lengths = [
        n for n, sample in zip(lengths, samples, strict=True) if sample.accuracy > 0.5
    ]
    accuracies = [[sample.accuracy > 0.5 for sample in j.group.samples] for j in journaled]
    kept_tokens = sum(sum(s.loss_mask) for s, k in zip(samples, kept, strict=True) if k)
    group_size = len(scored[0].rewards)
    metrics = {
        "reward/mean": fmean(row.reward for row in rows),
        "reward/accuracy": fmean(sample.accuracy for sample in samples),
        "reward/length": fmean(b for s in scored for b in s.bonuses),
        "response/tokens_mean": fmean(lengths),
        "response/truncated_frac": fmean(sample.truncated for sample in samples),
        "group/zero_variance_frac": fmean(s.zero_variance for s in scored),
        "group/all_correct_frac": fmean(all(a) for a in accuracies),
        "group/all_wrong_frac": fmean(not any(a) for a in accuracies),
        "group/cov_length_advantage": length_advantage_covariance(
            lengths, [row.advantage for row in rows]
        ),
        "mask/kept_tokens": float(kept_tokens),
        "mask/kept_groups": float(sum(kept) / group_size),
        "rollout/staleness_mean": fmean(staleness(sample, current_step) for sample in samples),
        "tokens/skipped": float(sum(row.tokens for row in rows if not any(row.loss_weights))),
    }
    if correct_lengths:
        metrics["response/tokens_correct_mean"] = fmean(correct_lengths)
    return metrics


def staleness(sample: Sample, current_step: int) -> float:
    """Mean over the response's tokens of (optimizer steps taken since the weights that generated them)."""
    if not sample.versions or not sample.response_tokens:
        return 0.0
    total = sum(
        (span.end - span.start) * (current_step - WeightVersion.parse(span.version).step)
        for span in sample.versions
    )
    return total / len(sample.response_tokens)


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
    schedule wants multiples of PP); missing ones are empty and become weight-0 fillers. Sequences go, most costly
    first, to the micro-batch with the least cost that still has room in ``token_budget``; a sequence longer than the
    budget gets one of its own. Cost of n tokens: n + n^2 / (6 h), linear layers plus attention.
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
    # Heaviest first, dealt to the ranks back and forth, so that ranks and pipeline slots see like costs.
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
    """Least-cost-first packing into ``count`` bins; None when a sequence finds no bin with room."""
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
