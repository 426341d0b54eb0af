"""Deterministic inference: a killed run ends with the weights of an undisturbed one, from samples generated anew."""

from __future__ import annotations

from pathlib import Path

import pytest
from kills import SERVER, Kill, export_bytes, finish, kill_at
from tiny_run import write_run

from agpo_megatron.observe.metrics import read_metrics

SETTINGS: dict[str, object] = {
    "algorithm.preset": "agpo_v1",  # every group has weight, however few answers are right
    "rollout.server_args": {"enable_deterministic_inference": True},
    "rollout.max_response_tokens": 40,
    "train.steps": 5,
}
KILLS: list[Kill] = [
    ("controller", "generate step 2", "journal/samples"),
    (SERVER, "generate step 3"),
    ("trainer rank 1", "update step 4"),
]


@pytest.mark.full
@pytest.mark.timeout(900)
def test_killed_and_undisturbed_runs_end_alike(tmp_path: Path) -> None:
    runs = {}
    for name in ("undisturbed", "killed", "another seed"):
        folder = tmp_path / name
        folder.mkdir()
        seed = {"seed": 2} if name == "another seed" else {}
        runs[name] = folder / "run"
        config = write_run(folder, **SETTINGS, **seed)
        if name == "killed":
            assert kill_at(config, runs[name], *KILLS).exit_code == 1
        outcome = finish(config, runs[name])
        assert outcome.exit_code == 0, outcome.output
    exports = {name: export_bytes(run) for name, run in runs.items()}
    assert exports["killed"] == exports["undisturbed"] != exports["another seed"]
    rewards, norms = (
        [[row[key] for row in read_metrics(runs[name])] for name in ("killed", "undisturbed")]
        for key in ("reward/mean", "grad_norm")
    )
    assert rewards[0] == rewards[1]
    assert norms[0] == norms[1] and min(norms[0]) > 0
