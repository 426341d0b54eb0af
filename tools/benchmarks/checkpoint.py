"""Measures how long a save holds up training: ``run.async_save`` on and off, in turns, against an update step.

An untrained model of SmolLM2-135M's shape in the layout of configs/smollm2_cpu.yaml (PP 2, bf16, two real ranks over
gloo), 128 sequences to a step as there. Held up: the time in which the command loop of the slowest rank does nothing
else: taking the state and copying it, asking whether the files are written, completing the checkpoint. What writing
costs the step beside it shows in that step's own time. ``--folder`` chooses the file system.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from agpo_megatron.algorithm.settings import LossSettings
from agpo_megatron.config.schema import PolicyConfig, TrainConfig
from agpo_megatron.parity.ranks import Ranks
from agpo_megatron.samples import TrainSequence

POLICY = PolicyConfig(pipeline_parallel=2, dtype="bf16")
SEQUENCES, PROMPT, RESPONSE, MICRO_BATCH = 128, 28, 6, 30
LIMIT = 0.10  # of an update step


def write_model(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def micro_batches(count: int) -> list[list[TrainSequence]]:
    """``count`` sequences with a weight each, in the micro-batches of 1,024 tokens that the config has."""
    rng = np.random.default_rng(0)
    made = [
        TrainSequence(
            f"s{i}",
            rng.integers(3, 49152, PROMPT, dtype=np.int32),
            rng.integers(3, 49152, RESPONSE, dtype=np.int32),
            np.ones(RESPONSE, np.uint8),
            columns={"loss_weight": 0.01, "advantage": 1.0 if i % 2 else -1.0},
        )
        for i in range(count)
    ]
    return [made[i : i + MICRO_BATCH] for i in range(0, count, MICRO_BATCH)]


def execute(rank: int, model: str, folder: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of one rank by name, an entry per round."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    from agpo_megatron.policy import backend

    backend.activate("cpu")
    import torch.distributed as dist

    from agpo_megatron.policy import checkpoint, parallel
    from agpo_megatron.policy.policy import Policy

    found: dict[str, list[float]] = {}

    def timed(name: str, action: Any) -> Any:
        dist.barrier()
        started = time.perf_counter()
        result = action()
        seconds = time.perf_counter() - started
        found.setdefault(name, []).append(seconds)
        if rank == 0 and name != "ask":
            print(f"{name}: {seconds:.3f} s", file=sys.stderr, flush=True)
        return result

    try:
        policy = Policy.build(model, POLICY, TrainConfig(), temperature=1.0, seed=1)
        batches, loss = micro_batches(SEQUENCES), LossSettings(policy="nll")

        def update() -> None:
            policy.update(batches, loss=loss, lr=1e-6)

        update()
        for number in range(rounds):
            target = Path(folder) / f"step-{number}"
            timed("step", update)
            timed("sync", lambda t=target: checkpoint.save(t, policy, 1, {}))
            if rank == 0:
                shutil.rmtree(target)
            pending = timed(
                "async: begin", lambda t=target: checkpoint.begin_save(t, policy, 1, {})
            )
            done, asked = False, 0.0
            while not done:
                timed("step beside", update)
                done = timed("ask", pending.done)
                asked += found.pop("ask")[0]
            timed("async: complete", lambda p=pending: p.finish(60))
            begun, completed = found["async: begin"][-1], found["async: complete"][-1]
            found.setdefault("async", []).append(begun + asked + completed)
            found.setdefault("async: files", []).append(pending.seconds)
            found.setdefault("GB", []).append(pending.bytes / 1e9)
            if rank == 0:
                shutil.rmtree(target)
        return found
    finally:
        parallel.shutdown()


def main() -> int:
    """Print medians over the rounds, of the slowest rank; 0 where a save beside training is within the limit."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", help="parent of the folder that is written (default: temporary)"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        write_model(Path(folder) / "model")
        ranks = Ranks(POLICY.world_size)
        try:
            answers = ranks.run(
                POLICY.world_size,
                execute,
                str(Path(folder) / "model"),
                folder,
                arguments.rounds,
                timeout=3600,
            )
        finally:
            ranks.close()
    taken = {
        name: [max(values) for values in zip(*(a[name] for a in answers), strict=True)]
        for name in answers[0]
    }
    size = sum(answer["GB"][0] for answer in answers)
    step = median(taken["step"])
    print(
        f"{size:.2f} GB on {len(answers)} ranks; medians of {arguments.rounds} rounds [least to most]"
    )
    for name, values in taken.items():
        if name != "GB":
            print(
                f"{name:16} {median(values):7.3f} s [{min(values):.3f} to {max(values):.3f}], "
                f"{100 * median(values) / step:6.1f} % of a step"
            )
    return 0 if median(taken["async"]) < LIMIT * step else 1


if __name__ == "__main__":
    sys.exit(main())
