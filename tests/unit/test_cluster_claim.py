"""A run folder has one command at a time, on file systems as they are, and holds one run for good."""

from __future__ import annotations

import errno
import fcntl
import threading
import time
from pathlib import Path

import pytest

from agpo_megatron.cluster import claim
from agpo_megatron.cluster.claim import only_command_on, refuse_another_run
from agpo_megatron.config import ConfigError
from agpo_megatron.config.loading import resolve_config
from agpo_megatron.config.record import resolved_yaml
from agpo_megatron.config.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def test_a_second_command_is_refused_at_once(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    started = time.monotonic()
    with (
        only_command_on(folder),
        pytest.raises(ConfigError, match="in use by another"),
        only_command_on(folder),
    ):
        pass
    assert time.monotonic() - started < 1
    with only_command_on(folder):
        pass


def test_a_requeued_job_waits_for_the_lock_of_a_node_that_is_gone(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(claim, "LOCK_POLL", 0.05)
    held = folder.lock.open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    evicted = threading.Timer(0.5, held.close)
    evicted.start()
    started = time.monotonic()
    with only_command_on(folder):
        assert time.monotonic() - started > 0.4
    monkeypatch.setattr(claim, "LOCK_PATIENCE", 0.3)
    with (
        only_command_on(folder),
        pytest.raises(ConfigError, match="in use by another"),
        only_command_on(folder),
    ):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(
    folder: RunFolder, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, "no such thing")

    monkeypatch.setattr(claim.fcntl, "flock", flock)
    words = "cannot be locked .no such thing.*Lustre: -o flock"
    with pytest.raises(ConfigError, match=words), only_command_on(folder):
        pass


def refusal(folder: RunFolder, began_with: list[str], now: list[str]) -> str:
    """What a run that began with some settings says to others; "" when it goes on with them."""
    path = folder.path / "c.yaml"
    path.write_text("model: {path: m}\ndata: {path: d}\n")
    first = resolve_config(path, began_with, str(folder.path))
    refuse_another_run(first.config, folder, "train")
    folder.config.write_text(resolved_yaml(first.config, first.provenance))
    try:
        refuse_another_run(resolve_config(path, now, str(folder.path)).config, folder, "train")
    except ConfigError as error:
        return str(error)
    return ""


def test_how_far_generation_runs_ahead_may_change(folder: RunFolder) -> None:
    """Like the number of servers, which decides about the age of responses below the bound."""
    before = ["train.max_staleness=4", "rollout={fragment_tokens: 512, kv_on_publish: keep}"]
    assert refusal(folder, before, ["train.max_staleness=1"]) == ""


def test_flags_of_servers_may_change_and_fields_of_megatron_may_not(folder: RunFolder) -> None:
    args = "rollout.server_args={mem_fraction_static: 0.5}"
    assert refusal(folder, [args], ["rollout.server_args.mem_fraction_static=0.6"]) == ""
    folder.config.unlink()
    both = "policy.megatron={fp32_residual_connection: true, fp8_margin: 1}"
    said = refusal(folder, [both], ["policy.megatron.fp32_residual_connection=true"])
    assert "policy.megatron.fp8_margin: 1 in the run folder, None now" in said
    assert said.count("policy.megatron") == 1


def test_the_correction_that_comes_with_running_ahead_may_not(folder: RunFolder) -> None:
    said = refusal(folder, [], ["train.max_staleness=1"])
    assert "algorithm.loss.correction.kind: 'none' in the run folder, 'tis' now" in said
    assert "train.max_staleness" not in said
    kept = ["train.max_staleness=1", "algorithm.loss.correction.kind=none"]
    folder.config.unlink()
    assert refusal(folder, [], kept) == ""


def test_the_content_of_a_converted_model_is_what_its_marker_lists(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = claim.fingerprint(tmp_path)
    (tmp_path / "complete.json").write_text("1")
    converted = claim.fingerprint(tmp_path)
    (tmp_path / "complete.json").write_text("2")
    assert len({before, converted, claim.fingerprint(tmp_path)}) == 3
    (tmp_path / "complete.json").write_text("1")
    assert claim.fingerprint(tmp_path) == converted
