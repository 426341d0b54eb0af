"""From finished groups to a step record, and from a step record to micro-batches. Pure and deterministic."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np

from agpo_megatron.algorithm.advantage import (
    is_zero_variance,
    length_advantage_covariance,
    step_advantages,
)
from agpo_megatron.algorithm.aggregation import sequence_weights
from agpo_megatron.algorithm.correction import rollout_correction
from agpo_megatron.algorithm.length_reward import (
    agpo_length_bonus,
    cosine_length_reward,
    dapo_overlong_penalty,
    kimi_length_reward,
)
from agpo_megatron.algorithm.regularization import kl_sum, next_entropy_coefficient
from agpo_megatron.config.schema import AlgorithmConfig, RewardConfig
from agpo_megatron.journal.records import StepRecord, StepRow
from agpo_megatron.journal.writer import JournaledGroup
from agpo_megatron.types import Group, Sample, WeightVersion


@dataclass(frozen=True)
class Scores:
    """What the trainer was asked before the step is decided, by sample id, of the tokens of each loss mask.

    ``old``: log-probs under the weights that the step starts from; ``ref``: under the reference policy; each empty
    where the loss does not need it. ``entropy``: mean of the current policy's, nats, if it was measured.
    """

    old: dict[str, list[float]] = field(default_factory=dict)
    ref: dict[str, list[float]] = field(default_factory=dict)
    entropy: float | None = None


NO_SCORES = Scores()


@dataclass(frozen=True)
class StepRequest:
    """What a step is built from beside its groups.

    ``attempt``: that decides it. ``version``: the weights it starts from. ``cursor``: prompt position after it.
    ``entropy_state``: coefficient that the step before left. ``discarded``: groups generated for it that dynamic
    sampling replaced; ``rounds`` of generation.
    """

    step: int
    attempt: int
    cursor: int
    version: WeightVersion
    algorithm: AlgorithmConfig
    reward: RewardConfig
    max_response_tokens: int
    scores: Scores = NO_SCORES
    entropy_state: float = 0.0
    discarded: Sequence[JournaledGroup] = ()
    rounds: int = 1


@dataclass(frozen=True)
class Shaped:
    """Rewards of a step, by group and sample. ``raw``: accuracy alone; ``bonus``: the length term."""

    raw: list[list[float]]
    bonus: list[list[float]]
    total: list[list[float]]


def raw_rewards(group: Group, reward: RewardConfig) -> list[float]:
    """Accuracy rewards, which alone decide whether a group has variance."""
    return [reward.correct if s.accuracy > 0.5 else reward.wrong for s in group.samples]


def has_variance(group: Group, algorithm: AlgorithmConfig, reward: RewardConfig) -> bool:
    """Whether the group tells its samples apart."""
    return not is_zero_variance(raw_rewards(group, reward), algorithm.advantage.zero_variance_tol)


def to_score(
    journaled: Sequence[JournaledGroup], algorithm: AlgorithmConfig, reward: RewardConfig
) -> list[JournaledGroup]:
    """The groups whose log-probs a step may need: not those that the loss mask takes out of it altogether."""
    kl, mask = algorithm.loss.kl, algorithm.loss.mask
    in_reward = kl.coef > 0 and kl.place == "reward"
    drops_groups = (
        mask.zero_variance and mask.criterion == "group" and mask.denominators == "exclude"
    )
    if in_reward or not drops_groups:
        return list(journaled)
    return [j for j in journaled if has_variance(j.group, algorithm, reward)]


def length_terms(group: Group, algorithm: AlgorithmConfig, max_tokens: int) -> list[float]:
    """The length reward of every sample of a group."""
    settings = algorithm.length_reward
    correct = [sample.accuracy > 0.5 for sample in group.samples]
    lengths = [len(sample.response_tokens) for sample in group.samples]
    match settings.kind:
        case "agpo":
            return agpo_length_bonus(
                correct, lengths, settings.weight, groups=settings.groups, tie=settings.tie
            )
        case "kimi":
            return kimi_length_reward(correct, lengths, settings.weight)
        case "cosine":
            return cosine_length_reward(correct, lengths, settings.weight, max_tokens)
        case "dapo_overlong":
            buffer = settings.buffer or max(1, max_tokens // 5)
            return dapo_overlong_penalty(lengths, settings.weight, max_tokens, buffer)
    return [0.0] * len(lengths)


def shape_rewards(groups: Sequence[Group], request: StepRequest) -> Shaped:
    """Raw rewards, and what length and KL add to them."""
    algorithm, kl = request.algorithm, request.algorithm.loss.kl
    raw = [raw_rewards(group, request.reward) for group in groups]
    bonus = [length_terms(group, algorithm, request.max_response_tokens) for group in groups]
    penalty = [[0.0] * len(rewards) for rewards in raw]
    if kl.coef > 0 and kl.place == "reward":
        old, ref = request.scores.old, request.scores.ref
        penalty = [
            [kl.coef * kl_sum(old[s.sample_id], ref[s.sample_id], kl.estimator) for s in g.samples]
            for g in groups
        ]
    total = [
        [r + b - k for r, b, k in zip(*three, strict=True)]
        for three in zip(raw, bonus, penalty, strict=True)
    ]
    return Shaped(raw, bonus, total)


def correction_of(sample: Sample, kept: bool, request: StepRequest) -> list[float]:
    """Rollout correction of each response token; empty when there is none, or the sample was dropped unscored.

    Raises KeyError for a sample that trains but was not scored.
    """
    settings = request.algorithm.loss.correction
    if settings.kind == "none" or not (kept or sample.sample_id in request.scores.old):
        return []
    mask = np.array(sample.loss_mask, dtype=bool)
    old = np.zeros(len(mask))
    old[mask] = request.scores.old[sample.sample_id]
    weights: list[float] = rollout_correction(
        old,
        np.array(sample.rollout_logprobs),
        mask,
        kind=settings.kind,
        level=settings.level,
        low=settings.low,
        high=settings.high,
    ).tolist()
    return weights


def build_step(journaled: Sequence[JournaledGroup], request: StepRequest) -> StepRecord:
    """Rewards, advantages and loss weights of one optimizer step, from all its groups at once (design, idea 1).

    Every sample gets a row, also one without weight, so that the record tells the whole step.
    """
    groups = [j.group for j in journaled]
    samples = [sample for group in groups for sample in group.samples]
    shaped = shape_rewards(groups, request)
    masked = [len(s.loss_mask) - s.loss_mask.count(0) for s in samples]
    advantages = _advantages(groups, shaped, masked, request)
    kept = _kept(samples, groups, advantages, request)
    corrections = [correction_of(s, k, request) for s, k in zip(samples, kept, strict=True)]
    passing = [len(c) - c.count(0.0) if c else n for c, n in zip(corrections, masked, strict=True)]
    loss = request.algorithm.loss
    trained = [n if k else 0 for n, k in zip(passing, kept, strict=True)]
    weights = sequence_weights(
        trained,
        _counted(masked, passing, kept, request),
        loss.aggregation,
        norm_length=loss.norm_length or request.max_response_tokens,
    )
    coefficient, applied = _entropy_coefficient(request)
    silent_matters = _zero_advantages_matter(request.algorithm, applied)
    refs = [ref for j in journaled for ref in j.refs]
    totals = [r for group in shaped.total for r in group]
    rows = [
        StepRow(
            sample_id=sample.sample_id,
            ref=refs[i],
            tokens=len(sample.prompt_tokens) + len(sample.response_tokens),
            reward=totals[i],
            advantage=advantages[i],
            # A = 0 gives the policy loss no gradient: without weight the sequence is not packed either.
            loss_weight=weights[i] if advantages[i] != 0.0 or silent_matters else 0.0,
            trained=trained[i],
            old_logprobs=_spread(sample, request.scores.old),
            ref_logprobs=_spread(sample, request.scores.ref),
            correction=corrections[i],
        )
        for i, sample in enumerate(samples)
    ]
    return StepRecord(
        step=request.step,
        attempt=request.attempt,
        cursor=request.cursor,
        weight_version=str(request.version),
        segments={
            ref.segment: j.digest for j in (*journaled, *request.discarded) for ref in j.refs
        },
        rows=rows,
        metrics=step_metrics(groups, shaped, rows, kept, request)
        | ({} if loss.entropy.target is None else {"loss/entropy_coef": applied}),
        entropy_coef=applied,
        entropy_state=coefficient,
    )


def _entropy_coefficient(request: StepRequest) -> tuple[float, float]:
    """(what the next step starts from, what this step applies)."""
    settings, entropy = request.algorithm.loss.entropy, request.scores.entropy
    if settings.target is None:
        return settings.coef, settings.coef
    if entropy is None:  # no group was left to measure it on
        return request.entropy_state, 0.0
    return next_entropy_coefficient(request.entropy_state, entropy, settings.target, settings.delta)


def _advantages(
    groups: Sequence[Group], shaped: Shaped, masked: Sequence[int], request: StepRequest
) -> list[float]:
    settings, counts = request.algorithm.advantage, iter(masked)
    values = step_advantages(
        shaped.raw,
        shaped.total,
        [[next(counts) for _ in group.samples] for group in groups],
        estimator=settings.estimator,
        zero_variance=settings.zero_variance,
        tol=settings.zero_variance_tol,
        std_eps=settings.std_eps,
        r_max=request.reward.correct,
        r_min=request.reward.wrong,
    )
    return [a for group in values for a in group]


def _kept(
    samples: Sequence[Sample],
    groups: Sequence[Group],
    advantages: Sequence[float],
    request: StepRequest,
) -> list[bool]:
    """Whether each sample passes the loss masks."""
    mask, kept = request.algorithm.loss.mask, [True] * len(samples)
    if mask.zero_variance and mask.criterion == "sample":
        kept = [a != 0.0 for a in advantages]
    elif mask.zero_variance:
        kept = [
            varied
            for group in groups
            for varied in [has_variance(group, request.algorithm, request.reward)]
            for _ in group.samples
        ]
    if mask.truncated:
        kept = [k and not s.truncated for k, s in zip(kept, samples, strict=True)]
    return kept


def _counted(
    masked: Sequence[int], passing: Sequence[int], kept: Sequence[bool], request: StepRequest
) -> list[int]:
    """Tokens that the denominators count: each mask says for itself whether what it drops leaves them."""
    loss = request.algorithm.loss
    tokens = masked if loss.correction.denominators == "keep" else passing
    keeps = loss.mask.denominators == "keep"
    return [n if keeps or k else 0 for n, k in zip(tokens, kept, strict=True)]


def _zero_advantages_matter(algorithm: AlgorithmConfig, entropy_coef: float) -> bool:
    """Whether a sequence with A = 0 takes part: in another term, or in the weight of a part of phi (eq. 1e)."""
    loss = algorithm.loss
    other = (loss.kl.coef > 0 and loss.kl.place == "loss") or entropy_coef > 0
    return other or (loss.clip.kind not in ("none", "max0") and loss.clip.scope != "batch")


def _spread(sample: Sample, scores: dict[str, list[float]]) -> list[float]:
    """Log-probs of the masked tokens put at their places in the response."""
    if sample.sample_id not in scores:
        return []
    values = iter(scores[sample.sample_id])
    return [next(values) if m else 0.0 for m in sample.loss_mask]


def step_metrics(
    groups: Sequence[Group],
    shaped: Shaped,
    rows: Sequence[StepRow],
    kept: Sequence[bool],
    request: StepRequest,
) -> dict[str, float]:
    """Everything about a step that is known before training on it."""
    samples = [sample for group in groups for sample in group.samples]
    lengths = [len(sample.response_tokens) for sample in samples]
    correct_lengths = [
        n for n, sample in zip(lengths, samples, strict=True) if sample.accuracy > 0.5
    ]
    accuracies = [[sample.accuracy > 0.5 for sample in group.samples] for group in groups]
    current_step = request.step - 1
    varied = [has_variance(group, request.algorithm, request.reward) for group in groups]
    metrics = {
        "reward/mean": fmean(row.reward for row in rows),
        "reward/accuracy": fmean(sample.accuracy for sample in samples),
        "reward/length": fmean(b for group in shaped.bonus for b in group),
        "response/tokens_mean": fmean(lengths),
        "response/truncated_frac": fmean(sample.truncated for sample in samples),
        "group/zero_variance_frac": fmean(not v for v in varied),
        "group/all_correct_frac": fmean(all(a) for a in accuracies),
        "group/all_wrong_frac": fmean(not any(a) for a in accuracies),
        "group/cov_length_advantage": length_advantage_covariance(
            lengths, [row.advantage for row in rows]
        ),
        "mask/kept_tokens": float(sum(row.trained for row in rows)),
        "mask/kept_groups": float(sum(kept) / len(groups[0].samples)),
        "rollout/staleness_mean": fmean(staleness(sample, current_step) for sample in samples),
        "tokens/skipped": float(sum(row.tokens for row in rows if not row.has_weight)),
    }
    if correct_lengths:
        metrics["response/tokens_correct_mean"] = fmean(correct_lengths)
    if request.algorithm.advantage.zero_variance == "resample":
        metrics["sampling/rounds"] = float(request.rounds)
        metrics["sampling/discarded_groups"] = float(len(request.discarded))
    if factors := [c for row in rows for c in row.correction]:
        metrics["correction/mean"] = fmean(factors)
        metrics["correction/dropped_frac"] = factors.count(0.0) / len(factors)
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
