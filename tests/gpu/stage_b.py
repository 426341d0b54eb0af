"""The policy on one rank with Megatron-Core's own layers: parity with fp64, speed and memory of updates, resume."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from one_rank import activate, built, compared, llama, random_policy, sequences
from record import Record, median_seconds

SHAPES = {
    "cuda": {
        "1.5B": (1536, 8960, 28, 12, 2, 151936),
        # 18 bytes of state for each parameter: all 32 layers do not fit one GPU
        "8B, 8 of its 32 layers": (4096, 14336, 8, 32, 8, 128256),
    },
    "cpu": {"tiny": (64, 128, 2, 4, 2, 512)},
}
TOKENS = {"cuda": (4096, 16384), "cpu": (256,)}


def parity(record: Record, folder: Path) -> None:
    from agpo_megatron.config.schema import PolicyConfig
    from agpo_megatron.parity.comparison import BF16, FP32
    from agpo_megatron.parity.models import DENSE

    for name, model in DENSE.items():
        for dtype, limits in (("fp32", FP32), ("bf16", BF16)):
            policy = PolicyConfig(dtype=dtype, layers="local")
            for found in compared(folder / f"{name}-{dtype}", model, policy, limits):
                record.close(f"{name} {dtype}: {found.quantity}", found.error, found.limit)


def matmul_rate(device: str) -> float:
    """FLOP/s of one large bf16 matmul on this device."""
    n = 8192 if device == "cuda" else 256
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    return 2 * n**3 / median_seconds(lambda: a @ b, wait)


def update_flops(shape: Any, lengths: list[int]) -> float:
    """Multiply-adds of an update, twice: 6 for each weight of a matmul and token, and causal attention."""
    ffn = 3 * shape.hidden * shape.ffn
    attention = shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    weights = shape.layers * (attention + ffn)
    head = shape.vocab_size * shape.hidden
    trained = sum(n - n // 8 for n in lengths)
    scores = shape.layers * shape.heads * shape.head_dim * sum(n * n for n in lengths) * 6
    return 6.0 * (weights * sum(lengths) + head * trained) + scores


def speed(record: Record, device: str) -> None:
    from agpo_megatron.algorithm.settings import LossSettings
    from agpo_megatron.config.schema import PolicyConfig
    from agpo_megatron.conversion.shape import ModelShape
    from agpo_megatron.policy.memory import rank_memory

    rate = matmul_rate(device)
    record.figure("measured matmul rate", rate / 1e12, "TFLOP/s")
    for name, numbers in SHAPES[device].items():
        config = llama(*numbers)
        shape = ModelShape.from_hf(config)
        for tokens in TOKENS[device]:
            policy = PolicyConfig(
                dtype="bf16", layers="local", recompute="full", logprob_chunk=min(4096, tokens)
            )
            lengths = [tokens // 4] * 4
            what = f"{name}, {tokens} tokens"
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with random_policy(config, policy) as rank:
                batch = [sequences(lengths, shape.vocab_size)]
                stats: dict[str, float] = {}
                seconds = []
                for _ in range(4):
                    start = time.perf_counter()
                    stats = rank.update(batch, loss=LossSettings(policy="nll"), lr=1e-5)
                    seconds.append(time.perf_counter() - start)
            best = min(seconds[1:])
            record.check(f"{what}: finite", stats["loss/policy"] > 0 and stats["grad_norm"] > 0)
            record.figure(f"{what}: update", best, "s")
            share = update_flops(shape, lengths) / best / rate
            if device == "cuda":
                record.at_least(f"{what}: share of the matmul rate (MFU)", share, 0.45)
                used = torch.cuda.max_memory_allocated()
                record.figure(f"{what}: peak memory", used / 1e9, "GB")
                expected = rank_memory(shape, policy, tokens).total
                record.figure(f"{what}: peak over the formula", used / expected, most=1.2)
            else:
                record.figure(f"{what}: share of the matmul rate (MFU)", share)


def resume(record: Record, folder: Path) -> None:
    """A new optimizer and new weights go on, bit by bit, from a checkpoint: what a killed process leaves."""
    from agpo_megatron.algorithm.settings import LossSettings
    from agpo_megatron.config.schema import PolicyConfig, TrainConfig
    from agpo_megatron.parity import models
    from agpo_megatron.policy import checkpoint

    models.write(folder / "hf", models.LLAMA)
    policy = PolicyConfig(dtype="bf16", layers="local")
    batch = [sequences([40, 17, 29], models.LLAMA["vocab_size"])]

    def step(rank: Any) -> float:
        return float(rank.update(batch, loss=LossSettings(policy="nll"), lr=1e-3)["loss/policy"])

    with built(folder / "hf", policy, TrainConfig()) as rank:
        checkpoint.save(folder / "0", rank, 0, {})
        step(rank)
        checkpoint.save(folder / "1", rank, 1, {})
        expected = [step(rank), step(rank)]
    with built(folder / "hf", policy, TrainConfig()) as rank:
        checkpoint.load(folder / "1", rank)
        again = [step(rank), step(rank)]
        checkpoint.load(folder / "0", rank)
        step(rank)
        from_zero = [step(rank), step(rank)]
    record.check("resumed after a step: the same losses", again == expected, f"{expected}, {again}")
    record.check("resumed before any step", from_zero == expected, f"{expected}, {from_zero}")


def main() -> None:
    device, path = sys.argv[1:]
    record = Record(Path(path))
    activate(device, "local")
    with tempfile.TemporaryDirectory() as folder:
        parity(record, Path(folder))
        resume(record, Path(folder))
        speed(record, device)


if __name__ == "__main__":
    main()
