"""Measures what generating ahead of the trainer gains, with the product's own code in virtual time.

``--loop``: what the controller's event loop takes in real time.

The fleet of configs/agpo_70b.yaml: 24 nodes, split between a simulated trainer and simulated servers (fleet/servers.py
has their model). Everything between them runs as it is: the window, the producer, rollouts, pool, slots and journal.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from dataclasses import replace

from benchmarks.fleet.dispatch import dispatch_seconds, loop_lag
from benchmarks.fleet.training import Arm, Result, simulate

LAG_LIMIT = 0.1
"""Seconds, 99 of 100 times: an event loop blocked for longer lets servers wait."""
BALANCED = {"servers": 12, "train_seconds": 70.0 * 16 / 12}
ARMS = (
    Arm("staleness 0, 16:8", 0),
    Arm("staleness 1, 16:8", 1),
    Arm("staleness 2, 16:8", 2),
    Arm("staleness 2, 16:8, 256 slots", 2, slots=256),
    Arm("staleness 2, 16:8, keep", 2, keep=True),
    Arm("staleness 2, 12:12", 2, **BALANCED),
    Arm("staleness 4, 12:12", 4, **BALANCED),
    Arm("staleness 4, 12:12, keep", 4, keep=True, **BALANCED),
    Arm("half accepted, 0, 16:8", 0, accepted=0.5),
    Arm("half accepted, 2, 16:8", 2, accepted=0.5),
)
HEADER = (
    f"{'arm':28s} {'step s':>7s} {'speed':>6s} {'trainer idle':>12s} {'decoding':>8s} {'prefill':>8s} "
    f"{'slots':>6s} {'lost':>5s} {'aborted':>7s} {'replaced':>8s} {'bias':>7s} "
    f"{'staleness':>9s} {'max':>3s} {'CPU s':>6s}"
)


def row(arm: Arm, found: Result, base: Result, cpu: float) -> str:
    return (
        f"{arm.name:28s} {found.step_seconds:7.1f} {base.step_seconds / found.step_seconds:6.2f} "
        f"{found.trainer_idle:12.1%} {found.decoding:8.1%} {found.prefilling:8.1%} {found.slots_used:6.1%} "
        f"{found.lost:5d} {found.aborted:7d} {found.replaced:8d} {found.length_bias:+7.2%} {found.staleness:9.2f} "
        f"{found.staleness_max:3d} {cpu:6.1f}"
    )


def scaled(arm: Arm, part: int) -> Arm:
    """The same with a ``part``-th of the servers and of the batch."""
    return replace(arm, servers=arm.servers // part, groups=arm.groups // part)


def measure_loop(rate: int) -> int:
    """Print what the event loop takes in real time; 0 within the limit."""
    seconds = dispatch_seconds()
    print(f"12,800 groups of 8 on 8,192 slots, answered at once: {seconds:.1f} CPU s", flush=True)
    lag = loop_lag(rate)
    late = (
        f"p50 {lag.p50 * 1e3:.1f} ms, p99 {lag.p99 * 1e3:.1f} ms, at most {lag.most * 1e3:.1f} ms"
    )
    print(
        f"64 servers, {lag.tokens_per_s:,.0f} tokens/s in fragments of 2,048 with log-probs: loop lag {late} "
        f"(limit of p99: {LAG_LIMIT * 1e3:.0f} ms), longest call {lag.longest * 1e3:.1f} CPU ms, "
        f"{lag.cpu * 1e3:.2f} CPU ms a fragment; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    return 0 if lag.p99 < LAG_LIMIT else 1


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--part", type=int, default=4, help="simulate a PART-th of the fleet and of its batches"
    )
    parser.add_argument("--only", type=int, nargs="*", help="numbers of arms, from 0")
    parser.add_argument(
        "--loop", action="store_true", help="measure the controller's event loop instead"
    )
    parser.add_argument(
        "--rate",
        type=int,
        default=450_000,
        help="tokens/s of all servers; they reach about 320,000 of the default",
    )
    options = parser.parse_args()
    if options.loop:
        return measure_loop(options.rate)
    logging.disable(logging.WARNING)
    print(HEADER, flush=True)
    bases: dict[bool, Result] = {}
    for number, arm in enumerate(ARMS):
        if options.only and number not in options.only:
            continue
        started = time.process_time()
        found = simulate(scaled(arm, options.part))
        base = bases.setdefault(arm.accepted is None, found)
        print(row(arm, found, base, time.process_time() - started), flush=True)
    return 0
