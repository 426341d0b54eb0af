"""What is here: devices, drivers, packages of both environments; and so, why a stage cannot run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[2]
PROBE = REPO / "agpo_megatron" / "cluster" / "environment_probe.py"
PACKAGES = [
    "torch",
    "triton",
    "megatron-core",
    "transformer-engine",
    "transformer-engine-torch",
    "sglang",
    "sglang-kernel",
    "flashinfer-python",
    "nvidia-nccl-cu13",
    "transformers",
    "liger-kernel",
    "cut-cross-entropy",
]
DEVICES = """
import json, torch
there = torch.cuda.is_available()
facts = {"cuda": torch.version.cuda, "gpus": []}
for i in range(torch.cuda.device_count() if there else 0):
    p = torch.cuda.get_device_properties(i)
    facts["gpus"].append([p.name, p.total_memory, f"{p.major}.{p.minor}"])
print(json.dumps(facts))
"""


def environment(python: str, *modules: str) -> dict[str, Any]:
    """Versions and imports that fail, of one interpreter; an empty one with the reason where it cannot be run."""
    command = [python, "-P", str(PROBE), json.dumps([PACKAGES, modules])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return {"versions": {}, "broken": dict.fromkeys(modules, f"{python}: {error}")}
    return answer


def describe() -> dict[str, Any]:
    """Everything that the report says about the machine."""
    train = os.environ.get("TRAIN_PYTHON", sys.executable)
    rollout = os.environ.get("ROLLOUT_PYTHON", train)
    devices: dict[str, Any] = {"cuda": None, "gpus": []}
    done = subprocess.run([train, "-c", DEVICES], capture_output=True, text=True)
    if done.returncode == 0:
        devices = json.loads(done.stdout.splitlines()[-1])
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        driver = []
    gpu_only = ("transformer_engine.pytorch",) if devices["gpus"] else ()
    return {
        **devices,
        "driver": driver[0] if driver else None,
        "train": {"python": train, **environment(train, "torch", *gpu_only)},
        "rollout": {"python": rollout, **environment(rollout)},
    }


def missing(stage: str, machine: dict[str, Any], device: str) -> str:
    """Why ``stage`` cannot run here on ``device``; "" if it can."""
    train, rollout = machine["train"], machine["rollout"]["versions"]
    gpus = len(machine["gpus"])
    if "torch" not in train["versions"]:
        return f"no torch in {train['python']}"
    if device == "cpu":
        if stage not in "ab":
            return "has no small version for the CPU"
    elif not gpus:
        return "torch sees no CUDA device"
    if stage in "bcef" and "megatron-core" not in train["versions"]:
        return f"no megatron-core in {train['python']}"
    engine = train["broken"].get("transformer_engine.pytorch")
    if stage == "c" and engine:
        return f"Transformer Engine cannot be imported: {engine}"
    if stage in "de" and "sglang" not in rollout:
        return f"no SGLang in {machine['rollout']['python']}"
    if stage == "d" and "megatron-core" not in train["versions"]:
        return f"no megatron-core in {train['python']}"
    if stage == "f" and gpus < 8:
        return f"needs 8 GPUs, there are {gpus}"
    return ""
