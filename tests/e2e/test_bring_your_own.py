"""docs/bring_your_own.md, executed: its files are written as they stand there, trained on, evaluated, scored again."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_run import write_model

from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.controller.evaluation import samples_path
from agpo_megatron.data.rows import read_arrow
from agpo_megatron.observe.metrics import read_metrics

REPO = Path(__file__).parents[2]
PAGE = (REPO / "docs" / "bring_your_own.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)(?: (file|append)=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALL = [
    "train.steps=1",
    "train.prompts_per_batch=2",
    "policy.dtype=fp32",
    "rollout.group_size=4",
    "rollout.max_response_tokens=12",
    "data.max_prompt_tokens=128",
    "cluster.device=cpu",
]


def write_examples(folder: Path) -> None:
    for _, how, name, text in BLOCK.findall(PAGE):
        if how:
            with (folder / name).open("a" if how == "append" else "x", encoding="utf-8") as file:
                file.write(text)


def agpo(folder: Path, *arguments: str) -> str:
    settings = [part for setting in SMALL for part in ("--set", setting)]
    command = [sys.executable, "-m", "agpo_megatron", *arguments, *settings]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_no_example_is_longer_than_20_lines() -> None:
    assert max(text.count("\n") for *_, text in BLOCK.findall(PAGE)) <= 20
    for kind, how, _, text in BLOCK.findall(PAGE):
        if kind == "yaml" and not how:
            yaml.safe_load(text)


@pytest.mark.full
def test_the_examples_train_evaluate_and_are_scored_again(tmp_path: Path) -> None:
    write_examples(tmp_path)
    write_model(tmp_path / "models" / "my_model")
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (tmp_path / "models" / "my_model" / "chat_template.jinja").write_text(template)
    agpo(tmp_path, "check", "my_task.yaml")
    agpo(tmp_path, "train", "my_task.yaml")
    run = tmp_path / "runs" / "my_task"
    (metrics,) = read_metrics(run)
    assert "reward_part/close" in metrics and metrics["reward/error_frac"] == 0
    scores = json.loads(RunFolder(run).evaluation(1).read_text())["sets"]
    assert {name: s["samples_per_problem"] for name, s in scores.items()} == {
        "greedy": 1,
        "sampled": 4,
    }

    agpo(tmp_path, "eval", "my_task.yaml", "--model", "models/my_model")
    folder = RunFolder(run / "eval" / "my_model")
    samples = read_arrow(samples_path(folder, 0, "sampled")).to_pylist()
    assert len(samples) == 3 * 4 and not any(s["correct"] and s["value"] != 1 for s in samples)
    # Another reward, without servers: everything is right.
    (tmp_path / "my_reward.py").write_text("def score(problem, response, *, near): return True\n")
    agpo(tmp_path, "eval", "my_task.yaml", "--model", "models/my_model", "--rescore")
    assert all(s["correct"] for s in read_arrow(samples_path(folder, 0, "sampled")).to_pylist())
    # The checkpoint of a step, converted.
    agpo(tmp_path, "eval", "my_task.yaml", "--step", "1")
    assert RunFolder(run / "eval" / "step-1").evaluation(0).exists()
