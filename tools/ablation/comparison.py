"""Comparison of arms with the base arm: paired over problems and seeds, with bootstrap intervals, and the decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ablation.measures import Measured, nanmean
from ablation.plan import Cell, Plan

RESAMPLES = 4000
Results = Mapping[Cell, Measured]


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; all NaN where nothing was measured."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Compared:
    """An arm on a task. ``seeds``: those finished; ``means``, ``deviations``: of ``Measured.summary`` over them.
    Against the base arm, on the seeds that both have: ``accuracy``; ``tokens``, of right answers on problems that both
    solve, absolute, and ``saved`` as a share of the base arm's; ``solved``: the number of those problems.
    ``at_tokens``: training accuracy when each arm has generated as many tokens as the thriftiest one in all."""

    arm: str
    task: str
    seeds: list[int]
    means: dict[str, float]
    deviations: dict[str, float]
    accuracy: Estimate
    tokens: Estimate
    saved: float
    solved: int
    at_tokens: float


def paired_interval(differences: Sequence[np.ndarray], seed: int = 0) -> Estimate:
    """Estimate the mean of paired differences, an array [P] for each seed of the runs, NaN where there is no pair.

    The 95 % interval is that of a bootstrap in two stages: seeds with replacement, then problems within each; so it
    holds for other seeds and other problems. With a single seed it says nothing of other seeds. It errs on the wide
    side: noise of problems is in the seeds' means too, so where seeds do not differ it is up to 1.4 times too wide.
    """
    known = [d[~np.isnan(d)] for d in differences]
    known = [d for d in known if len(d)]
    if not known:
        return Estimate(float("nan"), float("nan"), float("nan"))
    rng = np.random.Generator(np.random.PCG64(seed))
    sizes = np.array([len(d) for d in known], dtype=float)
    drawn = rng.integers(0, len(known), (RESAMPLES, len(known)))
    values = np.empty(drawn.shape)
    for number, d in enumerate(known):  # a seed drawn twice has its problems drawn twice
        mine = drawn == number
        values[mine] = d[rng.integers(0, len(d), (int(mine.sum()), len(d)))].mean(1)
    totals = (values * sizes[drawn]).sum(1) / sizes[drawn].sum(1)
    low, high = np.percentile(totals, [2.5, 97.5])
    return Estimate(float(np.concatenate(known).mean()), float(low), float(high))


def compare(plan: Plan, results: Results) -> list[Compared]:
    """Compare every arm that has a finished cell, task by task."""
    budget = {
        (task, seed): min(
            (
                m.curves["generated tokens"].sum()
                for c, m in results.items()
                if (c.task, c.seed) == (task, seed)
            ),
            default=0.0,
        )
        for task in plan.file.tasks
        for seed in plan.file.seeds
    }
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
            pairs = [(mine[seed].after, base[seed].after) for seed in mine if seed in base]
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
                    nanmean(
                        np.array([m.accuracy_at(budget[task, seed]) for seed, m in mine.items()])
                    ),
                )
            )
    return found


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
