"""Guards of a real run: every one provoked, the whole ladder, killed behind a verdict, and dumps that replay."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from kills import batches, controller_log, export_bytes, finish, kill_at
from safetensors.torch import load_file
from tiny_run import write_run
from torch import equal

from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.data.stream import shuffled_position
from agpo_megatron.journal import JournalReader, StepVerdict
from agpo_megatron.observe.metrics import read_metrics

PROBLEMS, PROMPTS = 100, 4
REWARD = '''
"""A reward that goes wrong for some problems: huge, an error, or nothing for anything."""
import zlib

HUGE, BROKEN, WORTHLESS = {huge!r}, {broken!r}, {worthless!r}

def score(problem, response):
    noise = zlib.crc32(response.text.encode()) % 100 / 1000
    if problem.text in BROKEN:
        raise RuntimeError("no verdict today")
    if problem.text in WORTHLESS:
        return noise - 100
    return (1 + noise) * HUGE.get(problem.text, 1.0)
'''


def prompts_of(step: int) -> list[str]:
    """The problems of a step (seed 1), as ``tiny_run.write_problems`` writes them."""
    places = [
        shuffled_position(1, PROBLEMS, position)
        for position in range((step - 1) * PROMPTS, step * PROMPTS)
    ]
    return [f"{i % 10}+{i // 10 % 10}:" for i in places]


def write_reward(
    folder: Path,
    huge: Mapping[int, float],
    broken: range = range(0),
    worthless: range = range(0),
) -> dict[str, object]:
    """A reward that is ``huge[step]`` times what it should be, an error, or worthless, in some steps."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "wrong_reward.py"
    path.write_text(
        REWARD.format(
            huge={p: factor for step, factor in huge.items() for p in prompts_of(step)},
            broken=[p for step in broken for p in prompts_of(step)],
            worthless=[p for step in worthless for p in prompts_of(step)],
        )
    )
    return {
        "reward.function": f"{path}:score",
        "algorithm.preset": "dr_grpo",  # advantages in the reward's own unit
        "eval.sets": [],
    }


def verdicts(run_dir: Path) -> dict[int, StepVerdict]:
    return JournalReader(RunFolder(run_dir).journal).verdicts()


def numbers(verdict: StepVerdict) -> tuple[object, ...]:
    """What a replay has to meet again: everything but the settings (``nan`` equals itself here)."""
    found = [(f.guard, f.metric, repr(f.value), f.bound, f.samples) for f in verdict.findings]
    loss = [(key, repr(verdict.metrics[key])) for key in sorted(verdict.metrics)]
    return verdict.step, verdict.action, found, loss


def check_dump(run_dir: Path, step: int, code: int) -> None:
    """The command in the message, run as it stands, meets the same verdict with the same numbers."""
    dump = RunFolder(run_dir).dump(step)
    said = re.findall(r"To meet it again: (agpo-megatron .*)", controller_log(run_dir))
    (command,) = {line for line in said if f"{dump} " in line}
    new = run_dir.parent / f"replay-{step}"
    _, *arguments = shlex.split(command.replace("NEW", str(new)))
    result = subprocess.run(
        [sys.executable, "-m", "agpo_megatron", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == code, result.stdout + result.stderr
    assert numbers(verdicts(new)[step]) == numbers(verdicts(run_dir)[step])
    finding = json.loads((dump / "finding.json").read_text())
    assert finding["step"] == step and finding["findings"][0]["samples"]


@pytest.mark.full
@pytest.mark.timeout(900)
def test_spikes_go_down_the_ladder_whatever_is_killed(tmp_path: Path) -> None:
    """Gradients of a wrong reward in steps 10 to 13: warned of, skipped, rolled back, and the end of the run."""
    changes = write_reward(tmp_path / "task", dict.fromkeys(range(10, 14), 1e6))
    ladder = {"train.steps": 15, "run.checkpoint_every": 4, "guards.grad_norm": 20.0}
    config, run_dir = write_run(tmp_path, **changes, **ladder), tmp_path / "run"
    behind = ("journal/verdicts",) * 3  # that of the roll back is the third
    ended = kill_at(config, run_dir, ("controller", *behind))
    assert ended.exit_code == 1, ended.output
    assert "controller ended with code -9; starting it" in ended.output
    assert "GuardStop: guard fired in step 13" in ended.output
    found = verdicts(run_dir)
    actions = {step: verdict.action for step, verdict in found.items()}
    assert actions == {10: "warn", 11: "skip", 12: "roll_back", 13: "stop"}
    assert (found[12].first, found[12].last) == (9, 12)
    for step, verdict in found.items():
        (finding,) = verdict.findings
        assert finding.guard == "grad_norm" and finding.value > finding.bound > 0
        record = batches(JournalReader(RunFolder(run_dir).journal))[step - 1]
        assert set(finding.samples) == {record.sample_ids[row] for row in record.rows(step)}
        assert finding.samples[0] in ended.output and record.sample_ids
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(1, 14))
    assert [row["guard/fired"] for row in rows] == [0] * 9 + [1] * 4
    assert [row["guard/skipped_steps"] for row in rows[8:]] == [0, 0, 1, 4, 5]

    again = finish(config, run_dir)  # as a requeued job would
    assert again.exit_code == 1 and "GuardStop: guard fired in step 13" in again.output
    assert "change guards.grad_norm or guards.actions" in again.output
    for step, code in ((11, 0), (12, 0), (13, 1)):
        check_dump(run_dir, step, code)

    changed = ("--set", "guards.grad_norm=21")
    done = finish(config, run_dir, *changed)
    assert done.exit_code == 0, done.output
    assert {s: v.action for s, v in verdicts(run_dir).items()} == actions
    assert [row["step"] for row in read_metrics(run_dir)] == list(range(1, 16))
    replayed = finish(config, tmp_path / "replayed", "--replay", str(run_dir), *changed)
    assert replayed.exit_code == 0, replayed.output
    assert export_bytes(tmp_path / "replayed") == export_bytes(run_dir) != b""


@pytest.mark.full
@pytest.mark.timeout(600)
def test_every_other_guard_fires_and_no_step_is_taken(tmp_path: Path) -> None:
    """Bounds that a normal step breaks; rewards that are an error, too large for fp32, or gone at some steps."""
    changes = write_reward(
        tmp_path / "task", {13: 1e30}, broken=range(3, 4), worthless=range(11, 13)
    )
    bounds: dict[str, object] = {
        "guards.actions": ["skip"],
        "guards.entropy": 100.0,
        "guards.logprob_gap": 0.0,
        "guards.truncated": 0.2,
        "guards.reward_drop": 1e-7,
        "rollout.max_response_tokens": 30,
        "train.steps": 13,
    }
    config, run_dir = write_run(tmp_path, **changes, **bounds), tmp_path / "run"
    ended = finish(config, run_dir)
    assert ended.exit_code == 0, ended.output
    found, rows = verdicts(run_dir), read_metrics(run_dir)
    fired = {step: {f.guard for f in verdict.findings} for step, verdict in found.items()}
    assert all(verdict.action == "skip" for verdict in found.values())

    def steps(guard: str) -> set[int]:
        return {step for step, names in fired.items() if guard in names}

    every = set(range(1, 14))
    assert steps("entropy") >= every - {3}  # a step without a verdict has no gradient either
    assert steps("logprob_gap") >= every - {3}
    assert steps("reward_errors") == {3}
    assert steps("non_finite") == {13}
    assert steps("reward_drop") >= {11, 12}
    truncated = [row["response/truncated_frac"] for row in rows]
    assert steps("truncated") == {
        s for s in every if truncated[s - 1] > 0.2 >= min(truncated[: s - 1], default=1)
    }
    assert not math.isfinite(found[13].metrics["grad_norm"])
    assert [row["guard/skipped_steps"] for row in rows] == list(range(1, 14))
    before, after = (
        load_file(next(folder.glob("*.safetensors")))
        for folder in (tmp_path / "model", RunFolder(run_dir).exported_model)
    )
    assert all(equal(before[name], after[name]) for name in after)
    check_dump(run_dir, 13, 0)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_roll_back_without_a_checkpoint_and_ahead_of_training(tmp_path: Path) -> None:
    """Back to the initial weights, which are published, while responses of the others are still under way."""
    changes = write_reward(tmp_path / "task", {5: 1e30})
    config = write_run(
        tmp_path,
        **changes,
        **{
            "guards.actions": ["roll_back"],
            "run.checkpoint_every": 50,
            "train.max_staleness": 1,
            "train.steps": 7,
        },
    )
    run_dir = tmp_path / "run"
    ended = finish(config, run_dir)
    assert ended.exit_code == 0, ended.output
    assert {s: (v.action, v.first, v.last) for s, v in verdicts(run_dir).items()} == {
        5: ("roll_back", 1, 5)
    }
    assert [row["guard/skipped_steps"] for row in read_metrics(run_dir)] == [0, 0, 0, 0, 5, 5, 5]
    assert "bit for bit what was published" not in controller_log(run_dir)
    replayed = finish(config, tmp_path / "replayed", "--replay", str(run_dir))
    assert replayed.exit_code == 0, replayed.output
    assert export_bytes(tmp_path / "replayed") == export_bytes(run_dir) != b""
