"""Runs that begin from what ``to-megatron`` writes: the same weights, bit for bit, as from the Hugging Face folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from converter import convert
from test_train import PLUS_MINUS_ONE, agpo
from tiny_run import write_run

from agpo_megatron.conversion.hf_checkpoint import HfCheckpoint
from agpo_megatron.observe.metrics import read_metrics
from agpo_megatron.observe.summary import read_summary

FROZEN = {"train.lr": 1e-60}
"""Steps on real gradients at a rate that is 0 in fp32: what a run ends with is what it began with."""


def converted(folder: Path, **changes: object) -> Path:
    """Config of a run, TP 2, whose model is cut for PP 2; the original is not where the run could find it."""
    config = write_run(folder, **PLUS_MINUS_ONE, **FROZEN, **changes)
    assert convert("to-megatron", folder / "model", folder / "m", "--pp", 2) == 0
    (folder / "model").rename(folder / "hidden")
    (folder / "m").rename(folder / "model")
    return config


def assert_same_weights(folder: Path, original: Path) -> None:
    found, source = HfCheckpoint(folder), HfCheckpoint(original)
    assert found.specs == source.specs and len(source.specs) > 30
    for name in source.specs:
        assert torch.equal(found.load(name), source.load(name)), name


@pytest.mark.full
def test_a_run_from_a_converted_checkpoint_in_another_layout(tmp_path: Path) -> None:
    config, run_dir = converted(tmp_path, **{"train.steps": 2}), tmp_path / "run"
    kl = ("--set", "algorithm.loss.kl.coef=0.1")
    agpo("train", str(config), "--run-dir", str(run_dir), *kl)
    metrics = read_metrics(run_dir)
    assert [row["step"] for row in metrics] == [1, 2]
    for row in metrics:
        assert row["grad_norm"] > 0
        assert row["rollout/logprob_abs_diff_max"] < 1e-3  # servers hold what the trainer holds
        assert row["loss/kl"] == 0.0  # the reference policy is the converted model
    assert_same_weights(run_dir / "hf", tmp_path / "hidden")
    assert (run_dir / "hf" / "tokenizer.json").exists()
    logs = run_dir / "logs" / "latest"
    text = "".join(path.read_text() for path in logs.glob("*.log"))
    assert "load_format='dummy'" in text or "'load_format': 'dummy'" in text
    # A gradient without a change is told from a closed gate.
    assert text.count("bit for bit what was published before, although") == 2


@pytest.mark.full
def test_resume_cold_start_and_evaluation_from_a_converted_checkpoint(tmp_path: Path) -> None:
    changes = {
        "sft.base": str(tmp_path / "model"),
        "sft.path": str(tmp_path / "sft.jsonl"),
        "sft.steps": 1,
        "sft.batch_size": 4,
        "sft.lr": 1e-60,
    }
    config, run_dir = converted(tmp_path, **{"train.steps": 2}, **changes), tmp_path / "run"
    command = ("train", str(config), "--run-dir", str(run_dir))
    agpo(*command)
    before = read_summary(run_dir)["before"]
    agpo(*command, "--set", "train.steps=4")  # resumes from its own checkpoint
    assert [row["step"] for row in read_metrics(run_dir)] == [1, 2, 3, 4]
    assert_same_weights(run_dir / "hf", tmp_path / "hidden")
    agpo("eval", str(config), "--run-dir", str(run_dir), "--step", "4")  # --like is the model
    found = next((run_dir / "eval" / "step-4" / "evaluations").glob("*.json"))
    assert json.loads(found.read_text())["scores"] == pytest.approx(before)
    # Converted for another layout it is another folder: the run does not go on from it.
    assert convert("to-megatron", tmp_path / "hidden", tmp_path / "other", "--tp", 2) == 0
    command = (*command, "--set", "train.steps=5", "--set", f"model.path={tmp_path / 'other'}")
    assert "model.path: its content has changed" in refusal(*command)
    alone = ("eval", str(config), "--run-dir", str(run_dir), "--model", str(tmp_path / "model"))
    assert "has no trainer to publish from" in refusal(*alone)
    cold = ("--run-dir", str(tmp_path / "cold"), "--set", f"model.path={tmp_path / 'cold_start'}")
    agpo("sft", str(config), *cold)
    assert_same_weights(tmp_path / "cold_start", tmp_path / "hidden")


def refusal(*arguments: str) -> str:
    command = [sys.executable, "-m", "agpo_megatron", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stdout + done.stderr
    return done.stderr
