"""``kill -9`` of each role at each phase of a real run, then the same command: nothing lost, nothing repeated."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from kills import check_nothing_lost_or_repeated, finish, kill_at
from tiny_run import write_run

STEPS, PROMPTS, GROUP = 4, 4, 4
ROLES = ["controller", "trainer rank 1", "rollout server 0"]
PHASES = ["generate", "update", "publish", "save"]


def phase_at(phase: str, step: int) -> str:
    return f"publish weights {step}" if phase == "publish" else f"{phase} step {step}"


def export_bytes(run_dir: Path) -> bytes:
    return b"".join(p.read_bytes() for p in sorted((run_dir / "hf").glob("*.safetensors")))


def kill_and_continue(tmp_path: Path, kills: list[tuple[str, str]]) -> None:
    """Kill at every (role, phase) in turn, each in a start of its own, until the run completes; then judge it."""
    config = write_run(tmp_path)
    run_dir = tmp_path / "run"
    for role, phase in kills:
        outcome = kill_at(config, run_dir, role, phase)
        if role != "rollout server 0":
            assert outcome.exit_code == 1, outcome.output
            assert role in outcome.output and "killed by signal 9" in outcome.output
    outcome = finish(config, run_dir)
    assert outcome.exit_code == 0, outcome.output
    check_nothing_lost_or_repeated(run_dir, STEPS, PROMPTS, GROUP)
    # What the killed run learnt is what its journal says, bit for bit.
    replayed = tmp_path / "replayed"
    outcome = finish(config, replayed, "--replay", str(run_dir))
    assert outcome.exit_code == 0, outcome.output
    assert export_bytes(replayed) == export_bytes(run_dir) != b""


def test_trainer_controller_and_server_killed_in_one_run(tmp_path: Path) -> None:
    kill_and_continue(
        tmp_path,
        [
            ("trainer rank 1", phase_at("update", 1)),
            ("controller", phase_at("save", 2)),
            ("rollout server 0", phase_at("generate", 4)),
        ],
    )


@pytest.mark.full
@pytest.mark.parametrize(("role", "phase"), list(itertools.product(ROLES, PHASES)))
def test_every_role_at_every_phase(tmp_path: Path, role: str, phase: str) -> None:
    kill_and_continue(tmp_path, [(role, phase_at(phase, 2))])
