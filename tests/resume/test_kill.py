"""``kill -9`` of each role at each phase of a real run, then the same command: nothing lost, nothing repeated."""

from __future__ import annotations

from pathlib import Path

import pytest
from kills import check_nothing_lost_or_repeated, controller_log, finish, kill_at
from tiny_run import write_run

STEPS, PROMPTS, GROUP = 4, 4, 4
SERVER = "rollout server 0"


def export_bytes(run_dir: Path) -> bytes:
    return b"".join(p.read_bytes() for p in sorted((run_dir / "hf").glob("*.safetensors")))


def kill_and_continue(tmp_path: Path, starts: list[list[tuple[str, str]]]) -> None:
    """Kill what each start names, role by phase; then let the run come to its end, and judge it."""
    config = write_run(tmp_path)
    run_dir = tmp_path / "run"
    for kills in starts:
        outcome = kill_at(config, run_dir, *kills)
        victim = kills[-1][0]
        if victim == SERVER:  # survived: restarted, given the weights, and the run comes to its end
            assert outcome.exit_code == 0, outcome.output
            assert controller_log(run_dir).count("-> dead") >= len(kills)
        elif victim == "controller":  # survived too: the trainers wait for the next one
            assert outcome.exit_code == 0, outcome.output
            assert outcome.output.count("controller ended with code -9; starting it") == len(kills)
        elif (
            victim == "supervisor"
        ):  # nobody is left to say anything; that nobody is left, kill_at has checked
            assert outcome.exit_code == -9
        else:
            assert outcome.exit_code == 1, outcome.output
            assert f"{victim} was killed by signal 9" in outcome.output
    outcome = finish(config, run_dir)
    assert outcome.exit_code == 0, outcome.output
    check_nothing_lost_or_repeated(run_dir, STEPS, PROMPTS, GROUP)
    # What the killed run learnt is what its journal says, bit for bit.
    replayed = tmp_path / "replayed"
    outcome = finish(config, replayed, "--replay", str(run_dir))
    assert outcome.exit_code == 0, outcome.output
    assert export_bytes(replayed) == export_bytes(run_dir) != b""


def test_trainer_and_server_killed_in_one_run(tmp_path: Path) -> None:
    kill_and_continue(
        tmp_path, [[("trainer rank 1", "update step 3")], [(SERVER, "generate step 4")]]
    )


@pytest.mark.full
@pytest.mark.parametrize("role", ["trainer rank 1", "supervisor"])
def test_a_role_killed_at_every_phase(tmp_path: Path, role: str) -> None:
    phases = ["generate step 1", "update step 2", "publish weights 3", "save step 4"]
    kill_and_continue(tmp_path, [[(role, phase)] for phase in phases])


@pytest.mark.full
@pytest.mark.parametrize(
    "phases",
    [
        ["generate step 1", "update step 2", "publish weights 3"],
        ["publish weights 0", "save step 2", "save step 4"],
    ],
)
def test_a_controller_killed_at_every_phase(tmp_path: Path, phases: list[str]) -> None:
    kill_and_continue(tmp_path, [[("controller", phase) for phase in phases]])


@pytest.mark.full
@pytest.mark.parametrize(
    "phases", [["generate step 2", "update step 4"], ["publish weights 2", "save step 4"]]
)
def test_a_server_killed_at_every_phase(tmp_path: Path, phases: list[str]) -> None:
    kill_and_continue(tmp_path, [[(SERVER, phase) for phase in phases]])
