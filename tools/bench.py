"""Benchmarks of single parts: ``python tools/bench.py algorithm``.

algorithm: what the controller computes of a step before training, for 8,192 samples in groups of 16 with 16k-token
responses: length rewards, advantages, masks, loss weights, the on-policy loss and its gate. One core; masks count as
numbers of tokens, so nothing here depends on the length of a response.
"""

from __future__ import annotations

import argparse
import random
import time
import tracemalloc
from collections.abc import Callable

from agpo_megatron.algorithm.adaptive_loss import Adaptive
from agpo_megatron.algorithm.advantage import (
    is_zero_variance,
    length_advantage_covariance,
    step_advantages,
)
from agpo_megatron.algorithm.aggregation import on_policy_loss, sequence_weights
from agpo_megatron.algorithm.length_reward import agpo_length_bonus

SAMPLES, GROUP, TOKENS = 8192, 16, 16384
LIMIT_SECONDS = 0.5


def step_of_work() -> Callable[[], float]:
    """A step whose groups are mixed, all right or all wrong; the callable decides it and returns its loss."""
    rng = random.Random(0)
    chances = [rng.choice([0.0, 0.3, 0.7, 1.0]) for _ in range(SAMPLES // GROUP)]
    correct = [[rng.random() < chance for _ in range(GROUP)] for chance in chances]
    lengths = [[rng.randint(TOKENS // 2, TOKENS) for _ in range(GROUP)] for _ in chances]

    def decide() -> float:
        raw = [[float(c) for c in group] for group in correct]
        bonus = [agpo_length_bonus(c, n, 0.1) for c, n in zip(correct, lengths, strict=True)]
        shaped = [
            [r + b for r, b in zip(*both, strict=True)] for both in zip(raw, bonus, strict=True)
        ]
        advantages = step_advantages(
            raw,
            shaped,
            lengths,
            estimator="group_norm",
            zero_variance="zero",
            tol=1e-6,
            std_eps=1e-6,
            r_max=1.0,
            r_min=0.0,
        )
        kept = [not is_zero_variance(group, 1e-6) for group in raw]
        trained = [n if k else 0 for g, k in zip(lengths, kept, strict=True) for n in g]
        weights = sequence_weights(trained, trained, "token_mean")
        flat = [a for group in advantages for a in group]
        length_advantage_covariance(trained, flat)
        return Adaptive("max0").value(on_policy_loss(weights, trained, flat))

    return decide


def algorithm() -> dict[str, float]:
    """Seconds (best of 5) and peak bytes of one step."""
    decide = step_of_work()
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        decide()
        seconds.append(time.perf_counter() - started)
    tracemalloc.start()
    decide()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {"seconds": min(seconds), "peak_bytes": float(peak)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["algorithm"])
    parser.parse_args()
    found = algorithm()
    print(
        f"algorithm: {SAMPLES} samples in groups of {GROUP}, responses up to {TOKENS} tokens: "
        f"{found['seconds']:.3f} s (limit {LIMIT_SECONDS} s), peak {found['peak_bytes'] / 2**20:.1f} MiB, "
        f"{found['peak_bytes'] / SAMPLES:.0f} bytes a sample"
    )
    return 0 if found["seconds"] < LIMIT_SECONDS else 1


if __name__ == "__main__":
    raise SystemExit(main())
