"""Whole runs with the real Megatron-Core and the real SGLang: what the trainer learns is what the servers generate."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import operator
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from urllib.request import urlopen

import pytest
import torch
from tiny_run import write_run
from transformers import AutoModelForCausalLM

from agpo_megatron.cluster.processes import free_port
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.controller.evaluation import samples_path
from agpo_megatron.data.rows import read_arrow
from agpo_megatron.observe.metrics import read_metrics
from agpo_megatron.observe.summary import read_summary

STEPS = 4
PLUS_MINUS_ONE = {  # advantages of +-1: every group has weight; the correction is computed in the update
    "algorithm.preset": "agpo_v1",
    "algorithm.loss": {"correction": {"kind": "tis"}},
}
EXPECTED = {  # every key that applies to on-policy AGPO without KL
    "step reward/mean reward/accuracy reward/length response/tokens_mean response/truncated_frac",
    "group/zero_variance_frac group/all_correct_frac group/all_wrong_frac group/cov_length_advantage",
    "mask/kept_tokens mask/kept_groups loss/policy loss/unclipped policy/entropy",
    "policy/ratio_mean policy/clip_frac grad_norm lr rollout/logprob_abs_diff_mean",
    "rollout/logprob_abs_diff_max rollout/staleness_mean tokens/trained tokens/skipped time/rollout",
    "time/reward time/update time/publish time/step throughput/tokens_per_s busy/trainer_frac",
    "busy/rewards_frac throughput/trainer_tokens_per_s throughput/servers_tokens_per_s",
    "memory/controller_gb memory/trainer_gb memory/servers_gb",
}


def agpo(*arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "agpo_megatron", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def check_run(run_dir: Path) -> None:
    """Metrics complete; server and trainer agree on every generated token, before and after publishes; the held-out
    answers are the exported policy's own greedy answers."""
    metrics = read_metrics(run_dir)
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    keys = set(" ".join(EXPECTED).split())
    for row in metrics:
        assert keys <= set(row), keys - set(row)
        assert row["rollout/staleness_mean"] == 0.0
        assert row["rollout/logprob_abs_diff_max"] < 1e-3
        assert row["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
        assert row["correction/mean"] == pytest.approx(1.0, abs=1e-3)
    assert all(row["tokens/trained"] > 0 and row["grad_norm"] > 0 for row in metrics)

    folder = RunFolder(run_dir)
    first, last = (
        read_arrow(samples_path(folder, step, "eval.jsonl")).to_pylist() for step in (0, STEPS)
    )
    model = AutoModelForCausalLM.from_pretrained(folder.exported_model, dtype=torch.float32)
    for sample in last:
        prompt, response = sample["prompt_tokens"], sample["response_tokens"]
        tokens = torch.tensor([[*prompt, *response]])
        logits = model(tokens).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == response
        logprobs = logits.log_softmax(-1).gather(1, tokens[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(
            logprobs, torch.tensor(sample["rollout_logprobs"]), atol=1e-3, rtol=0
        )
    moved = max(
        abs(one["rollout_logprobs"][0] - other["rollout_logprobs"][0])
        for one, other in zip(first, last, strict=True)
    )
    assert moved > 1e-2, "the published weights did not change what the server generates"

    summary = read_summary(run_dir)
    for side, samples in (("before", first), ("after", last)):
        assert summary[side]["accuracy"] == pytest.approx(fmean(s["correct"] for s in samples))
        assert summary[side]["tokens_mean"] == pytest.approx(fmean(s["tokens"] for s in samples))
    assert folder.curves.stat().st_size > 10_000
    assert not any(math.isnan(row["loss/policy"]) for row in metrics)


def scraped_until(ended: threading.Event, port: int) -> list[dict[str, float]]:
    """What Prometheus would have found at each scrape of a run."""
    found: list[dict[str, float]] = []
    while not ended.wait(0.3):
        with contextlib.suppress(OSError):
            text = urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30).read().decode()
            lines = (line for line in text.splitlines() if not line.startswith("#"))
            parted = (line.rpartition(" ") for line in lines)
            found.append({name: float(value) for name, _, value in parted})
    return found


def test_agpo_with_two_tensor_parallel_ranks(tmp_path: Path) -> None:
    port = free_port("127.0.0.1")
    config = write_run(tmp_path, **PLUS_MINUS_ONE, **{"observe.prometheus_port": port})
    run_dir = tmp_path / "run"
    ended = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        scrapes = pool.submit(scraped_until, ended, port)
        try:
            agpo("train", str(config), "--run-dir", str(run_dir))
        finally:
            ended.set()
        found = functools.reduce(operator.or_, scrapes.result())
    check_run(run_dir)
    rows = {row["step"]: row for row in read_metrics(run_dir)}
    assert rows[found["agpo_step"]]["grad_norm"] == found["agpo_grad_norm"]
    # The last scrape may find the server stopped already, and should then say so.
    states = [s.get('agpo_live_server_state{server="0",state="ready"}') for s in scrapes.result()]
    assert 1 in states
    for role in ("trainer", "servers", "rewards"):
        assert found[f'agpo_live_busy_seconds_total{{role="{role}"}}'] > 0
    assert any(name.startswith("agpo_live_phase_seconds") and "rank 1" in name for name in found)
    assert found['agpo_live_memory_bytes{role="servers"}'] > 1e8
    assert {"agpo_live_window_open_groups", "agpo_live_dispatch_open"} <= set(found)
    # The same command on a finished run has nothing to do, and says so.
    assert "nothing to do" in agpo("train", str(config), "--run-dir", str(run_dir))


@pytest.mark.full
def test_agpo_with_four_trainer_ranks(tmp_path: Path) -> None:
    config = write_run(tmp_path, **PLUS_MINUS_ONE, **{"policy.pipeline_parallel": 2})
    agpo("train", str(config), "--run-dir", str(tmp_path / "run"))
    check_run(tmp_path / "run")


@pytest.mark.full
def test_replicas_and_an_evaluation_of_what_they_learnt(tmp_path: Path) -> None:
    config = write_run(tmp_path, **PLUS_MINUS_ONE, **{"policy.data_parallel": 2})
    run_dir = tmp_path / "run"
    agpo("train", str(config), "--run-dir", str(run_dir))
    check_run(run_dir)
    # eval serves the trained policy: the same scores.
    agpo("eval", str(config), "--run-dir", str(run_dir))
    again = json.loads(RunFolder(run_dir / "eval").evaluation(0).read_text())
    assert again["scores"] == pytest.approx(read_summary(run_dir)["after"])


def write_cold_start(folder: Path) -> Path:
    changes = {
        "sft.base": str(folder / "model"),
        "sft.path": str(folder / "sft.jsonl"),
        "sft.steps": 30,
        "sft.batch_size": 16,
        "sft.lr": 5.0e-3,
        "run.checkpoint_every": 10,
        "model.path": str(folder / "cold_start"),
        "observe.peak_tflops": 0.01,
    }
    return write_run(folder, **changes)


@pytest.mark.timeout(600)
def test_the_cold_start_learns_and_a_second_call_finds_it_done(tmp_path: Path) -> None:
    config = write_cold_start(tmp_path)
    arguments = ("sft", str(config), "--run-dir", str(tmp_path / "run"))
    said = agpo(*arguments)
    run_dir = tmp_path / "run" / "sft"
    rows = read_metrics(run_dir)
    losses = [m["loss/policy"] for m in rows]
    assert len(losses) == 30 and losses[-1] < 0.5 * losses[0]
    assert f"sft: 30 steps, loss {losses[0]:.4f} to {losses[-1]:.4f}; the model is in" in said
    assert RunFolder(run_dir).curves.stat().st_size > 10_000
    assert all(0 < row["throughput/mfu"] < 10 for row in rows), "of a CPU said to have 10 GFLOP/s"
    assert all(row["throughput/trainer_tokens_per_s"] > 0 for row in rows)
    assert rows[-1]["memory/trainer_gb"] > 0.1 and rows[-1]["memory/controller_gb"] > 0.05
    assert (tmp_path / "cold_start" / "tokenizer.json").exists()
    content = json.loads((tmp_path / "cold_start" / "config.json").read_text())
    assert content["vocab_size"] == 18
    assert "nothing to do" in agpo(*arguments)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_cold_start_stopped_in_the_middle_continues_to_the_same_weights(tmp_path: Path) -> None:
    """SIGUSR1 after a few steps ends it with a checkpoint; the same command goes on to the same bytes."""
    config = write_cold_start(tmp_path)
    agpo("sft", str(config), "--run-dir", str(tmp_path / "run"))
    other = tmp_path / "stopped"
    command = [sys.executable, "-m", "agpo_megatron", "sft", str(config)]
    command += ["--run-dir", str(other), "--set", f"model.path={tmp_path / 'again'}"]
    folder = RunFolder(other / "sft")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as p:
        deadline = time.monotonic() + 200
        while len(read_metrics(folder.path)) < 3 and p.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        p.send_signal(signal.SIGUSR1)
        said = p.communicate(timeout=200)[0]
        assert p.returncode == 130, said
    assert "stopped after a checkpoint; the same command continues the run" in said
    saved = folder.complete_checkpoints()[-1][0]
    assert 3 <= saved == read_metrics(folder.path)[-1]["step"] < 30
    assert not (tmp_path / "again").exists()
    agpo(*command[3:])
    assert [row["step"] for row in read_metrics(folder.path)] == list(range(1, 31))
    whole, continued = (
        {f.name: f.read_bytes() for f in (tmp_path / name).glob("*.safetensors")}
        for name in ("cold_start", "again")
    )
    assert whole == continued != {}
