"""tools/ablate.py with real runs: killed in the middle, called again, repeated by somebody else."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from tiny_run import write_run

from agpo_megatron.observe.metrics import read_metrics

REPO = Path(__file__).parents[2]
pytestmark = pytest.mark.full
STEPS = 6


def write_plan(folder: Path) -> Path:
    """Two arms of the tiny run of the tests, one seed."""
    config = write_run(folder, **{"train.steps": STEPS, "policy.tensor_parallel": 1})
    plan = {
        "config": str(config),
        "base": "grpo",
        "seeds": [1],
        "tasks": {"sums": {}},
        "arms": {
            # +1 and -1 for uniform groups: every step trains, also with a random model
            "own": {
                "algorithm": {"preset": "agpo_v1", "loss": {"clip": {"kind": "exp", "tau": None}}}
            },
            "grpo": {"algorithm.preset": "grpo"},
        },
        "settings": {
            "eval.sets": [{"path": str(folder / "eval.jsonl"), "n": 2, "temperature": 1.0}],
            "rollout.server_args": {"enable_deterministic_inference": True},
            "rollout.group_size": 8,
            "train.prompts_per_batch": 16,  # of a random model few answers are right
        },
    }
    path = folder / "plan.yaml"
    path.write_text(json.dumps(plan))
    return path


def command(plan: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, str(REPO / "tools" / "ablate.py"), str(plan), "--out", str(out), *more]


def ablate(plan: Path, out: Path, *more: str) -> str:
    done = subprocess.run(command(plan, out, *more), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def of_run(out: Path) -> list[psutil.Process]:
    """What works on a folder of ``out``."""
    return [
        p
        for p in psutil.process_iter(["cmdline"])
        if f"{out}/" in " ".join(p.info["cmdline"] or [])
    ]


@pytest.mark.timeout(900)
def test_a_killed_ablation_goes_on_and_somebody_else_gets_the_same_numbers(tmp_path: Path) -> None:
    plan, out = write_plan(tmp_path), tmp_path / "out"
    first = out / "sums" / "seed-1" / "own"
    tool = subprocess.Popen(command(plan, out))
    deadline = time.monotonic() + 200
    while len(read_metrics(first)) < 3:
        assert tool.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    tool.send_signal(signal.SIGKILL)
    tool.wait(10)
    deadline = time.monotonic() + 60
    while of_run(out) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert of_run(out) == []

    text = ablate(plan, out)
    assert "2 of 2 cells" in text
    for arm in ("grpo", "own"):
        steps = [row["step"] for row in read_metrics(out / "sums" / "seed-1" / arm)]
        assert steps == list(range(1, STEPS + 1))
    rows = read_metrics(first)
    known: list[float] = []
    for row in rows:  # the running deviation went on through the kill
        weights = 0.95 ** np.arange(len(known))[::-1]
        mean = np.average(known, weights=weights) if known else 0.0
        spread = np.average((known - mean) ** 2, weights=weights) if len(known) > 1 else 1.0
        assert row["loss/gate_level"] == pytest.approx(max(spread**0.5, 1e-6), rel=1e-3, abs=1e-6)
        known.append(row["loss/unclipped"])
    assert len({row["loss/gate_level"] for row in rows}) > 2
    logged = [len(list(out.rglob("*.log"))), (out / "results.json").read_bytes()]
    assert "begun" not in ablate(plan, out), "nothing is run again"
    assert [len(list(out.rglob("*.log"))), (out / "results.json").read_bytes()] == logged

    # Undisturbed, in another folder: one row, one command, bit for bit the numbers of the killed one.
    said = ablate(plan, tmp_path / "theirs", "--only", "own,sums,1")
    theirs = json.loads(said[said.index("{") :])
    cells = json.loads((out / "results.json").read_text())["cells"]
    (ours,) = [cell for cell in cells if cell["cell"] == "own,sums,1"]
    known_numbers = {name: value for name, value in theirs.items() if not math.isnan(value)}
    assert known_numbers == {name: ours[name] for name in known_numbers} and len(known_numbers) > 8
