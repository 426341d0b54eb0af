"""Masked work is not done: what a step costs of which half the groups have zero variance."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import policy_models
import pytest
import torch
from made import loss, sequence
from transformers import LlamaConfig, LlamaForCausalLM

from agpo_megatron.controller.micro_batches import plan_micro_batches
from agpo_megatron.samples import TrainSequence

pytestmark = pytest.mark.processes

GROUPS, GROUP, TOKENS, VOCAB = 8, 4, 64, 8192


def step_of(masked: bool) -> list[TrainSequence]:
    """Every other group has zero variance: advantage 0, and loss weight 0 if that is masked. The weights of the
    others are the same either way (denominators: keep)."""
    generator = torch.Generator().manual_seed(1)
    sequences = []
    for i in range(GROUPS * GROUP):
        tokens = torch.randint(0, VOCAB, (TOKENS,), generator=generator).tolist()
        constant = (i // GROUP) % 2 == 1
        weight = 0.0 if masked and constant else 1.0 / (GROUPS * GROUP * TOKENS)
        advantage = 0.0 if constant else (1.0 if i % 2 else -1.0)
        mask = [0] * 8 + [1] * (TOKENS - 8)
        name = f"g{i // GROUP}.{i % GROUP}"
        sequences.append(sequence(name, tokens, weight, mask, advantage))
    return sequences


def timed_update(policy: Any, sequences: Sequence[TrainSequence]) -> tuple[float, torch.Tensor]:
    """(CPU seconds, gradient) of one step on the sequences that have weight, as the controller plans it."""
    work = [s for s in sequences if s.scalar("loss_weight")]
    plan = plan_micro_batches([s.length for s in work], data_parallel=1, token_budget=256)
    batches = [[work[i] for i in batch] for batch in plan[0]]
    start = time.process_time()
    policy.update(batches, loss=loss(), lr=0.0)
    seconds = time.process_time() - start
    gradient = torch.cat([p.main_grad.flatten() for c in policy.chunks for p in c.parameters()])
    return seconds, gradient.clone()


@pytest.mark.full
def test_half_the_groups_masked_takes_little_more_than_half_the_time(tmp_path: Path) -> None:
    torch.manual_seed(3)
    sizes = policy_models.SMALL | {"vocab_size": VOCAB, "hidden_size": 128}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    folder = policy_models.save(model.float(), tmp_path / "hf")
    with policy_models.one_rank(folder) as policy:
        seconds: dict[bool, list[float]] = {True: [], False: []}
        gradients = {}
        for _ in range(4):
            for masked in seconds:
                spent, gradients[masked] = timed_update(policy, step_of(masked))
                seconds[masked].append(spent)
    error = (gradients[True] - gradients[False]).abs().max() / gradients[False].abs().max()
    assert gradients[False].any() and float(error) < 1e-5
    assert min(seconds[True]) <= 0.6 * min(seconds[False]), seconds
