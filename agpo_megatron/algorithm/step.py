"""Decisions about a batch: from its finished groups to all inputs of its optimizer steps. Pure and deterministic.

A batch is divided into parts of whole groups, one optimizer step each; advantages are computed over the whole batch,
loss weights over each part (design, idea 1).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, TypeVar

import numpy as np

from agpo_megatron.algorithm.advantage import (
    is_zero_variance,
    length_advantage_covariance,
    step_advantages,
)
from agpo_megatron.algorithm.aggregation import sequence_weights
from agpo_megatron.algorithm.correction import rollout_correction
from agpo_megatron.algorithm.gate_levels import gate_levels
from agpo_megatron.algorithm.kl import kl_sum, next_entropy_coefficient
from agpo_megatron.algorithm.length_reward import (
    agpo_length_bonus,
    cosine_length_reward,
    dapo_overlong_penalty,
    kimi_length_reward,
)
from agpo_megatron.algorithm.settings import AlgorithmSettings
from agpo_megatron.samples import Floats, Group, Sample, WeightVersion

T = TypeVar("T")


@dataclass(frozen=True)
class Scores:
    """The trainer's log-probs for a batch, by sample id: [n] float32 of each response, 0 off its loss mask.

    ``old``: under the weights that the batch starts from; ``ref``: under the reference policy; each empty if the loss
    does not need it. ``entropy``: mean entropy of the current policy, nats, if it was measured.
    """

    old: Mapping[str, Floats] = field(default_factory=dict)
    ref: Mapping[str, Floats] = field(default_factory=dict)
    entropy: float | None = None


NO_SCORES = Scores()


@dataclass(frozen=True)
class StepRequest:
    """The inputs of ``decide`` beside the groups.

    ``first_step``: first optimizer step of the batch, counted from 1; ``updates``: number of its steps.
    ``entropy_state``, ``gate_state``: entropy coefficient and state of the gate after the last batch. ``discarded``:
    number of groups that dynamic sampling replaced.
    """

    algorithm: AlgorithmSettings
    first_step: int
    updates: int
    seed: int
    max_response_tokens: int
    scores: Scores = NO_SCORES
    entropy_state: float = 0.0
    gate_state: Sequence[float] = ()
    discarded: int = 0


@dataclass(frozen=True)
class Decision:
    """The decision about S samples, in the order of the groups. ``columns``: those of ``samples.COLUMNS`` with source
    "step", by name: per sequence a list of S numbers, per token a list of S arrays, None where unknown; a column that
    no sample has is left out. ``entropy_coef``: weight of the entropy bonus; ``entropy_state``: adaptive coefficient
    to start the next batch with. ``gate_levels``: of each optimizer step, ``gate_state`` to start the next batch with
    (``gate_levels.py``). ``metrics``: those known before training."""

    columns: Mapping[str, Sequence[Any]]
    metrics: Mapping[str, float]
    entropy_coef: float
    entropy_state: float
    gate_levels: Sequence[float] = ()
    gate_state: Sequence[float] = ()


@dataclass(frozen=True)
class Shaped:
    """Rewards by group and sample. ``raw``: of the functions; ``bonus``: the length term; ``total``: with KL too."""

    raw: list[list[float]]
    bonus: list[list[float]]
    total: list[list[float]]


def decide(groups: Sequence[Group], request: StepRequest) -> Decision:
    """Compute rewards, advantages, parts and loss weights of a batch from all its groups.

    Every sample gets an entry, even without weight, so that the record describes the whole batch. Raises KeyError for a
    trained sample that was not scored.
    """
    loss = request.algorithm.loss
    samples = [sample for group in groups for sample in group.samples]
    shaped = shape_rewards(groups, request)
    varied = varied_groups(shaped, request.algorithm)
    maskable = [int(np.count_nonzero(s.loss_mask)) for s in samples]
    advantages = _advantages(groups, shaped, varied, maskable, request)
    kept = _kept(groups, varied, advantages, request)
    corrections = [_correction(s, k, request) for s, k in zip(samples, kept, strict=True)]
    passing = [
        n if c is None else int(np.count_nonzero(c != 0))  # booleans count five times faster
        for c, n in zip(corrections, maskable, strict=True)
    ]
    trained = [n if k else 0 for n, k in zip(passing, kept, strict=True)]
    counted = _counted(maskable, passing, kept, request)
    signal = [n > 0 and a != 0.0 for n, a in zip(trained, advantages, strict=True)]
    part_of = parts([any(group) for group in _by_group(signal, groups)], request)
    update = [part for part, group in zip(part_of, groups, strict=True) for _ in group.samples]
    weights = _weights(trained, counted, update, request)
    state, applied = _entropy_coefficient(request)
    # With A = 0 the policy loss has no gradient: without weight the sequence is not packed either.
    zero_trains = _zero_advantages_matter(request.algorithm, applied)
    columns: dict[str, Sequence[Any]] = {
        "reward": [r for group in shaped.total for r in group],
        "advantage": advantages,
        "loss_weight": [
            w if a != 0.0 or zero_trains else 0.0 for w, a in zip(weights, advantages, strict=True)
        ],
        "trained": trained,
        "update": update,
        "staleness": [staleness(s, request.first_step - 1) for s in samples],
        "old_logprobs": [request.scores.old.get(s.sample_id) for s in samples],
        "ref_logprobs": [request.scores.ref.get(s.sample_id) for s in samples],
        "correction": corrections,
    }
    known = {n: values for n, values in columns.items() if any(v is not None for v in values)}
    metrics = step_metrics(groups, shaped, varied, known, kept, request)
    if loss.entropy.target is not None:
        metrics["loss/entropy_coef"] = applied
    levels, gate_state = gate_levels(
        loss.clip,
        _step_losses(columns, request.updates),
        request.gate_state,
        seed=request.seed,
        first_step=request.first_step,
    )
    return Decision(known, metrics, applied, state, levels, gate_state)


def parts(train: Sequence[bool], request: StepRequest) -> list[int]:
    """Divide the groups of a batch among its updates: shuffled by the seed and dealt in turn, first those with a
    policy gradient, so that every update has its share of them. ``train``: whether a group has one. Returns the update
    of each group."""
    if request.updates == 1:
        return [0] * len(train)
    order = np.random.Generator(np.random.PCG64([request.seed, request.first_step]))
    shuffled = np.lexsort((order.random(len(train)), np.logical_not(train)))
    part_of = np.empty(len(train), dtype=np.int64)
    part_of[shuffled] = np.arange(len(train)) % request.updates
    return [int(part) for part in part_of]


def varied_groups(shaped: Shaped, algorithm: AlgorithmSettings) -> list[bool]:
    """Return which groups have variance, for advantages and the loss mask alike: by the raw rewards, so that a term
    which tells apart the members of mixed groups brings no other group back; by the shaped ones where a term is meant
    to act in groups whose raw rewards agree (``shaping_separates``)."""
    deciding = shaped.total if algorithm.shaping_separates else shaped.raw
    return [not is_zero_variance(rewards) for rewards in deciding]


def has_variance(group: Group) -> bool:
    """Return whether the raw rewards of the group differ: known from the group alone, before anything is scored.
    Dynamic sampling replaces the other groups (DAPO: those that are all right or all wrong)."""
    return not is_zero_variance([s.raw_reward for s in group.samples])


def drops_groups(algorithm: AlgorithmSettings) -> bool:
    """Return whether groups without ``has_variance`` are dropped from the batch entirely, so that they need not be
    scored."""
    mask = algorithm.loss.mask
    if algorithm.shaping_separates:
        return False
    return mask.zero_variance and mask.criterion == "group" and mask.denominators == "exclude"


def length_terms(group: Group, algorithm: AlgorithmSettings, max_tokens: int) -> list[float]:
    """Return the length reward of every sample of a group."""
    settings = algorithm.length_reward
    correct = [sample.correct for sample in group.samples]
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
    """Return the raw rewards, and those with the length and KL terms."""
    algorithm, kl, scores = request.algorithm, request.algorithm.loss.kl, request.scores
    raw = [[s.raw_reward for s in group.samples] for group in groups]
    bonus = [length_terms(group, algorithm, request.max_response_tokens) for group in groups]
    penalty = [[0.0] * len(rewards) for rewards in raw]
    if kl.coef > 0 and kl.place == "reward":

        def cost(s: Sample) -> float:
            both = (scores.old[s.sample_id], scores.ref[s.sample_id])  # 0 off the mask: no KL
            return kl.coef * kl_sum(*both, kl.estimator)

        penalty = [[cost(sample) for sample in group.samples] for group in groups]
    total = [
        [r + b - k for r, b, k in zip(*three, strict=True)]
        for three in zip(raw, bonus, penalty, strict=True)
    ]
    return Shaped(raw, bonus, total)


def _correction(sample: Sample, kept: bool, request: StepRequest) -> Floats | None:
    """Return the rollout correction of each response token; None if it is off, if the loss computes it, or if the
    sample was dropped unscored."""
    settings, old = request.algorithm.loss.correction, request.scores.old
    scored, _ = request.algorithm.loss.scored_weights(request.updates)
    if settings.kind == "none" or not scored or not (kept or sample.sample_id in old):
        return None
    return rollout_correction(
        old[sample.sample_id],
        sample.rollout_logprobs,
        sample.loss_mask,
        kind=settings.kind,
        level=settings.level,
        low=settings.low,
        high=settings.high,
    )


def _weights(
    trained: Sequence[int], counted: Sequence[int], update: Sequence[int], request: StepRequest
) -> list[float]:
    """Return the loss weights, computed for each optimizer step over its part of the batch."""
    loss, weights = request.algorithm.loss, [0.0] * len(trained)
    for part in range(request.updates):
        mine = [i for i, u in enumerate(update) if u == part]
        found = sequence_weights(
            [trained[i] for i in mine],
            [counted[i] for i in mine],
            loss.aggregation,
            norm_length=loss.norm_length or request.max_response_tokens,
        )
        for i, weight in zip(mine, found, strict=True):
            weights[i] = weight
    return weights


def _step_losses(columns: Mapping[str, Sequence[Any]], updates: int) -> list[tuple[float, float]]:
    """Return, for each optimizer step, L = -sum w n A (eq. 1c) and sum |w n A|: what the trainers' gate adds up too
    (``gate.on_policy_parts``)."""
    terms: list[list[float]] = [[] for _ in range(updates)]
    names = ("loss_weight", "trained", "advantage", "update")
    for w, n, a, update in zip(*(columns[name] for name in names), strict=True):
        terms[update].append(-w * n * a)
    return [(math.fsum(step), math.fsum(map(abs, step))) for step in terms]


def _entropy_coefficient(request: StepRequest) -> tuple[float, float]:
    """Return (entropy coefficient to start the next batch with, coefficient of this batch)."""
    settings, entropy = request.algorithm.loss.entropy, request.scores.entropy
    if settings.target is None:
        return settings.coef, settings.coef
    if entropy is None:  # no group was left to measure it on
        return request.entropy_state, 0.0
    return next_entropy_coefficient(request.entropy_state, entropy, settings.target)


def _by_group(values: Sequence[T], groups: Sequence[Group]) -> list[list[T]]:
    """Divide what is listed by sample."""
    each = iter(values)
    return [[next(each) for _ in group.samples] for group in groups]


def _advantages(
    groups: Sequence[Group],
    shaped: Shaped,
    varied: Sequence[bool],
    maskable: Sequence[int],
    request: StepRequest,
) -> list[float]:
    settings = request.algorithm.advantage
    values = step_advantages(
        shaped.total,
        _by_group(maskable, groups),
        varied,
        estimator=settings.estimator,
        zero_variance=settings.zero_variance,
        length_projection=settings.length_projection,
        correct=[[sample.correct for sample in group.samples] for group in groups],
    )
    return [a for group in values for a in group]


def _kept(
    groups: Sequence[Group],
    varied: Sequence[bool],
    advantages: Sequence[float],
    request: StepRequest,
) -> list[bool]:
    """Return, for each sample, whether it passes the loss masks."""
    mask, samples = request.algorithm.loss.mask, [s for group in groups for s in group.samples]
    kept = [True] * len(samples)
    if mask.zero_variance and mask.criterion == "sample":
        kept = [a != 0.0 for a in advantages]
    elif mask.zero_variance:
        kept = [v for group, v in zip(groups, varied, strict=True) for _ in group.samples]
    if mask.truncated:
        kept = [k and not s.truncated for k, s in zip(kept, samples, strict=True)]
    return kept


def _counted(
    maskable: Sequence[int], passing: Sequence[int], kept: Sequence[bool], request: StepRequest
) -> list[int]:
    """Return the tokens in the denominators: each mask has a setting whether dropped tokens leave them."""
    loss = request.algorithm.loss
    tokens = maskable if loss.correction.denominators == "keep" else passing
    keeps = loss.mask.denominators == "keep"
    return [n if keeps or k else 0 for n, k in zip(tokens, kept, strict=True)]


def _zero_advantages_matter(algorithm: AlgorithmSettings, entropy_coef: float) -> bool:
    """Return whether sequences with A = 0 count: in another term, or in the weight W of a part of phi (eq. 1e), on
    which phi(S / W) depends, but not the side of 0 that it is on."""
    loss, clip = algorithm.loss, algorithm.loss.clip
    weighs = clip.kind not in ("none", "max0") or (clip.kind == "max0" and clip.min != 0)
    return loss.kl_coef > 0 or entropy_coef > 0 or (weighs and clip.scope != "batch")


def step_metrics(
    groups: Sequence[Group],
    shaped: Shaped,
    varied: Sequence[bool],
    columns: Mapping[str, Sequence[Any]],
    kept: Sequence[bool],
    request: StepRequest,
) -> dict[str, float]:
    """Return the metrics of a batch that are known before training on it."""
    samples = [sample for group in groups for sample in group.samples]
    lengths = [len(sample.response_tokens) for sample in samples]
    correct_lengths = [n for n, sample in zip(lengths, samples, strict=True) if sample.correct]
    correct = [[sample.correct for sample in group.samples] for group in groups]
    maskable = [int(np.count_nonzero(s.loss_mask)) for s in samples]
    skipped = [
        not (w and n) for w, n in zip(columns["loss_weight"], columns["trained"], strict=True)
    ]
    metrics = {
        "reward/mean": fmean(columns["reward"]),
        "reward/accuracy": fmean(sample.correct for sample in samples),
        "reward/length": fmean(b for group in shaped.bonus for b in group),
        "reward/error_frac": fmean(bool(sample.reward_error) for sample in samples),
        "response/tokens_mean": fmean(lengths),
        "response/truncated_frac": fmean(sample.truncated for sample in samples),
        "group/zero_variance_frac": fmean(not v for v in varied),
        "group/all_correct_frac": fmean(all(c) for c in correct),
        "group/all_wrong_frac": fmean(not any(c) for c in correct),
        "group/cov_length_advantage": length_advantage_covariance(maskable, columns["advantage"]),
        "mask/kept_tokens": float(sum(columns["trained"])),
        "mask/kept_groups": float(sum(kept) / len(groups[0].samples)),
        "rollout/staleness_mean": fmean(columns["staleness"]),
        "rollout/staleness_max": float(
            max(age for s in samples for _, age in ages(s, request.first_step - 1))
        ),
        "tokens/skipped": float(
            sum(s.length for s, skip in zip(samples, skipped, strict=True) if skip)
        ),
    }
    metrics |= _by_part_and_source(groups)
    if correct_lengths:
        metrics["response/tokens_correct_mean"] = fmean(correct_lengths)
    if request.algorithm.advantage.zero_variance == "resample":
        metrics["sampling/discarded_groups"] = float(request.discarded)
    if "correction" in columns:
        metrics |= _correction_metrics(samples, columns["correction"])
    return metrics


def _correction_metrics(
    samples: Sequence[Sample], factors: Sequence[Floats | None]
) -> dict[str, float]:
    """Mean factor of the tokens in the loss masks (it is 0 off them), and share of those tokens that it drops."""
    known = [(s, c) for s, c in zip(samples, factors, strict=True) if c is not None]
    count = sum(np.count_nonzero(s.loss_mask) for s, _ in known)
    if not count:
        return {}
    passing = sum(np.count_nonzero(c != 0) for _, c in known)
    total = float(sum(c.sum(dtype=np.float64) for _, c in known))
    return {"correction/mean": total / count, "correction/dropped_frac": 1 - passing / count}


def _by_part_and_source(groups: Sequence[Group]) -> dict[str, float]:
    """Mean of each named part of the reward over the samples that have it; share of the samples without a verdict by
    cause; accuracy by source if there are several."""
    values: dict[str, list[float]] = {}
    errors = Counter(
        s.reward_error.partition(":")[0] for g in groups for s in g.samples if s.reward_error
    )
    total = sum(len(group.samples) for group in groups)
    sources = {group.prompt.source for group in groups}
    for group in groups:
        for sample in group.samples:
            for name, value in sample.reward_parts.items():
                values.setdefault(f"reward_part/{name}", []).append(value)
            if len(sources) > 1:
                values.setdefault(f"source_accuracy/{group.prompt.source}", []).append(
                    sample.correct
                )
    means = {name: fmean(found) for name, found in values.items()}
    return dict(
        sorted({**means, **{f"reward_error/{c}": n / total for c, n in errors.items()}}.items())
    )


def staleness(sample: Sample, current_step: int) -> float:
    """Return the mean staleness over the response's tokens: optimizer steps since the weights that generated them."""
    total = sum(tokens * age for tokens, age in ages(sample, current_step))
    return total / max(len(sample.response_tokens), 1)


def ages(sample: Sample, current_step: int) -> list[tuple[int, int]]:
    """Return (number of tokens, their staleness) of each span of the response; age 0 where none is known."""
    spans = [
        (span.end - span.start, current_step - WeightVersion.parse(span.version).step)
        for span in sample.versions
    ]
    return spans or [(len(sample.response_tokens), 0)]


def supervised(examples: Sequence[Sample]) -> Decision:
    """Return the decision of a supervised step: token-mean likelihood, w = 1 / (response tokens of batch), A = 1."""
    counts = [int(np.count_nonzero(s.loss_mask)) for s in examples]
    columns: dict[str, Sequence[Any]] = {
        "advantage": [1.0] * len(examples),
        "loss_weight": sequence_weights(counts, counts, "token_mean"),
        "trained": counts,
    }
    return Decision(columns, {}, 0.0, 0.0)
