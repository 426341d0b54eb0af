"""Measures memory and speed of tools/convert_hf_checkpoint.py on a made-up model (Llama, 1.1 B parameters, bf16).

    bench.py convert [--dir DIR] [--rounds 3]

Each round runs, one after the other and each in a process of its own: a copy of the safetensors files with the
safetensors library alone (load_file, save_file), to-megatron (TP 2 x PP 2), and to-hf back. Time is that of the work,
imports left out; conversions sync every file to disk and digest it, the copy does neither (``synced copy`` does the
former). Memory is the peak resident set above that before the work began (VmHWM of /proc; mapped pages of the source
count). Needs 11 GB of disk.

Targets: peak <= 2 x largest tensor + 256 MB; throughput >= 0.7 x that of the copy (best of the rounds each).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from agpo_megatron.conversion.building import Pace
from agpo_megatron.conversion.hf_checkpoint import HfCheckpoint
from agpo_megatron.conversion.hf_writer import HfTarget, TensorGroup, write_hf_groups
from agpo_megatron.conversion.shape import TensorSpec
from agpo_megatron.conversion.weight_map import WeightMap

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
SHARD_BYTES = 10**9
PEAK_FLOOR, SPEED = 256 << 20, 0.7
TOOL = Path(__file__).parents[1] / "convert_hf_checkpoint.py"

WORKER = """
import json, os, runpy, sys, time
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def copy(source, target, sync=False):
    Path(target).mkdir()
    for path in sorted(Path(source).glob("*.safetensors")):
        save_file(load_file(path), Path(target) / path.name)
        if sync:
            with open(Path(target) / path.name) as file:
                os.fsync(file.fileno())
    return 0

tool, words = sys.argv[1], sys.argv[2:]
convert = runpy.run_path(tool)["main"]
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
started, busy = time.perf_counter(), time.process_time()
code = copy(*words[1:]) if words[0] == "copy" else convert(words)
took, busy = time.perf_counter() - started, time.process_time() - busy
print(json.dumps({"code": code, "seconds": took, "cpu": busy, "peak": status("VmHWM") - before}))
"""


def main() -> int:
    """Print one line per measurement and a verdict; 0 when the targets are met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-convert-", dir=given.dir) as root:
        return _measure(Path(root), given.rounds)


def _measure(root: Path, rounds: int) -> int:
    source = root / "hf"
    total, largest = _make(source)
    print(f"model: {total / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB")
    best: dict[str, float] = {}
    peak: dict[str, int] = {}
    for _ in range(rounds):
        for name, words in (
            ("copy", ["copy", source, root / "copy"]),
            ("synced copy", ["copy", source, root / "synced", "sync"]),
            ("to-megatron", ["to-megatron", source, root / "m", "--tp", "2", "--pp", "2"]),
            ("to-hf", ["to-hf", root / "m", root / "back"]),
        ):
            result = _run(words)
            best[name] = min(best.get(name, float("inf")), result["seconds"])
            peak[name] = max(peak.get(name, 0), int(result["peak"]))
            print(
                f"{name:12} {result['seconds']:6.2f} s  {total / 1e9 / result['seconds']:5.2f} GB/s  "
                f"{result['cpu']:5.2f} CPU s  "
                f"peak +{result['peak'] / 1e6:.0f} MB",
                flush=True,
            )
        _check_equal(source, root / "back")
        for made in ("copy", "synced", "m", "back"):
            shutil.rmtree(root / made)
    limit = 2 * largest + PEAK_FLOOR
    met = True
    for name in ("to-megatron", "to-hf"):
        ratio = best["copy"] / best[name]
        met &= ratio >= SPEED and peak[name] <= limit
        synced = best["synced copy"] / best[name]
        print(
            f"{name}: {ratio:.2f} x the throughput of a copy (target {SPEED}), {synced:.2f} x of one synced to disk, "
            f"peak +{peak[name] / 1e6:.0f} MB (limit {limit / 1e6:.0f} MB)"
        )
    return 0 if met else 1


def _run(words: Sequence[object]) -> dict[str, float]:
    command = [sys.executable, "-c", WORKER, TOOL, *words]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    if result["code"]:
        raise RuntimeError(done.stderr)
    return result


def _make(folder: Path) -> tuple[int, int]:
    """Write random weights; returns the bytes of all tensors and of the largest."""
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).bfloat16()

    def values(spec: TensorSpec) -> dict[str, list[torch.Tensor]]:
        start = sum(spec.name.encode()) * 997 % (1 << 20)
        repeats = -(-(start + spec.numel) // len(noise))
        return {spec.name: [noise.repeat(repeats)[start : start + spec.numel].view(spec.shape)]}

    specs = [TensorSpec(n, s, "bfloat16") for n, s in WeightMap(MODEL).hf_shapes().items()]
    groups = [TensorGroup((s,), lambda s=s: values(s)) for s in specs]  # type: ignore[misc]
    target = HfTarget(folder, MODEL, max_shard_bytes=SHARD_BYTES)
    write_hf_groups(target, groups, {}, Pace())
    return sum(s.nbytes for s in specs), max(s.nbytes for s in specs)


def _check_equal(a: Path, b: Path) -> None:
    one, two = HfCheckpoint(a), HfCheckpoint(b)
    assert one.specs.keys() == two.specs.keys()
    for name in one.specs:
        assert torch.equal(one.load(name), two.load(name)), name
