"""A team's own task: a reward of ten lines, two sources with different rewards, evaluation sets; trained for real."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from own_task import write_task
from test_train import agpo
from tiny_run import write_run

from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.controller.evaluation import samples_path
from agpo_megatron.data.rows import read_arrow
from agpo_megatron.journal import JournalReader
from agpo_megatron.observe.metrics import read_metrics


@pytest.mark.full
def test_two_sources_with_rewards_of_their_own_train_and_are_evaluated(tmp_path: Path) -> None:
    config = write_run(tmp_path, **write_task(tmp_path / "task"), **{"algorithm.preset": "grpo"})
    run_dir = tmp_path / "run"
    agpo("train", str(config), "--run-dir", str(run_dir))
    metrics = read_metrics(run_dir)
    assert len(metrics) == 4
    for row in metrics:
        assert 0 < row["reward_part/near"] < 1  # real numbers reach the metrics
        assert {"source_accuracy/sums", "source_accuracy/doubles"} <= set(row)
        assert row["reward/error_frac"] == 0 and row["grad_norm"] > 0
    folder = RunFolder(run_dir)
    reader = JournalReader(folder.journal)
    records = [reader.record(batch.name) for batch in reader.batches()]
    rewards = {reward for record in records for reward in record.columns["reward"]}
    assert len(rewards) > 3 and any(0 < r < 0.5 for r in rewards)

    content = json.loads(folder.evaluation(2).read_text())["sets"]
    assert list(content) == ["sums.jsonl", "doubles"]
    doubles = content["doubles"]
    assert (doubles["problems"], doubles["samples_per_problem"]) == (10, 4)
    assert doubles["accuracy"] <= doubles["pass@2"] <= doubles["pass@4"]
    assert doubles["accuracy_low"] <= doubles["accuracy"] <= doubles["accuracy_high"]
    assert doubles["accuracy_at_tokens"]["6"] == pytest.approx(doubles["accuracy"])
    samples = read_arrow(samples_path(folder, 2, "doubles")).to_pylist()
    assert [(s["problem"], s["sample"]) for s in samples] == [
        (p, i) for p in range(10) for i in range(4)
    ]
    assert all(s["tokens"] <= 6 for s in samples)
