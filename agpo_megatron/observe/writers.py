"""Writers that get the steps of metrics.jsonl too: TensorBoard, Weights & Biases, MLflow. That file stays the truth.

A writer is opened again by every start of a run and then brings what it lacks up to date; a step is never in it twice.
Its failures are warnings: the step stays pending, and is tried again with the next one.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import queue
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from agpo_megatron.files import write_durably
from agpo_megatron.wait import waiting

log = logging.getLogger(__name__)
Row = Mapping[str, float]
"""One step as ``read_metrics`` returns it: ``step`` and numbers, NaN where one was not finite."""
CLOSE_SECONDS = 15.0
"""Seconds that the end of a run waits for a service that is slow to take the last steps."""
PROJECT = "agpo_megatron"
PACKAGES = {"wandb": ("wandb", "wandb"), "mlflow": ("mlflow", "mlflow-skinny")}
"""StepWriter -> module, and the package that has it."""


class StepWriter(Protocol):
    """Takes the steps of a run, in order."""

    def write(self, row: Row) -> None: ...

    def close(self) -> None: ...


class Service(StepWriter, Protocol):
    """A writer to a service, which may be slow or away. ``last``: the newest step that it holds."""

    @property
    def last(self) -> int: ...


def missing_packages(writers: Sequence[str]) -> list[str]:
    """List the writers whose package is not installed, with the fix."""
    return [
        f"observe.writers: {writer} is not installed here; pip install {PACKAGES[writer][1]}, or leave it out"
        for writer in writers
        if writer in PACKAGES and importlib.util.find_spec(PACKAGES[writer][0]) is None
    ]


def open_writers(
    names: Sequence[str], run_dir: Path, config: Mapping[str, Any], recorded: Sequence[Row]
) -> list[StepWriter]:
    """Open the writers of these names. ``config``: dotted keys of the run, for services that show them. ``recorded``:
    the steps so far."""
    found: list[StepWriter] = []
    if "tensorboard" in names:
        found.append(TensorBoardWriter(run_dir / "tensorboard", recorded))
    if "wandb" in names:
        found.append(Background("wandb", lambda: WandbWriter(run_dir, config), recorded))
    if "mlflow" in names:
        found.append(Background("mlflow", lambda: MlflowWriter(run_dir, config), recorded))
    return found


class TensorBoardWriter:
    """An event file that holds the recorded steps and no other: it is rebuilt from them."""

    def __init__(self, folder: Path, recorded: Sequence[Row]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder, ignore_errors=True)
        # A TensorBoard that is watching forgets what it has read: no step shows twice.
        self._board = SummaryWriter(folder, purge_step=0)
        for row in recorded:
            self._add(row)
        self._board.flush()

    def _add(self, row: Row) -> None:
        for key, value in row.items():
            if key != "step":
                self._board.add_scalar(key, value, row["step"])

    def write(self, row: Row) -> None:
        self._add(row)
        self._board.flush()

    def close(self) -> None:
        self._board.close()


class Background:
    """Opens a service and hands it the steps in a thread of its own, so that training never waits for it."""

    def __init__(self, name: str, open_it: Callable[[], Service], recorded: Sequence[Row]) -> None:
        self._name, self._open = name, open_it
        self._service: Service | None = None
        self._pending = list(recorded)
        self._rows: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"{name} writer", daemon=True)
        self._thread.start()

    def write(self, row: Row) -> None:
        self._rows.put(row)

    def close(self) -> None:
        """Wait for the last steps, for ``CLOSE_SECONDS`` at most."""
        self._rows.put(None)
        with waiting(f"{self._name} to take the last steps", CLOSE_SECONDS):
            self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            log.warning("%s has not taken all steps; the next start writes them", self._name)

    def _run(self) -> None:
        while True:
            self._flush()
            row = self._rows.get()
            if row is None:
                break
            self._pending.append(row)
        try:
            if self._service:
                self._service.close()
        except Exception as error:
            log.warning("%s was not closed: %s", self._name, error)

    def _flush(self) -> None:
        """Write what is pending. A step that fails stays there, and those behind it."""
        try:
            self._service = self._service or self._open()
            while self._pending:
                row = self._pending[0]
                if row["step"] > self._service.last:
                    self._service.write(row)
                self._pending.pop(0)
        except Exception as error:
            steps = len(self._pending)
            log.warning("%s is %d step(s) behind metrics.jsonl: %s", self._name, steps, error)


class _Kept:
    """``RUN_DIR/observe/NAME.json``: the service's id of the run, and the last step that it was given."""

    def __init__(self, run_dir: Path, name: str) -> None:
        self._path = run_dir / "observe" / f"{name}.json"
        kept = json.loads(self._path.read_text()) if self._path.exists() else {}
        self.run: str = kept.get("run", "")
        self.last: int = kept.get("last", 0)

    def keep(self, run: str, last: int) -> None:
        self.run, self.last = run, last
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(self._path, json.dumps({"run": run, "last": last}).encode())


class WandbWriter:
    """A run of Weights & Biases, the same one for every start of a run folder, whose files lie in ``RUN_DIR/wandb``.

    Its own variables hold: WANDB_MODE=offline needs no network (``wandb sync`` sends it later), WANDB_PROJECT. Another
    process writes what it is given a little later: of a controller that is killed, W&B may lack the last step. Raises
    RuntimeError where it would ask for a key on the terminal.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        import wandb

        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False):
            raise RuntimeError("no key; run `wandb login`, or set WANDB_MODE=offline")
        self._kept = _Kept(run_dir, "wandb")
        if not self._kept.run:
            self._kept.keep(secrets.token_hex(4), 0)
        self._run = wandb.init(
            id=self._kept.run,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run_dir.name),
            dir=str(run_dir),
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True),
        )

    @property
    def last(self) -> int:
        return self._kept.last

    def write(self, row: Row) -> None:
        values = {k: v for k, v in row.items() if k != "step"}
        self._run.log(values, step=int(row["step"]))
        self._kept.keep(self._kept.run, int(row["step"]))

    def close(self) -> None:
        import wandb

        self._run.finish()
        wandb.teardown()  # waits for its process, which writes the file


class MlflowWriter:
    """A run of MLflow, the same one for every start of a run folder: at MLFLOW_TRACKING_URI, else as files in
    ``RUN_DIR/mlruns``."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not uri:
            uri = (run_dir / "mlruns").resolve().as_uri()
            # MLflow 3 wants a database otherwise; on the file systems of clusters files are the safer choice.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._client = Metric, MlflowClient(tracking_uri=uri)
        self._kept = _Kept(run_dir, "mlflow")
        if not self._kept.run:
            experiment = self._client.get_experiment_by_name(PROJECT)
            number = (
                experiment.experiment_id if experiment else self._client.create_experiment(PROJECT)
            )
            run = self._client.create_run(number, run_name=run_dir.name).info.run_id
            self._kept.keep(run, -1)  # before its parameters: a second try goes on with this run
        else:
            self._client.update_run(self._kept.run, status="RUNNING")
        if self.last < 0:
            params = [Param(_mlflow_name(k), str(v)[:500]) for k, v in config.items()]
            for first in range(0, len(params), 100):  # MLflow's limit of one call
                self._client.log_batch(self._kept.run, params=params[first : first + 100])
            self._kept.keep(self._kept.run, 0)
        self._begun = self.last + 1

    @property
    def last(self) -> int:
        return self._kept.last

    def write(self, row: Row) -> None:
        now, step, run = int(time.time() * 1000), int(row["step"]), self._kept.run
        values = {_mlflow_name(k): v for k, v in row.items() if k != "step"}
        if step == self._begun:  # it may have been written already, and nobody heard of it
            values = {k: v for k, v in values.items() if not self._holds(k, step)}
        metrics = [self._metric(key, value, now, step) for key, value in values.items()]
        self._begun = step
        self._client.log_batch(run, metrics=metrics)
        self._kept.keep(run, step)

    def _holds(self, key: str, step: int) -> bool:
        history = self._client.get_metric_history(self._kept.run, key)
        return any(metric.step == step for metric in history)

    def close(self) -> None:
        self._client.set_terminated(self._kept.run)


def _mlflow_name(key: str) -> str:
    """MLflow allows few signs in a name, and sources of data have names of the user's own."""
    return re.sub(r"[^\w\-./ ]", "_", key)
