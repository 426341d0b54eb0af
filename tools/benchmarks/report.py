"""Measures `agpo-megatron report` on a made-up journal of a given size, written by the product's own writer.

    bench.py report [--gigabytes 1] [--tokens 2000] [--group 8] [--batch 512] [--dir DIR]

Samples have half to one and a half times ``--tokens`` response tokens, log-probs of server and trainer, and a text of
four bytes a token; a batch has ``--batch`` samples, and the journal as many batches as reach the size. The report is
made in a process of its own: its time is that of the whole command, imports included; its memory the peak resident set
of the process. There is no tokenizer, so that tokens are shown as numbers. Needs twice the size of disk at most.

Targets for 1 GB: less than 60 s and less than 2 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.journal import BatchRecord, Journal
from agpo_megatron.journal.records import sequence_columns
from agpo_megatron.observe.metrics import MetricsWriter
from agpo_megatron.samples import Group, Prompt, Sample, VersionSpan

SECONDS, BYTES = 60.0, 2 * 10**9
COMMAND = """
import json, sys, time
from pathlib import Path
started = time.perf_counter()
from agpo_megatron.cli import main
code = main(["report", sys.argv[1]])
lines = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
work = {"code": code, "peak": peak, "cpu": time.process_time(), "inside": time.perf_counter() - started}
print(json.dumps(work))
"""


def main() -> int:
    """Print what was made and what its report took; 0 when the targets are met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--dir", type=Path, help="where to work (default: a temporary folder)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-report-", dir=given.dir) as root:
        run = RunFolder(Path(root) / "run")
        run.path.mkdir()
        samples, steps = _make(run, given.gigabytes * 1e9, given.tokens, given.group, given.batch)
        size = _size(run.journal)
        print(f"journal: {size / 1e9:.2f} GB, {steps} batches, {samples} samples", flush=True)
        return _measure(run)


def _measure(run: RunFolder) -> int:
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, str(run.path)], capture_output=True, text=True, check=False
    )
    took = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(done.stderr)
    result = json.loads(done.stdout.splitlines()[-1])
    if result["code"]:
        raise RuntimeError(done.stderr)
    page = (run.path / "report.html").stat().st_size
    print(
        f"report: {took:.1f} s ({result['cpu']:.1f} CPU s), peak {result['peak'] / 1e9:.2f} GB, "
        f"page {page / 1e6:.1f} MB (limits {SECONDS:.0f} s, {BYTES / 1e9:.0f} GB)"
    )
    return 0 if took < SECONDS and result["peak"] < BYTES else 1


def _make(run: RunFolder, size: float, tokens: int, group: int, batch: int) -> tuple[int, int]:
    """Write batches until the journal has ``size`` bytes; return the numbers of samples and of batches."""
    journal, random = Journal(run.journal), np.random.default_rng(0)
    metrics = MetricsWriter(run.path, tensorboard=False)
    written = samples = step = 0
    while written < size:
        groups = [
            _group(step * (batch // group) + i, step, group, tokens, random)
            for i in range(batch // group)
        ]
        rewards = _commit(journal, groups, step, random)
        samples += len(rewards)
        step += 1
        metrics.write({"step": step, "reward/mean": float(rewards.mean()), "time/step": 1.0})
        written = _size(run.journal)
    metrics.close()
    return samples, step


def _group(position: int, step: int, size: int, tokens: int, random: np.random.Generator) -> Group:
    prompt = Prompt(position, np.arange(100, dtype=np.int32), "42", "a problem " * 20, "made")
    samples = []
    for i in range(size):
        n = int(random.integers(tokens // 2, tokens * 3 // 2))
        samples.append(
            Sample(
                group_id=prompt.group_id,
                index=i,
                prompt_tokens=prompt.tokens,
                response_tokens=random.integers(0, 100_000, n, dtype=np.int32),
                loss_mask=np.ones(n, np.uint8),
                rollout_logprobs=-random.random(n, dtype=np.float32),
                versions=(VersionSpan(f"{step}.1.a", 0, n),),
                finish_reason="stop",
                text="word" * n,
                raw_reward=float(random.random()),
                correct=bool(i % 2),
            )
        )
    return Group(prompt, samples)


def _commit(
    journal: Journal, groups: list[Group], step: int, random: np.random.Generator
) -> np.ndarray:
    """Append the groups and commit them as one batch that was scored; return the rewards."""
    blocks = [block for journaled in journal.append(groups) for block in journaled.blocks]
    samples = [sample for group in groups for sample in group.samples]
    rewards = np.array([sample.raw_reward for sample in samples])
    decided = {
        "reward": rewards.tolist(),
        "advantage": (rewards - rewards.mean()).tolist(),
        "loss_weight": [1.0] * len(samples),
        "trained": [len(sample.response_tokens) for sample in samples],
    }
    record = BatchRecord(
        first_step=step + 1,
        updates=1,
        attempt=journal.attempt,
        cursor=groups[-1].prompt.position + 1,
        weight_version=f"{step}.1.a",
        sample_ids=[sample.sample_id for sample in samples],
        tokens=np.array([sample.length for sample in samples], np.int32),
        samples=blocks,
        details=[],
        columns=sequence_columns(decided, len(samples)),
    )
    scores = [
        s.rollout_logprobs + random.normal(0, 0.01, len(s.rollout_logprobs)).astype(np.float32)
        for s in samples
    ]
    journal.commit(record, {"old_logprobs": scores})
    return rewards


def _size(folder: Path) -> int:
    return sum(os.stat(path).st_size for path in folder.rglob("*.arrow"))


if __name__ == "__main__":
    raise SystemExit(main())
