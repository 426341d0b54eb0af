"""An ablation as arrays of a real Slurm: starts first, an element per cell, one table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, wait_for
from tiny_run import write_run

REPO = Path(__file__).parents[2]
pytestmark = pytest.mark.full


@pytest.mark.timeout(900)
def test_every_cell_is_an_element_and_a_start_that_fails_holds_up_its_own_only(
    tmp_path: Path,
) -> None:
    config = write_run(tmp_path, **{"train.steps": 2, "policy.tensor_parallel": 1})
    plan = {
        "config": str(config),
        "base": "grpo",
        "seeds": [1],
        "tasks": {
            "impossible": {"prepare": {"recipe": "tiny_sums", "train_problems": 10**6}},
            "sums": {},
        },
        "arms": {arm: {"algorithm.preset": arm} for arm in ("grpo", "agpo_v1")},
    }
    (tmp_path / "plan.yaml").write_text(json.dumps(plan))
    line = [sys.executable, str(REPO / "tools" / "ablate.py"), str(tmp_path / "plan.yaml")]
    line += ["--out", str(tmp_path / "out")]
    with SlurmCluster(nodes=1) as cluster:
        submitted = cluster.command(*line, "--slurm", "--", "--time=30", cwd=tmp_path)
        starts, cells = submitted.split()[1:]

        def ended() -> bool:
            states = cluster.control("show", "job", "-o", cells)
            return all(state in ("COMPLETED", "FAILED") for state in states_of(states))

        wait_for(ended, f"arrays {starts} and {cells}", 600)
        outputs = "".join(p.read_text() for p in (tmp_path / "out" / "slurm").glob("*.out"))
        states = sorted(states_of(cluster.control("show", "job", "-o", cells)))
        assert states == ["COMPLETED"] * 2 + ["FAILED"] * 2, outputs
    report = subprocess.run([*line, "--report"], capture_output=True, text=True, timeout=120)
    assert "2 of 4 cells" in report.stdout, report.stderr + outputs


def states_of(shown: str) -> list[str]:
    return [word.partition("=")[2] for word in shown.split() if word.startswith("JobState=")]
