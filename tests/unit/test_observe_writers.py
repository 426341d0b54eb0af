"""The writers beside metrics.jsonl: each step once in every one of them, also after a kill and a resume."""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from agpo_megatron.observe import writers
from agpo_megatron.observe.metrics import MetricsWriter, metrics_path, read_metrics
from agpo_megatron.observe.writers import Row, StepWriter, missing_packages, open_writers

CONFIG = {"train.lr": 1e-6, "data.path": "d", "eval.sets": []}
STEPS = [{"step": s, "lr": s / 8, "reward/mean": float(s)} for s in range(1, 5)]
NOTHING_LEFT_OUT = [(int(row["step"]), row["lr"]) for row in STEPS]


def opener(name: str, run_dir: Path) -> Callable[[Sequence[Row]], list[StepWriter]]:
    return lambda recorded: open_writers([name], run_dir, CONFIG, recorded)


def write_with_a_kill(name: str, run_dir: Path) -> None:
    """Two steps, one that the writer never got, a resume, one that is recorded already, one more."""
    first = MetricsWriter(run_dir, False, opener(name, run_dir))
    for row in STEPS[:2]:
        first.write(row)
    first.close()
    with metrics_path(run_dir).open("a") as file:  # killed between the line and the writer
        file.write(json.dumps(STEPS[2]) + "\n")
    again = MetricsWriter(run_dir, False, opener(name, run_dir))
    assert not again.write(STEPS[2] | {"lr": 9.0})
    again.write(STEPS[3])
    again.close()


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_with_a_kill("tensorboard", tmp_path)
    files = list((tmp_path / "tensorboard").iterdir())
    events = EventAccumulator(str(files[0])).Reload().Scalars("lr")
    assert len(files) == 1
    assert [(e.step, e.value) for e in events] == NOTHING_LEFT_OUT


def wandb_records(path: Path) -> Iterator[bytes]:
    """Records of a .wandb file: a header of 7 bytes, then LevelDB's log format (blocks of 32 KiB; chunks of checksum 4,
    length 2, type 1 and data; types: 1 whole, 2 first, 3 middle, 4 last)."""
    content, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := -at % 32768) < 7:  # no room for a chunk: padding (none is 0, at a border)
            at += left
        length, kind = struct.unpack_from("<HB", content, at + 4)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def wandb_history(run_dir: Path) -> list[tuple[str, int, float]]:
    """(run id, step, lr) of every step in the files of all starts."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: list[tuple[str, int, float]] = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for data in wandb_records(path):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {
                    ".".join(i.nested_key) or i.key: json.loads(i.value_json)
                    for i in record.history.item
                }
                found.append((path.stem, items["_step"], items["lr"]))
    return found


@pytest.mark.processes
def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is optional")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(writers, "CLOSE_SECONDS", 120.0)
    write_with_a_kill("wandb", tmp_path)
    found = wandb_history(tmp_path)
    assert [(step, lr) for _, step, lr in found] == NOTHING_LEFT_OUT
    assert len({run for run, *_ in found}) == 1, "a resume goes on with the same run"


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is optional")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setattr(writers, "CLOSE_SECONDS", 120.0)
    write_with_a_kill("mlflow", tmp_path)
    kept = tmp_path / "observe" / "mlflow.json"
    run = json.loads(kept.read_text())["run"]
    client = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())

    def history(key: str) -> list[tuple[int, float]]:
        return [(m.step, m.value) for m in client.get_metric_history(run, key)]

    assert history("lr") == NOTHING_LEFT_OUT
    assert client.get_run(run).data.params["train.lr"] == "1e-06"
    assert client.get_run(run).info.status == "FINISHED"
    # Killed after the service had a step and before that was noted: the step is not written twice.
    kept.write_text(json.dumps({"run": run, "last": 3}))
    last = MetricsWriter(tmp_path, False, opener("mlflow", tmp_path))
    last.write({"step": 5, "lr": math.nan, "source_accuracy/a:b c?": 0.5})
    last.close()
    assert history("lr")[:4] == NOTHING_LEFT_OUT and len(history("lr")) == 5
    assert history("source_accuracy/a_b c_") == [(5, 0.5)]


def test_answers_of_mlflow_that_are_lost_leave_one_run_and_no_double_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="mlflow is optional")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    apply, lost = MlflowClient.log_batch, [True, False, False, True]

    def log_batch(self: MlflowClient, *args: Any, **more: Any) -> None:
        apply(self, *args, **more)
        if lost and lost.pop(0):
            raise ConnectionError("timed out")

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    with pytest.raises(ConnectionError):
        writers.MlflowWriter(tmp_path, {"train.lr": 1e-6})
    writers.MlflowWriter(tmp_path, {"train.lr": 1e-6})
    # Parameters are those of the first start: MLflow refuses others, and keys like train.steps may change.
    writer = writers.MlflowWriter(tmp_path, {"train.lr": 2e-6})
    writer.write({"step": 1, "lr": 0.5})
    with pytest.raises(ConnectionError):
        writer.write({"step": 2, "lr": 0.25})
    writer.write({"step": 2, "lr": 0.25})
    client = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name(writers.PROJECT)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params == {"train.lr": "1e-06"}
    history = client.get_metric_history(run.info.run_id, "lr")
    assert [(m.step, m.value) for m in history] == [(1, 0.5), (2, 0.25)]


class Flaky:
    """A service that is away for its first three attempts, and takes nothing before it is let go."""

    last = 0

    def __init__(self) -> None:
        self.attempts, self.rows, self.go = 0, list[Row](), threading.Event()

    def open(self) -> Flaky:
        self.attempts += 1
        if self.attempts == 1:
            raise ConnectionError("no route")
        return self

    def write(self, row: Row) -> None:
        self.attempts += 1
        if self.attempts < 4:
            raise ConnectionError("no route")
        assert self.go.wait(60)
        self.rows.append(row)

    def close(self) -> None:
        pass


def test_a_service_that_is_away_loses_nothing_and_holds_nothing_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flaky = Flaky()
    writer = MetricsWriter(
        tmp_path, False, lambda recorded: [writers.Background("flaky", flaky.open, recorded)]
    )
    for row in STEPS:
        writer.write(row)
    assert flaky.rows == [], "the training loop waits for no service"
    flaky.go.set()
    writer.close()
    assert flaky.rows == STEPS == read_metrics(tmp_path)
    assert "flaky is" in caplog.text and "behind metrics.jsonl: no route" in caplog.text


def test_a_writer_that_fails_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def write(self, row: Row) -> None:
            raise RuntimeError("broken")

        def close(self) -> None:
            pass

    writer = MetricsWriter(tmp_path, False, lambda recorded: [Broken()])
    assert writer.write(STEPS[0])
    writer.close()
    assert len(read_metrics(tmp_path)) == 1
    assert "Broken did not take step 1: broken" in caplog.text


def test_a_package_that_is_missing_is_named_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_packages(["tensorboard"]) == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing_packages(["tensorboard", "mlflow"]) == [
        "observe.writers: mlflow is not installed here; pip install mlflow-skinny, or leave it out"
    ]


@pytest.mark.processes
def test_wandb_without_a_key_is_a_warning_and_no_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is optional")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(RuntimeError, match="wandb login.*WANDB_MODE=offline"):
        writers.WandbWriter(tmp_path, CONFIG)
