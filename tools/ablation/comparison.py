"""Comparison of arms with the base arm: paired over problems and seeds, with intervals, and the decision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ablation.measures import Measured, nanmean
from ablation.plan import Cell, Plan
from scipy.stats import t as student_t

Results = Mapping[Cell, Measured]


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; NaN where nothing was measured."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Compared:
    """An arm on a task. ``seeds``: those finished; ``means``, ``deviations``: of ``Measured.summary`` over them.
    Against the base arm, on the seeds that both have: ``accuracy``; ``tokens``, of right answers on problems that both
    solve, absolute, and ``saved`` as a share of the base arm's; ``solved``: the number of those problems;
    ``at_tokens``: training accuracy when each of the two has generated as many tokens as the thriftier one in all."""

    arm: str
    task: str
    seeds: list[int]
    means: dict[str, float]
    deviations: dict[str, float]
    accuracy: Estimate
    tokens: Estimate
    saved: float
    solved: int
    at_tokens: Estimate


def paired_interval(differences: Sequence[np.ndarray]) -> Estimate:
    """Estimate the mean of paired differences, an array [P] for each seed of the runs, NaN where there is no pair.

    The 95 % interval is Student's t over the means d_s of the S seeds, each weighted with its n_s pairs of N::

        m = sum_s n_s d_s / N,   se^2 = S / (S - 1) sum_s (n_s (d_s - m) / N)^2,   m -+ t(.975, S - 1) se

    A seed's mean carries the noise of its problems, so the interval holds for other seeds and other problems. Of a
    single seed it is that over problems and says nothing of other seeds; of a single pair there is none (NaN).
    """
    nan = float("nan")
    known = [d[~np.isnan(d)] for d in differences]
    known = [d for d in known if len(d)]
    if not known:
        return Estimate(nan, nan, nan)
    several = len(known) > 1
    values = np.array([d.mean() for d in known]) if several else known[0]
    shares = np.array([len(d) for d in known], dtype=float) if several else np.ones(len(values))
    shares /= shares.sum()
    mean, count = float(shares @ values), len(values)
    if count == 1:
        return Estimate(mean, nan, nan)
    error = math.sqrt(count / (count - 1) * float(np.sum((shares * (values - mean)) ** 2)))
    reach = float(student_t.ppf(0.975, count - 1)) * error
    return Estimate(mean, mean - reach, mean + reach)


def compare(plan: Plan, results: Results) -> list[Compared]:
    """Compare every arm that has a finished cell, task by task."""
    found = []
    for task in plan.file.tasks:
        for arm in plan.arms:
            mine = {c.seed: m for c, m in results.items() if (c.arm, c.task) == (arm, task)}
            if not mine:
                continue
            base = {
                c.seed: m
                for c, m in results.items()
                if (c.arm, c.task) == (plan.base_of(arm), task)
            }
            runs = [(mine[seed], base[seed]) for seed in mine if seed in base]
            pairs = [(one.after, other.after) for one, other in runs]
            summaries = [m.summary() for m in mine.values()]
            names = list(summaries[0])
            columns = {name: np.array([s[name] for s in summaries]) for name in names}
            both = [a.right_tokens - b.right_tokens for a, b in pairs]
            theirs = [
                np.where(np.isnan(d), np.nan, b.right_tokens)
                for d, (_, b) in zip(both, pairs, strict=True)
            ]
            tokens = paired_interval(both)
            found.append(
                Compared(
                    arm,
                    task,
                    sorted(mine),
                    {name: nanmean(values) for name, values in columns.items()},
                    {name: deviation(values) for name, values in columns.items()},
                    paired_interval([a.accuracy - b.accuracy for a, b in pairs]),
                    tokens,
                    -tokens.mean / nanmean(np.concatenate(theirs)) if pairs else float("nan"),
                    sum(int((~np.isnan(d)).sum()) for d in both),
                    paired_interval([np.array([at_equal_tokens(*run)]) for run in runs]),
                )
            )
    return found


def at_equal_tokens(one: Measured, other: Measured) -> float:
    """Return the difference of training accuracy when both have generated as many tokens as the thriftier in all."""
    budget = min(m.curves["generated tokens"].sum() for m in (one, other))
    return one.accuracy_at(budget) - other.accuracy_at(budget)


def deviation(values: np.ndarray) -> float:
    """Return the standard deviation over seeds (ddof 1); NaN for one."""
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1)) if len(known) > 1 else float("nan")


def decide(plan: Plan, compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """Apply the file's rule: of the arms that lose at most ``decision.within`` of accuracy against the base arm on
    every task, the one that saves most tokens on problems that both solve, mean over tasks. A row per arm, best first:
    ``arm``, ``passes``, ``worst`` (difference of accuracy) and its ``task``, ``saved``; ``complete``: whether all its
    cells, and the base arm's, have ended. Controls, and arms that are not complete, come last and are not chosen."""
    rows = []
    done = {(c.arm, c.task): len(c.seeds) == len(plan.file.seeds) for c in compared}
    for arm in plan.arms:
        mine = [c for c in compared if c.arm == arm]
        if not mine:
            continue
        worst = min(mine, key=lambda c: c.accuracy.mean)
        complete = all(
            done.get((name, task)) for name in (arm, plan.base_of(arm)) for task in plan.file.tasks
        )
        rows.append(
            {
                "arm": arm,
                "passes": bool(worst.accuracy.mean >= -plan.file.decision.within),
                "worst": worst.accuracy.mean,
                "task": worst.task,
                "saved": float(np.mean([c.saved for c in mine])),
                "complete": bool(complete),
                "control": plan.is_control(arm),
            }
        )
    return sorted(
        rows, key=lambda r: (not (r["passes"] and r["complete"] and not r["control"]), -r["saved"])
    )
