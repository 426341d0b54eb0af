"""A checkpoint that is written beside training: real policy, real files."""

from __future__ import annotations

import errno
import resource
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import policy_models
import pytest
import torch
from made import loss
from test_policy_checkpoint import _flipped, step

from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.config.schema import PolicyConfig
from agpo_megatron.controller.checkpoints import remove_leftovers
from agpo_megatron.wait import open_phases

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policy_models.save(policy_models.hf_model("tied"), tmp_path_factory.mktemp("m") / "hf")


class Gate:
    """Holds the writers of files until ``open``; counts those that came."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from agpo_megatron.policy import saving

        self._opened, self.came, write = threading.Event(), 0, saving._write_file

        def held(*arguments: Any, **more: Any) -> Any:
            self.came += 1
            assert self._opened.wait(60)
            return write(*arguments, **more)

        monkeypatch.setattr(saving, "_write_file", held)
        self.open = self._opened.set


def service_of(policy: Any, model: Path, seconds: float = 60.0) -> Any:
    from agpo_megatron.trainer.service import TrainerService

    publisher: Any = SimpleNamespace(open=None)
    channel: Any = SimpleNamespace()
    return TrainerService(policy, publisher, channel, model, loss(policy="nll"), seconds)


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed", [True, False])
def test_what_is_saved_is_the_state_at_the_begin_whatever_is_trained_meanwhile(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, distributed: bool
) -> None:
    from agpo_megatron.policy import checkpoint

    config = PolicyConfig(dtype=dtype, distributed_optimizer=distributed)  # type: ignore[arg-type]
    gate, run = Gate(monkeypatch), RunFolder(tmp_path)
    with policy_models.one_rank(model, config) as policy:
        step(policy), step(policy)
        pending = checkpoint.begin_save(run.checkpoint(2), policy, 2, {"cursor": 5})
        expected = [step(policy), step(policy)]
        assert gate.came > 1 and not pending.done()
        assert [p.name for p in run.checkpoints.iterdir()] == [".step-00000002.partial"]
        gate.open()
        pending.finish(60)
        assert [s for s, _ in run.complete_checkpoints()] == [2]
        written = sum(p.stat().st_size for p in run.checkpoint(2).glob("*.distcp"))
        assert 0.5 * pending.bytes < written <= pending.bytes, "room is looked for by a bound"
    with policy_models.one_rank(model, config, seed=99) as policy:
        assert checkpoint.load(run.checkpoint(2), policy) == (2, {"cursor": 5})
        assert [step(policy), step(policy)] == expected


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_without_a_gather_the_same_is_saved(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    from agpo_megatron.policy import checkpoint
    from agpo_megatron.policy.marker import read_marker

    config = PolicyConfig(dtype=dtype)  # type: ignore[arg-type]
    with policy_models.one_rank(model, config) as policy:
        step(policy)
        (part,) = policy.optimizer.chained_optimizers
        gathered: list[bool] = []
        megatrons = part.get_parameter_state_dp_zero
        checkpoint.save(tmp_path / "mine", policy, 1, {})
        assert part.get_parameter_state_dp_zero == megatrons

        def gather(**more: Any) -> Any:
            gathered.append(True)
            return megatrons(**more)

        monkeypatch.setattr(checkpoint, "ungathered", lambda optimizer: nullcontext())
        part.get_parameter_state_dp_zero = gather
        checkpoint.save(tmp_path / "theirs", policy, 1, {})
        assert gathered
    mine, theirs = (read_marker(tmp_path / name)["files"] for name in ("mine", "theirs"))
    data = [name for name in mine if name.endswith(".distcp")]
    assert len(data) == 4 and mine.keys() == theirs.keys()
    assert {name: mine[name] for name in data} == {name: theirs[name] for name in data}


def test_a_killed_save_is_no_checkpoint_and_is_removed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agpo_megatron.policy import checkpoint

    run = RunFolder(tmp_path)
    with policy_models.one_rank(model) as policy:
        checkpoint.save(run.checkpoint(1), policy, 1, {})
        pending = checkpoint.begin_save(run.checkpoint(2), policy, 2, {})
        while not pending.done():
            pass
        # Every file is there, and the process is gone before the marker.
        assert len(list((run.checkpoints / ".step-00000002.partial").glob("*.distcp"))) > 1
        assert [s for s, _ in run.complete_checkpoints()] == [1]
        remove_leftovers(run)
        assert [p.name for p in run.checkpoints.iterdir()] == ["step-00000001"]


def test_files_that_cannot_be_written_are_an_error_with_path_and_cause(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agpo_megatron.policy import checkpoint

    gate = Gate(monkeypatch)
    with policy_models.one_rank(model) as policy:
        pending = checkpoint.begin_save(tmp_path / "c", policy, 2, {})
        with no_file_above(4096):
            gate.open()
            with pytest.raises(checkpoint.CheckpointError) as caught:
                pending.finish(60)
        assert f"cannot write checkpoint {tmp_path / 'c'}: " in str(caught.value)
        assert f"[Errno {errno.EFBIG}] File too large" in str(caught.value)
        assert list(tmp_path.iterdir()) == [], "what was written takes no room"
        checkpoint.save(tmp_path / "c", policy, 2, {})
        assert checkpoint.load(tmp_path / "c", policy)[0] == 2


def test_files_that_are_not_written_in_time_are_an_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agpo_megatron.policy import checkpoint

    gate = Gate(monkeypatch)
    with policy_models.one_rank(model) as policy:
        pending = checkpoint.begin_save(tmp_path / "c", policy, 2, {})
        with pytest.raises(checkpoint.CheckpointError, match=r"waited 0\.2 s for the files of .*c"):
            pending.finish(0.2)
        gate.open()


@pytest.mark.parametrize("copy", [True, False])
def test_without_room_nothing_is_written_and_nothing_removed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copy: bool
) -> None:
    """The bound on the files' size is the need: with as much room the save is made."""
    from agpo_megatron.policy import checkpoint, saving

    free: list[int] = []
    usage = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=free[0]))
    monkeypatch.setattr(saving, "shutil", SimpleNamespace(rmtree=shutil.rmtree, **vars(usage)))
    gate = Gate(monkeypatch)
    gate.open()
    with policy_models.one_rank(model) as policy:
        free[:] = [1 << 40]
        first = checkpoint.begin_save(tmp_path / "one", policy, 1, {}, copy=copy)
        first.finish(60)
        came, need = gate.came, first.bytes
        free[:] = [need - 1]
        words = f"not enough room for checkpoint {tmp_path / 'two'}: it needs {need} bytes, {need - 1} are free"
        with pytest.raises(checkpoint.CheckpointError, match=words):
            checkpoint.begin_save(tmp_path / "two", policy, 2, {}, copy=copy)
        assert [p.name for p in tmp_path.iterdir()] == ["one"] and gate.came == came
        free[:] = [need]
        checkpoint.begin_save(tmp_path / "two", policy, 2, {}, copy=copy).finish(60)
        assert checkpoint.load(tmp_path / "two", policy)[0] == 2


def test_the_service_has_one_save_under_way_and_completes_it_before_the_next(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, run = Gate(monkeypatch), RunFolder(tmp_path)

    def complete() -> list[int]:
        return [number for number, _ in run.complete_checkpoints()]

    with policy_models.one_rank(model) as policy:
        service = service_of(policy, model)
        assert service.save(str(run.checkpoint(1)), 1, wait=False)["done"] is False
        assert service.save_done(wait=False) == {"done": False} and complete() == []
        waits: list[list[str]] = []
        timer = threading.Timer(
            0.3, lambda: (waits.append([p.name for p in open_phases()]), gate.open())
        )
        timer.start()
        assert service.save(str(run.checkpoint(2)), 2, wait=False)["done"] is False
        assert complete() == [1], "the second began when the first was complete"
        assert "the save under way, before save" in waits[0]
        assert f"the files of checkpoint {run.checkpoint(1)}" in waits[0]
        answer = service.load(None, 0)
        assert complete() == [1, 2] and answer["step"] == 0
        assert service.save(str(run.checkpoint(3)), 3, wait=True)["bytes"] > 0
        assert complete() == [1, 2, 3]
        assert service.save_done(wait=True)["done"]


def test_the_service_says_that_a_checkpoint_is_damaged_and_takes_another(
    model: Path, tmp_path: Path
) -> None:
    with policy_models.one_rank(model) as policy:
        service = service_of(policy, model)
        service.save(str(tmp_path / "one"), 1, wait=True)
        weights = {n: t.clone() for n, t in policy.named_hf_tensors()}
        step(policy)
        service.save(str(tmp_path / "two"), 2, wait=True)
        step(policy)
        now = {n: t.clone() for n, t in policy.named_hf_tensors()}
        _flipped(tmp_path / "two")
        answer = service.load(str(tmp_path / "two"), 2)
        assert "two is damaged" in answer["damaged"] and answer["step"] == 0
        assert all(torch.equal(now[n], t) for n, t in policy.named_hf_tensors())
        answer = service.load(str(tmp_path / "one"), 1)
        assert answer["damaged"] == "" and answer["step"] == 1
        assert all(torch.equal(weights[n], t) for n, t in policy.named_hf_tensors())
