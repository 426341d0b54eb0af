"""Guards of a run, pure: limits for a batch from the steps before it, and the verdict on a step that breaks one.

The limits are committed with the batch, so every rank, a resumed run and a replay compare with the same numbers. What
is known before the update (rewards, truncation) and what is known in it (loss, gradient norm, entropy, log-probs of
server against trainer) are compared at one moment: after the backward pass, before the optimizer step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median, stdev

import numpy as np

from agpo_megatron.algorithm.limits import Limit, broken, not_finite
from agpo_megatron.config.schema import GuardsConfig
from agpo_megatron.journal import BatchRecord, GuardFinding, StepVerdict
from agpo_megatron.journal.verdicts import Action
from agpo_megatron.samples import Sample

WINDOW = 50
"""Steps within which firings count as one after the other."""
NORMS, FEWEST_NORMS = 64, 8
"""Gradient norms that the median is taken of, at most and at least."""
BATCHES = 8
"""Batches over which the reward is averaged: a single small batch of a hard task may have none that is right."""
ERRORS = 4.0
"""Standard errors, of the difference of two such averages, that a fall must exceed."""
NON_FINITE = "non_finite"
StepMetrics = Mapping[str, float]


def limits(
    settings: GuardsConfig,
    max_error_frac: float,
    past: Sequence[StepMetrics],
    *,
    rewarded: bool,
    rolled_back: int = 0,
    quiet: bool = False,
) -> list[Limit]:
    """Return the limits of a batch after the steps ``past``.

    ``rewarded``: it has responses with rewards, as supervised batches have not. ``rolled_back``: the last step whose
    responses may be of weights that were rolled back: rewards up to there say nothing of the weights of now.
    ``quiet``: so may those of this batch, and they are not judged.
    """
    found: list[Limit] = []
    norms = [n for row in past if 0 < (n := row.get("grad_norm", 0.0)) < math.inf][-NORMS:]
    if settings.grad_norm is not None and len(norms) >= FEWEST_NORMS:
        found.append(Limit("grad_norm", "grad_norm", settings.grad_norm * median(norms)))
    if not rewarded:
        return found
    for guard, metric, bound, above in (
        ("logprob_gap", "rollout/logprob_abs_diff_mean", settings.logprob_gap, True),
        ("logprob_far", "rollout/logprob_far_frac", settings.logprob_far, True),
        ("entropy", "policy/entropy", settings.entropy, False),
    ):
        if bound is not None and not (quiet and metric.startswith("rollout/")):
            found.append(Limit(guard, metric, bound, above))
    if quiet:
        return found
    found.append(Limit("reward_errors", "reward/error_frac", max_error_frac))
    truncated = [row["response/truncated_frac"] for row in past if "response/truncated_frac" in row]
    # A run that has never been better begins so: that is no collapse.
    if settings.truncated is not None and min(truncated, default=2.0) <= settings.truncated:
        found.append(Limit("truncated", "response/truncated_frac", settings.truncated))
    floor = reward_floor(settings, past, rolled_back)
    if floor is not None:
        found.append(Limit("reward_drop", "reward/mean", floor, above=False))
    return found


def reward_floor(
    settings: GuardsConfig, past: Sequence[StepMetrics], rolled_back: int
) -> float | None:
    """Return the mean reward of the next batch below which the mean of the last ``BATCHES``, it included, is too far
    below the best median of as many, and by more than chance; None while too little is known."""
    rows = [(row["step"], row["reward/mean"]) for row in past if "reward/mean" in row]
    recent = [reward for step, reward in rows if step > rolled_back][1 - BATCHES :]
    if settings.reward_drop is None or len(rows) < BATCHES or len(recent) < BATCHES - 1:
        return None
    windows = [[r for _, r in rows[i - BATCHES : i]] for i in range(BATCHES, len(rows) + 1)]
    # Medians: one batch with an absurd reward must not be the best for good.
    best = [median(window) for window in windows]
    highest, largest = max(best), max(map(abs, best))
    first = windows[best.index(highest)]  # later ones may have some of the fall
    spread = stdev([min(max(r, highest - largest), highest + largest) for r in first])
    fall = max(settings.reward_drop * largest, ERRORS * spread * math.sqrt(2 / BATCHES))
    return BATCHES * (highest - fall) - sum(recent)


def firings(verdicts: Iterable[StepVerdict], step: int) -> list[int]:
    """Return the steps before ``step`` in which a guard fired, as far as they count: within the window, and behind the
    last stop, after which a person has looked."""
    before = [v for v in verdicts if step - WINDOW < v.step < step]
    stopped = max((v.step for v in before if v.action == "stop"), default=0)
    return sorted(v.step for v in before if v.step > stopped)


def action_of(actions: Sequence[Action], earlier: int, non_finite: bool) -> Action:
    """Return what is done at a firing after ``earlier`` others: the next of ``actions``, the last one for good. A step
    on numbers that are not finite is never taken: for it the ladder begins behind ``warn``."""
    rungs = [a for a in actions if not (non_finite and a == "warn")] or ["skip"]
    return rungs[min(earlier, len(rungs) - 1)]


def fires(record: BatchRecord, step: int, result: StepMetrics) -> bool:
    """Return whether a step breaks a limit, or has a loss or gradient that is not finite."""
    return bool(broken_before(record, step) or broken(record.limits, result) or not_finite(result))


def broken_before(record: BatchRecord, step: int) -> list[Limit]:
    """Return the limits that the batch breaks before anything is computed. They speak with its first step, for all."""
    return broken(record.limits, record.metrics) if step == record.first_step else []


def judge(
    actions: Sequence[Action],
    record: BatchRecord,
    step: int,
    result: StepMetrics,
    *,
    earlier: int,
    checkpoint: int,
    settled: bool = False,
) -> StepVerdict | None:
    """Return the verdict on ``step`` whose update gave ``result``; None if no guard fires.

    ``earlier``: the number of firings before it; ``checkpoint``: the step that a roll back goes back to; ``settled``:
    the step was decided before, so that nothing but a loss or gradient that is not finite counts.
    """
    early = [] if settled else broken_before(record, step)
    late = [] if settled else broken(record.limits, result)
    nowhere = not_finite(result)
    findings = [GuardFinding(NON_FINITE, key, result[key], math.inf) for key in nowhere]
    for limit in dict.fromkeys([*early, *late]):
        value = {**record.metrics, **result}[limit.metric]
        findings.append(GuardFinding(limit.guard, limit.metric, value, limit.bound))
    if not findings:
        return None
    action = action_of(actions, earlier, bool(nowhere))
    last = record.steps[-1] if early else step
    if action == "warn":
        first, last = step, step - 1
    else:
        first = checkpoint + 1 if action == "roll_back" else step
    return StepVerdict(step, action, findings, first, last, dict(result))


def worst(guard: str, record: BatchRecord, step: int, samples: Sequence[Sample]) -> list[str]:
    """Return the ids of the samples that ``guard`` is about, the worst first. ``samples``: those of the record.

    By what is recorded of each: for loss, gradient and entropy the size of its part in the loss, |w A n|; for server
    against trainer the least likely token, as the server saw it; for rewards the lowest; else those that are concerned,
    the longest first.
    """
    weigh = dict(zip(record.sample_ids, _parts(record), strict=True))
    trained = {record.sample_ids[row] for row in record.rows(step)}
    size = {s.sample_id: float(len(s.response_tokens)) for s in samples}
    concerned: dict[str, float]
    match guard:
        case "truncated":
            concerned = {s.sample_id: -size[s.sample_id] for s in samples if s.truncated}
        case "reward_errors":
            concerned = {s.sample_id: -size[s.sample_id] for s in samples if s.reward_error}
        case "reward_drop":
            concerned = dict(zip(record.sample_ids, record.columns["reward"].tolist(), strict=True))
        case "logprob_gap" | "logprob_far":
            concerned = {s.sample_id: _least(s) for s in samples if s.sample_id in trained}
        case _:
            concerned = {name: -weigh[name] for name in trained}
    return sorted(concerned, key=lambda name: (concerned[name], name))


def _parts(record: BatchRecord) -> Iterator[float]:
    columns = (record.columns[name] for name in ("loss_weight", "advantage", "trained"))
    for weight, advantage, tokens in zip(*columns, strict=True):
        part = abs(float(weight) * float(advantage) * float(tokens))
        yield part if math.isfinite(part) else math.inf


def _least(sample: Sample) -> float:
    known = sample.rollout_logprobs[np.isfinite(sample.rollout_logprobs)]
    return float(known.min()) if len(known) else 0.0


def described(verdict: StepVerdict, record: BatchRecord, shown: int = 4) -> str:
    """Say in one sentence which guard, step, batch and samples, which numbers, and what is done."""
    what = "; ".join(
        f"{f.guard}: {f.metric} is {f.value:.6g}"
        + ("" if f.guard == NON_FINITE else f", limit {f.bound:.6g}")
        + (f" (worst samples: {', '.join(f.samples[:shown])})" if f.samples else "")
        for f in verdict.findings
    )
    done = {
        "warn": "the step is taken all the same",
        "skip": f"not taken: {_steps(verdict)}",
        "roll_back": f"back to the weights of step {verdict.first - 1}; not taken: {_steps(verdict)}",
        "stop": f"not taken: {_steps(verdict)}; the run ends",
    }
    batch = f"batch of steps {record.steps[0]} to {record.steps[-1]}"
    return f"guard fired in step {verdict.step} ({batch}): {what}; {verdict.action}: {done[verdict.action]}"


def _steps(verdict: StepVerdict) -> str:
    steps = verdict.skipped
    return f"step {verdict.step}" if len(steps) < 2 else f"steps {steps[0]} to {steps[-1]}"


def keys_of(verdict: StepVerdict) -> str:
    """Name the configuration keys that decided it, for the message of a stop."""
    own = {NON_FINITE: "guards.actions", "reward_errors": "reward.max_error_frac"}
    names = dict.fromkeys(own.get(f.guard, f"guards.{f.guard}") for f in verdict.findings)
    return " or ".join([*names, *(["guards.actions"] if "guards.actions" not in names else [])])
