"""``kill -9`` while a checkpoint is written beside training: it is none, and nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from kills import (
    GROUP,
    PROMPTS,
    STEPS,
    check_nothing_lost_or_repeated,
    controller_log,
    export_bytes,
    finish,
    kill_at,
    partial_checkpoint,
)
from tiny_run import write_model, write_run

from agpo_megatron.config.run_folder import CHECKPOINT_MARKER, RunFolder


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("role", ["trainer rank 1", "supervisor"])
def test_a_kill_in_the_middle_of_a_save_beside_training(tmp_path: Path, role: str) -> None:
    """Training has gone on when the run is killed: at its second save, in the publish after that step. The model is
    large enough that its files take a second."""
    config = write_run(
        tmp_path, **{"run.checkpoint_every": 1, "run.export_every": 2, "run.keep_checkpoints": 2}
    )
    write_model(tmp_path / "model", layers=8, width=8)
    run = RunFolder(tmp_path / "run")
    outcome = kill_at(config, run.path, (role, "saving 2", "publish weights 2"))
    assert outcome.exit_code in (1, -9), outcome.output
    partial = partial_checkpoint(run, 2)
    assert partial.is_dir() and not (partial / CHECKPOINT_MARKER).exists(), "killed in its middle"
    assert [step for step, _ in run.complete_checkpoints()] == [1]
    assert "checkpoint of step 1:" in controller_log(run.path)
    outcome = finish(config, run.path)
    assert outcome.exit_code == 0, outcome.output
    assert not partial.exists()
    assert [step for step, _ in run.complete_checkpoints()] == [3, 4]
    check_nothing_lost_or_repeated(run.path, STEPS, PROMPTS, GROUP)
    assert sorted(p.name for p in run.exports.iterdir()) == ["step-00000002", "step-00000004"]
    outcome = finish(config, tmp_path / "replayed", "--replay", str(run.path))
    assert outcome.exit_code == 0, outcome.output
    weights = export_bytes(run.path)
    assert export_bytes(tmp_path / "replayed") == weights != b""
    assert (run.export(4) / "model.safetensors").read_bytes() == weights
