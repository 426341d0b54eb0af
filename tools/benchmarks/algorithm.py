"""What the controller computes of a step before training, for 8,192 samples in groups of 16 with 16k-token responses.

``algorithm``: length rewards, advantages, masks, loss weights, the on-policy loss and its gate, from verdicts and token
counts. ``decide``: the same as the training loop runs it, from samples with their arrays to the columns of the batch
with its metrics; it also counts the tokens of each sample's loss mask. One core.
"""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Callable

import numpy as np

from agpo_megatron.algorithm.advantage import (
    is_zero_variance,
    length_advantage_covariance,
    step_advantages,
)
from agpo_megatron.algorithm.aggregation import on_policy_loss, sequence_weights
from agpo_megatron.algorithm.gate import Adaptive
from agpo_megatron.algorithm.length_reward import agpo_length_bonus
from agpo_megatron.algorithm.settings import AlgorithmSettings
from agpo_megatron.algorithm.step import StepRequest, decide
from agpo_megatron.samples import Group, Prompt, Sample, VersionSpan

SAMPLES, GROUP, TOKENS = 8192, 16, 16384
LIMIT_SECONDS = 0.5
Step = tuple[list[list[bool]], list[list[int]]]


def verdicts_and_lengths() -> Step:
    """By group; groups are mixed, all right or all wrong."""
    rng = random.Random(0)
    chances = [rng.choice([0.0, 0.3, 0.7, 1.0]) for _ in range(SAMPLES // GROUP)]
    correct = [[rng.random() < chance for _ in range(GROUP)] for chance in chances]
    lengths = [[rng.randint(TOKENS // 2, TOKENS) for _ in range(GROUP)] for _ in chances]
    return correct, lengths


def arithmetic(correct: list[list[bool]], lengths: list[list[int]]) -> float:
    """The algorithm room alone; returns phi of the step's on-policy loss."""
    raw = [[float(c) for c in group] for group in correct]
    bonus = [agpo_length_bonus(c, n, 0.1) for c, n in zip(correct, lengths, strict=True)]
    shaped = [[r + b for r, b in zip(*both, strict=True)] for both in zip(raw, bonus, strict=True)]
    advantages = step_advantages(
        raw,
        shaped,
        lengths,
        estimator="group_norm",
        zero_variance="zero",
        tol=1e-6,
        std_eps=1e-6,
        correct=correct,
    )
    kept = [not is_zero_variance(group, 1e-6) for group in raw]
    trained = [n if k else 0 for g, k in zip(lengths, kept, strict=True) for n in g]
    weights = sequence_weights(trained, trained, "token_mean")
    flat = [a for group in advantages for a in group]
    length_advantage_covariance(trained, flat)
    return Adaptive("max0").value(on_policy_loss(weights, trained, flat))


def groups_of(correct: list[list[bool]], lengths: list[list[int]]) -> list[Group]:
    """The same batch as the controller holds it; of tokens and log-probs only the number matters here."""
    zeros, ones = np.zeros(TOKENS, np.float32), np.ones(TOKENS, np.uint8)
    groups = []
    for position, (verdicts, counts) in enumerate(zip(correct, lengths, strict=True)):
        prompt = Prompt(position, np.arange(3, dtype=np.int32), "")
        samples = [
            Sample(
                group_id=prompt.group_id,
                index=i,
                prompt_tokens=prompt.tokens,
                response_tokens=zeros[:n].astype(np.int32),
                loss_mask=ones[:n],
                rollout_logprobs=zeros[:n],
                versions=(VersionSpan("0.1.", 0, n),),
                finish_reason="stop",
                raw_reward=float(right),
                correct=right,
            )
            for i, (right, n) in enumerate(zip(verdicts, counts, strict=True))
        ]
        groups.append(Group(prompt, samples))
    return groups


def measured(work: Callable[[], object]) -> tuple[float, int]:
    """Seconds (best of 5) and peak bytes allocated."""
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    tracemalloc.start()
    work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return min(seconds), peak


def main() -> int:
    step = verdicts_and_lengths()
    print(f"{SAMPLES} samples in groups of {GROUP}, responses of {TOKENS // 2} to {TOKENS} tokens")
    seconds = report("algorithm", lambda: arithmetic(*step))
    groups = groups_of(*step)
    request = StepRequest(
        algorithm=AlgorithmSettings(),
        first_step=1,
        updates=1,
        seed=0,
        max_response_tokens=TOKENS,
    )
    report("decide", lambda: decide(groups, request))
    print(f"limit of algorithm: {LIMIT_SECONDS} s")
    return 0 if seconds < LIMIT_SECONDS else 1


def report(name: str, work: Callable[[], object]) -> float:
    """One line; the seconds."""
    seconds, peak = measured(work)
    print(
        f"{name:<11} {seconds:.3f} s, peak {peak / 2**20:.1f} MiB, {peak / SAMPLES:.0f} bytes a sample"
    )
    return seconds
