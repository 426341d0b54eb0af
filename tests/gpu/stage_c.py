"""Transformer Engine's layers on one GPU: packed sequences with and without padding, FP8 recipes, their gap to bf16.

Each variant is a process of its own, since megatron-core chooses layers and optimizer when it is imported. Not yet run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from one_rank import activate, built, llama, sequences
from record import Record

LENGTHS = {"without padding": [256, 128, 128], "with padding": [201, 77, 64, 3]}
VARIANTS = ("local", "none", "tensorwise", "blockwise", "mxfp8")
STEPS = 3
# Largest mean difference of log-probs, in nats, and of the gradient norm, relative to bf16's.
GAPS = {
    "none": (0.02, 0.05),
    "tensorwise": (0.1, 0.2),
    "blockwise": (0.1, 0.2),
    "mxfp8": (0.1, 0.2),
}


def work(variant: str, folder: str) -> dict[str, Any]:
    """Losses, gradient norms and log-probs of one variant, by packing."""
    activate("cuda", "local" if variant == "local" else "auto")
    from agpo_megatron.algorithm.settings import LossSettings
    from agpo_megatron.config.schema import Fp8Config, PolicyConfig, TrainConfig

    recipe: Any = "none" if variant in ("local", "none") else variant
    policy = PolicyConfig(
        dtype="bf16",
        fp8=Fp8Config(recipe=recipe, format="e4m3"),
        layers="local" if variant == "local" else "auto",
    )
    found: dict[str, Any] = {}
    for name, lengths in LENGTHS.items():
        with built(Path(folder), policy, TrainConfig(grad_clip=0.0)) as rank:
            batch = [sequences(lengths, 4096)]
            scores = rank.score(batch)
            stats = [
                rank.update(batch, loss=LossSettings(policy="nll"), lr=1e-4) for _ in range(STEPS)
            ]
            found[name] = {
                "logprobs": [float(x) for key in sorted(scores) for x in scores[key].logprobs],
                "losses": [s["loss/policy"] for s in stats],
                "norms": [s["grad_norm"] for s in stats],
            }
    return found


def compare(record: Record, variant: str, found: dict[str, Any], base: dict[str, Any]) -> None:
    allowed, norm = GAPS[variant]
    for name, mine in found.items():
        its = base[name]
        pairs = list(zip(mine["logprobs"], its["logprobs"], strict=True))
        gap = sum(abs(a - b) for a, b in pairs) / len(pairs)
        record.close(f"{variant}, {name}: log-probs", gap, allowed)
        first = abs(mine["norms"][0] / its["norms"][0] - 1)
        record.close(f"{variant}, {name}: norm of the first gradient", first, norm)
        falls = mine["losses"][-1] < mine["losses"][0]
        record.check(f"{variant}, {name}: the loss falls", falls, str(mine["losses"]))


def main() -> None:
    if sys.argv[1] == "work":
        sys.stdout.write("\n" + json.dumps(work(*sys.argv[2:])) + "\n")
        return
    record = Record(Path(sys.argv[2]))
    import torch

    from agpo_megatron.parity import models

    with tempfile.TemporaryDirectory() as folder:
        models.write(Path(folder) / "hf", llama(512, 1024, 4, 8, 4, 4096))
        found: dict[str, Any] = {}
        for variant in VARIANTS:
            capability = torch.cuda.get_device_capability()
            if variant == "mxfp8" and capability < (10, 0):
                record.skip(variant, f"needs compute capability 10.0, this is {capability}")
                continue
            command = [sys.executable, __file__, "work", variant, str(Path(folder) / "hf")]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if done.returncode:
                record.check(f"{variant}: runs", False, done.stderr.strip()[-200:])
                continue
            found[variant] = json.loads(done.stdout.splitlines()[-1])
            if variant != "local" and "local" in found:
                compare(record, variant, found[variant], found["local"])


if __name__ == "__main__":
    main()
