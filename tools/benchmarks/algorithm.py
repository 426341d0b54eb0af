"""Measures what the controller decides of a batch: 8,192 samples in groups of 16 with responses of up to 16k tokens.

``decide`` as the training loop runs it, from samples with their arrays to the columns of the batch with its metrics:
length rewards, advantages, masks, loss weights, tokens of each loss mask. One core.
"""

from __future__ import annotations

import random
import time
import tracemalloc

import numpy as np

from agpo_megatron.algorithm.settings import AlgorithmSettings
from agpo_megatron.algorithm.step import StepRequest, decide
from agpo_megatron.samples import Group, Prompt, Sample, VersionSpan

SAMPLES, GROUP, TOKENS = 8192, 16, 16384
LIMIT_SECONDS = 0.5


def groups_of_a_batch() -> list[Group]:
    """Make groups that are mixed, all right or all wrong; of tokens and log-probs only the number matters here."""
    rng = random.Random(0)
    zeros, ones = np.zeros(TOKENS, np.float32), np.ones(TOKENS, np.uint8)
    groups = []
    for position in range(SAMPLES // GROUP):
        prompt = Prompt(position, np.arange(3, dtype=np.int32), "")
        chance = rng.choice([0.0, 0.3, 0.7, 1.0])
        lengths = [rng.randint(TOKENS // 2, TOKENS) for _ in range(GROUP)]
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
                correct=(right := rng.random() < chance),
                raw_reward=float(right),
            )
            for i, n in enumerate(lengths)
        ]
        groups.append(Group(prompt, samples))
    return groups


def main() -> int:
    """Print seconds (best of 5) and peak bytes allocated; 0 within the limit."""
    groups = groups_of_a_batch()
    request = StepRequest(
        algorithm=AlgorithmSettings(),
        first_step=1,
        updates=1,
        seed=0,
        max_response_tokens=TOKENS,
    )
    turns = []
    for _ in range(5):
        started = time.perf_counter()
        decide(groups, request)
        turns.append(time.perf_counter() - started)
    tracemalloc.start()
    decide(groups, request)
    peak = tracemalloc.get_traced_memory()[1]
    print(
        f"{SAMPLES} samples in groups of {GROUP}, responses of {TOKENS // 2} to {TOKENS} tokens: {min(turns):.3f} s "
        f"(limit {LIMIT_SECONDS} s), peak {peak / 2**20:.1f} MiB, {peak / SAMPLES:.0f} bytes a sample"
    )
    return 0 if min(turns) < LIMIT_SECONDS else 1
