"""Rewards: answers per second through the worker path, and ``math`` beside math-verify called directly."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import psutil

from agpo_megatron.config.task import PartConfig, RewardConfig
from agpo_megatron.reward import Problem, Response
from agpo_megatron.reward.pool import RewardPool

GROUP = 16
WORK = "Let me think step by step. " * 20 + "3 + 4 = 7 and so on.\n" * 5
FORMULAS = [
    ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt3}"),
    ("(3,4]", "(3, 4]"),
    ("2k+2", "2(k+1)"),
    ("1 \\pm \\sqrt{19}", "1+\\sqrt{19},1-\\sqrt{19}"),
    ("\\frac{11+9a}{20}", "\\frac{9a+11}{20}"),
    ("6+9i", "9i+6"),
    ("18+2\\pi", "2\\pi+18"),
    ("x^3+3x-6", "x^3+3x-5"),
    ("3\\sqrt{13}", "3\\sqrt{12}"),
    ("\\sqrt{51}", "51"),
]
NUMERIC_LIMIT, MATH_LIMIT = 20_000.0, 1.3


async def through_workers(name: str, groups: list[tuple[Problem, list[Response]]]) -> float:
    """CPU seconds of one worker and of its owner together."""
    async with RewardPool(RewardConfig(workers=1, timeout=60.0)) as pool:
        await pool.check([[PartConfig(name=name)]])
        processes = [psutil.Process(), *psutil.Process().children()]
        before = [cpu_seconds(process) for process in processes]
        await asyncio.gather(
            *(pool.score(p, responses, [PartConfig(name=name)]) for p, responses in groups)
        )
        return sum(cpu_seconds(p) - b for p, b in zip(processes, before, strict=True))


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def sums(count: int) -> list[tuple[Problem, list[Response]]]:
    """Groups of responses of 700 characters, half of them right."""
    return [
        (
            Problem([{"role": "user", "content": f"What is {i} + {i}?"}], str(2 * i)),
            [Response(f"{WORK}So it is \\boxed{{{2 * i + j % 2}}}.", 200) for j in range(GROUP)],
        )
        for i in range(count // GROUP)
    ]


def formulas(count: int) -> list[tuple[Problem, list[Response]]]:
    """Groups of formulas that are equal to, or differ from, their reference."""
    made = []
    for i in range(count // GROUP):
        reference, answer = FORMULAS[i % len(FORMULAS)]
        response = Response(f"{WORK}So it is \\boxed{{{answer}}}.", 200)
        made.append((Problem([], reference), [response] * GROUP))
    return made


def directly(count: int) -> float:
    """CPU seconds of math-verify as its README calls it, on the boxes alone."""
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    started = time.process_time()
    for i in range(count // GROUP):
        reference, answer = FORMULAS[i % len(FORMULAS)]
        for _ in range(GROUP):
            verify(parse(f"${reference}$"), parse(f"\\boxed{{{answer}}}"))
    return time.process_time() - started


def best(measure: Callable[[], float]) -> float:
    return min(measure() for _ in range(3))


def main() -> int:
    """Print both figures (best of 3); 0 within the limits."""
    numeric, math = 32_000, 1_600
    per_second = numeric / best(lambda: asyncio.run(through_workers("numeric", sums(numeric))))
    ours = best(lambda: asyncio.run(through_workers("math", formulas(math))))
    theirs = best(lambda: directly(math))
    print(
        f"numeric: {per_second:,.0f} answers a second and core, of worker and owner (limit {NUMERIC_LIMIT:,.0f})\n"
        f"math: {1e3 * ours / math:.2f} ms an answer through a worker, {1e3 * theirs / math:.2f} ms by math-verify "
        f"called directly: {ours / theirs:.2f} (limit {MATH_LIMIT})"
    )
    return 0 if per_second >= NUMERIC_LIMIT and ours <= MATH_LIMIT * theirs else 1
