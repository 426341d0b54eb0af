"""A whole run on one machine whose trainers have no SGLang and whose servers have no Megatron-Core."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_cluster_environments import environment_without
from tiny_run import write_run

REPO = Path(__file__).parents[2]


@pytest.mark.full
def test_trainers_and_servers_run_in_environments_of_their_own(tmp_path: Path) -> None:
    train = environment_without(tmp_path / "train", "sglang")
    rollout = environment_without(tmp_path / "rollout", "megatron")
    config = write_run(tmp_path, **{"train.steps": 2})
    env = {**os.environ, "TRAIN_PYTHON": str(train), "ROLLOUT_PYTHON": str(rollout)}
    env["PYTHONPATH"] = str(REPO)
    command = ["bash", str(REPO / "launch" / "local.sh"), str(config)]
    done = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "run")], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]
    # The same with one environment for both ends before a weight is loaded, and says what to do.
    env["ROLLOUT_PYTHON"] = str(train)
    refused = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "other")], env=env, capture_output=True, text=True
    )
    assert refused.returncode == 2 and sys.executable not in refused.stderr
    assert "has no sglang; set ROLLOUT_PYTHON" in refused.stderr
