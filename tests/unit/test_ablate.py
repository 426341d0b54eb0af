"""tools/ablate.py without a run: its file, its commands, and how it runs cells, goes on and refuses."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import ablate
from ablation.plan import Cell, PlanError, read_plan
from ablation.running import (
    Job,
    has_ended,
    is_finished,
    locked,
    note,
    run_cells,
    startable,
)
from ablation.slurm_array import script
from ablations import FILE, REPO, plan_of


def test_the_commands_of_the_documentation_are_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    lines = (REPO / "docs" / "ablation.md").read_text().splitlines()
    commands = [shlex.split(s, comments=True) for s in lines if s.startswith("python tools/ablate")]
    assert len(commands) == 5
    for command in commands:
        arguments, _ = ablate.parse_arguments(command[2:])
        plan = ablate.plan_of(arguments)
        assert plan.cells() and (arguments.only is None or plan.cell(arguments.only))


def test_the_ablations_of_this_project_are_plans(tmp_path: Path) -> None:
    plan = read_plan(REPO / "configs" / "ablation.yaml", tmp_path)
    assert len(plan.cells()) == len(plan.arms) * 4 * 5
    config = plan.config(Cell("exp_running", "tiny_sums_needed", 4))
    assert (config.algorithm.loss.clip.kind, config.algorithm.loss.clip.tau) == ("exp", None)
    assert (config.prepare.recipe, config.seed, config.eval.sets[0].n) == ("tiny_sums_needed", 4, 4)
    assert config.algorithm.length_reward.kind == "agpo"
    real = read_plan(REPO / "configs" / "ablation_smollm2.yaml", tmp_path)
    assert len(real.cells()) == len(real.arms) * 3
    assert real.config(Cell("agpo_v1", "sums", 1)).policy.dtype == "fp32"


def test_arms_of_a_task_and_seed_share_data_and_cold_start(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    start, grpo, v3, other = (
        plan.config(Cell(*cell))
        for cell in (
            ("start", "needed", 2),
            ("grpo", "needed", 2),
            ("v3", "needed", 2),
            ("v3", "sums", 2),
        )
    )
    assert start.model.path == str(tmp_path / "out" / "needed" / "seed-2" / "start" / "cold_start")
    for arm in (grpo, v3):
        assert (arm.model.path, arm.data.path, arm.eval.sets[0].path) == (
            start.model.path,
            start.data.path,
            start.eval.sets[0].path,
        )
        assert (arm.seed, arm.prepare.recipe, arm.train.steps) == (2, "tiny_sums_needed", 3)
    assert (grpo.algorithm.preset, v3.algorithm.preset) == ("grpo", "agpo_v3")
    assert grpo.run.dir != v3.run.dir and other.model.path != v3.model.path
    assert plan.command(Cell("v3", "sums", 2)).endswith("plan.yaml --only v3,sums,2 --out DIR")


def test_learning_rates_are_further_arms_each_with_a_base_of_its_own(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, learning_rates=[1e-4, 3e-4])
    assert list(plan.arms) == ["grpo@0.0001", "v3@0.0001", "grpo@0.0003", "v3@0.0003"]
    assert plan.config(Cell("v3@0.0003", "sums", 1)).train.lr == 3e-4
    assert plan.base_of("v3@0.0003") == "grpo@0.0003"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "dapo"}, "base and decision.controls name no arm: ['dapo']"),
        ({"arm": {}}, "arm: Extra inputs"),
        ({"seeds": [1, 1]}, "seeds: each once"),
        ({"arms": {"grpo": {}, "a/b": {}}}, "letters, digits"),
        ({"arms": {"grpo": {"algorithm.presets": "grpo"}}}, "algorithm.presets"),
        ({"arms": {"grpo": {"algorithm.loss.policy": "nll"}}}, "policy nll imitates"),
        ({"settings": {"eval.sets": []}}, "eval.sets is not set"),
    ],
)
def test_a_file_that_cannot_be_run_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps({**FILE, **changes}))
    assert ablate.main([str(path), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_cell_that_is_not_in_the_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_of(tmp_path)
    assert (
        ablate.main(
            [str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "o"), "--only", "v4,sums,1"]
        )
        == 2
    )
    assert "an arm of grpo, v3, start" in capsys.readouterr().err


def test_one_key_of_a_config_in_several_values_needs_no_file(tmp_path: Path) -> None:
    arguments, _ = ablate.parse_arguments(
        [
            FILE["config"],
            "--vary",
            "train.max_staleness=0,2",
            "--seeds",
            "4",
            "--out",
            str(tmp_path),
            "--set",
            "seed=9",
        ]
    )
    plan = ablate.plan_of(arguments)
    assert [str(cell) for cell in plan.cells()] == ["0,task,4", "2,task,4"]
    config = plan.config(Cell("2", "task", 4))
    assert (config.train.max_staleness, config.seed) == (2, 4)


def test_cells_wait_for_their_own_start_only() -> None:
    starts = [Cell("start", "sums", s) for s in (1, 2)]
    cells = [Cell("grpo", "sums", s) for s in (1, 2)]
    assert startable([*starts, *cells], [], []) == starts[0]
    assert startable([starts[1], *cells], [Job(starts[0], [])], []) == starts[1]
    assert startable(cells, [Job(starts[0], [])], []) == cells[1]
    assert startable(cells, [], [starts[0]]) == cells[1], "a start that failed"
    assert startable(cells[:1], [], [starts[0]]) is None


def test_a_start_that_fails_is_named_with_its_last_line_and_the_others_are_tried(
    tmp_path: Path,
) -> None:
    plan = plan_of(
        tmp_path, tasks={"sums": {"prepare": {"recipe": "tiny_sums", "train_problems": 10**6}}}
    )
    failed = run_cells(plan, plan.cells(), jobs=2)
    assert len(failed) == 2 + 4
    assert "start,sums,1: ended with 2: " in failed[0] + failed[1] and "lower them" in failed[0]
    assert {line for line in failed if "grpo" in line} == {
        f"grpo,sums,{s}: its start failed" for s in (1, 2)
    }


def test_a_cell_that_another_call_runs_is_left_to_it(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, seeds=[1], tasks={"sums": {}})
    (start,) = plan.starts()
    held = locked(plan, start)
    assert held is not None and locked(plan, start) is None
    failed = run_cells(plan, plan.starts(), jobs=1)
    assert failed == ["start,sums,1: another call of this tool runs it"]
    assert not (plan.run_dir(start) / "cell.json").exists()
    held.close()


def test_a_folder_of_other_settings_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(tmp_path)
    for start in plan.starts():
        note(plan, start, plan.base_settings(), True, 1.0)
    plan_of(tmp_path, settings={"train.steps": 4})
    assert ablate.main([str(tmp_path / "plan.yaml"), "--out", str(plan.out)]) == 2
    assert "train.steps=3, train.steps=4); use another --out" in capsys.readouterr().err


def test_a_folder_from_another_run_configuration_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text((REPO / "configs" / "tiny_cpu.yaml").read_text())
    plan = plan_of(tmp_path, config=str(config))
    first, second = plan.cells()[:2]
    note(plan, first, plan.base_settings(), True, 1.0)
    assert is_finished(plan, first)
    runs = Job(second, [], plan.base_settings())
    plan.run_dir(second).mkdir(parents=True)
    config.write_text(config.read_text().replace("group_size: 8", "group_size: 4"))
    assert has_ended(plan, runs, {})  # with what it began with
    for cell in (first, second):
        with pytest.raises(PlanError, match=f"{cell.arm} was made from another {config}"):
            is_finished(plan, cell)
    assert ablate.main([str(plan.path), "--out", str(plan.out), "--report"]) == 2
    assert f"was made from another {config}" in capsys.readouterr().err
    # As an earlier release of the tool left it.
    note_of_first = plan.run_dir(first) / "cell.json"
    note_of_first.write_text('{"settings": [], "finished": true, "seconds": 1.0}')
    with pytest.raises(PlanError, match="was made from another"):
        is_finished(plan, first)


@pytest.mark.parametrize(
    ("line", "arms", "repeats"),
    [
        (
            ["--vary", "train.lr=1e-4,2e-4", "--seeds", "1,2", "--set", "train.steps=3"],
            {"1e-4": {"train.lr": 1e-4}, "2e-4": {"train.lr": 2e-4}},
            "--vary train.lr=1e-4,2e-4 --seeds 1,2 --set train.steps=3 --only 2e-4,task,1 --out DIR",
        ),
        (["--set", "data.prefix=a b"], None, "--set 'data.prefix=a b' --only v3,sums,1 --out DIR"),
    ],
)
def test_a_printed_command_is_the_same_plan(
    tmp_path: Path, line: list[str], arms: dict[str, Any] | None, repeats: str
) -> None:
    path = plan_of(tmp_path).path if arms is None else Path(FILE["config"])
    arguments, _ = ablate.parse_arguments([str(path), *line])
    plan = ablate.plan_of(arguments)
    if arms:
        assert plan.arms == arms
    command = plan.command(plan.cell(repeats.split()[-3]))
    assert command == f"python tools/ablate.py {path} {repeats}"
    again, _ = ablate.parse_arguments(shlex.split(command)[2:])
    assert ablate.plan_of(again).settings(plan.cells()[0])[:3] == plan.settings(plan.cells()[0])[:3]


@pytest.mark.parametrize("line", [["--seeds", "x"], ["--seeds", "1,1"], ["--vary", "seed=a/b"]])
def test_what_cannot_be_varied_is_said(
    line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vary = [] if "--vary" in line else ["--vary", "preset=grpo,agpo"]
    assert ablate.main([FILE["config"], *vary, *line, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("ablate.py: --vary ")


def test_an_element_of_the_array_runs_its_cell(tmp_path: Path) -> None:
    cells = plan_of(tmp_path).cells()
    path = tmp_path / "array.sh"
    path.write_text(script("cells", cells, 4, tmp_path, ["echo", "run it"]))
    assert f"#SBATCH --array=0-{len(cells) - 1}%4" in path.read_text()
    for i in (0, 5):
        done = subprocess.run(
            ["bash", str(path)],
            capture_output=True,
            text=True,
            env={"SLURM_ARRAY_TASK_ID": str(i), "PATH": "/bin:/usr/bin"},
        )
        assert done.stdout == f"run it --only {cells[i]}\n"
