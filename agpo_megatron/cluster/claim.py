"""Keeps a run folder to one command at a time, and to one run for good."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from agpo_megatron.config import Config, ConfigError
from agpo_megatron.config.loading import leaves, resolve_config
from agpo_megatron.config.run_folder import CHECKPOINT_MARKER, RunFolder, is_converted
from agpo_megatron.files import digest, write_durably
from agpo_megatron.wait import waiting

# What may change while a run goes on: how it is carried out. Everything else is what the run *is*.
FREE = (
    "run.",
    "journal.",
    "observe.",
    "cluster.",
    "prepare.",
    "guards.",  # what they have decided is in the journal
    "model.path",  # paths: their content is compared
    "data.path",
    "data.difficulty",
    "reward.workers",
    "reward.memory_mb",
    "reward.max_error_frac",
    "sft.",
    "train.micro_batch_tokens",
    # How far generation runs ahead: which prompts form a batch does not depend on it, and below the bound the age of a
    # token is a matter of how many servers there are anyway. The correction that it brings is part of the run.
    "train.max_staleness",
    "rollout.fragment_tokens",
    "rollout.kv_on_publish",
    "rollout.servers",
    "rollout.tensor_parallel",
    "rollout.port",
    "rollout.max_in_flight",
    "rollout.server_args",
    "rollout.start_timeout",
    "rollout.request_timeout",
    "rollout.attempts",
    "reward.timeout",
    "policy.tensor_parallel",
    "policy.pipeline_parallel",
    "policy.virtual_pipeline",
    "policy.context_parallel",
    "policy.expert_parallel",
    "policy.data_parallel",
    "policy.sequence_parallel",
    "policy.distributed_optimizer",
    "policy.recompute",
    "policy.logprob_chunk",
    "policy.logprob_kernels",
    "policy.layers",
)


SFT_IDENTITY = (
    "seed",
    "data.",
    "sft.",
    "policy.dtype",
    "train.weight_decay",
    "train.adam",
    "train.grad",
)


LOCK_PATIENCE = 600.0
"""Seconds that the start of a requeued job waits for the folder: the lock of a node that has crashed falls when the
file system gives the node up (Lustre evicts a silent client after minutes)."""
LOCK_POLL = 2.0


@contextmanager
def only_command_on(folder: RunFolder) -> Iterator[None]:
    """Hold the folder's lock; it falls with this process, however that ends. Raises ConfigError if another has it, and
    where the file system knows no locks."""
    requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    with open(folder.lock, "w") as lock:
        _lock(lock, folder, time.monotonic() + (LOCK_PATIENCE if requeued else 0.0))
        yield


def _lock(lock: TextIO, folder: RunFolder, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise ConfigError(
                    f"{folder.path} is in use by another agpo-megatron; stop that one, or use another --run-dir"
                ) from None
            with waiting(f"the lock of {folder.path}", deadline - time.monotonic()):
                time.sleep(LOCK_POLL)
        except OSError as error:
            raise ConfigError(
                f"{folder.lock} cannot be locked ({error.strerror}), so two commands could write to one run; mount its "
                "file system with locks (Lustre: -o flock), or use another --run-dir"
            ) from None


def refuse_another_run(config: Config, folder: RunFolder, mode: str) -> None:
    """Raise ConfigError, naming what differs, if the folder holds a run that this one would not continue."""
    inputs = {key: fingerprint(Path(path)) for key, path in input_paths(config, mode).items()}
    if not folder.config.exists():
        write_durably(folder.inputs, json.dumps({"mode": mode, **inputs}, indent=1).encode())
        return
    before = leaves(resolve_config(folder.config).config)
    began_with = json.loads(folder.inputs.read_text())
    now = leaves(config)
    changed = [
        f"{key}: {before.get(key)!r} in the run folder, {now.get(key)!r} now"
        for key in {**now, **before}
        if is_identity(key, config, mode)
        and comparable(before.get(key)) != comparable(now.get(key))
    ]
    changed += [
        f"{key}: its content has changed since the run began"
        for key, value in inputs.items()
        if began_with.get(key) != value
    ]
    if began_with["mode"] != mode:
        changed.append(f"the folder was made by {began_with['mode']}, not by {mode}")
    if changed:
        raise ConfigError(
            f"{folder.path} holds another run; give this one its own --run-dir, or take back:\n  "
            + "\n  ".join(changed)
        )


def place(config: Config, mode: str) -> tuple[Config, RunFolder]:
    """Find the folder ``mode`` works in, and the config as it holds there.

    Cold start and evaluation have folders of their own inside the run's, so that they never touch its records. An
    evaluation serves the trained policy if there is one.
    """
    folder = RunFolder(Path(os.path.abspath(config.run.dir)))
    if mode not in ("sft", "eval"):
        return config, folder
    changes: dict[str, object] = {}
    if mode == "eval" and (folder.exported_model / "config.json").exists():
        changes["model"] = config.model.model_copy(update={"path": str(folder.exported_model)})
    inner = RunFolder(folder.path / mode)
    changes["run"] = config.run.model_copy(update={"dir": str(inner.path)})
    return config.model_copy(update=changes), inner


def comparable(value: object) -> object:
    """The value of a key, sources in a list without their paths: these may move, their content is compared. An empty
    section of any keys is None, as a key that is not in it."""
    if value == {}:
        return None
    if not isinstance(value, list):
        return value
    return [
        {k: v for k, v in entry.items() if k != "path"} if isinstance(entry, dict) else entry
        for entry in value
    ]


def already_done(config: Config, folder: RunFolder, mode: str) -> bool:
    """Say whether ``mode`` has ended here: a cold start with its output, a training run with all its steps."""
    if mode == "eval" or not folder.done.exists():
        return False
    done = json.loads(folder.done.read_text())
    if mode == "sft":
        return (Path(config.model.path) / "config.json").exists()
    return bool(done["steps"] >= config.train.steps)


def is_identity(key: str, config: Config, mode: str) -> bool:
    """Say whether a run with another value of ``key`` would be another run."""
    if mode == "sft":
        return key.startswith(SFT_IDENTITY) and key not in ("sft.path", "sft.base")
    if key == "train.steps":  # the learning rate of every step may depend on it
        return config.train.lr_schedule != "constant"
    return not key.startswith(FREE)


def input_paths(config: Config, mode: str) -> dict[str, str]:
    """List files and folders whose content is part of what a run is."""
    if mode == "sft" and config.sft:
        return {"sft.path": config.sft.path, "sft.base": config.sft.base}
    paths = {"model.path": config.model.path}
    if mode == "train":
        sources = {**config.data.by_key(), **config.eval.by_key()}
        paths |= {key: source.path for key, source in sources.items()}
        if config.data.difficulty:
            paths["data.difficulty"] = config.data.difficulty
    return paths


def fingerprint(path: Path) -> str:
    """Digest the content of a file; of a checkpoint folder, its config and its weights' names and sizes, or the marker
    that lists those with their checksums; of a folder of data, the names and sizes of all files; of what is neither, a
    dataset of the hub, its name."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not (path / "config.json").is_file():
        files = sorted(
            (str(p.relative_to(path)), p.stat().st_size) for p in path.rglob("*") if p.is_file()
        )
        return digest(json.dumps(files or str(path)).encode())
    weights = sorted((p.name, p.stat().st_size) for p in path.glob("*.safetensors"))
    config = (path / "config.json").read_bytes()
    listed = (
        (path / CHECKPOINT_MARKER).read_bytes()
        if is_converted(path)
        else json.dumps(weights).encode()
    )
    return digest(config, listed)
