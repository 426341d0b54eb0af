"""Bad input and faults through the command line: one clear message with cause and fix, exit code, nobody left."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from kills import check_nothing_lost_or_repeated, command, finish, running_processes
from tiny_run import write_run

from agpo_megatron.cluster.claim import only_command_on, refuse_another_run
from agpo_megatron.config.errors import ConfigError
from agpo_megatron.config.loading import resolve_config
from agpo_megatron.config.record import resolved_yaml
from agpo_megatron.config.run_folder import RunFolder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_run(tmp_path)


def refused(config: Path, *options: str) -> str:
    """Run ``train``; it must end at once with code 2 and a message on stderr, and start nothing."""
    started = time.monotonic()
    result = subprocess.run(
        command(config, config.parent / "run", *options),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert time.monotonic() - started < 60
    assert not (config.parent / "run" / "journal").exists()
    return result.stderr


def test_missing_checkpoint(config: Path) -> None:
    message = refused(config, "--set", "model.path=/nowhere/model")
    assert "model.path" in message and "/nowhere/model" in message


def test_missing_tokenizer(config: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (config.parent / "model" / name).unlink()
    message = refused(config)
    assert "tokenizer" in message and "model" in message


def test_empty_data(config: Path) -> None:
    (config.parent / "train.jsonl").write_text("")
    message = refused(config)
    assert "train.jsonl" in message and "empty" in message


def test_a_layout_that_does_not_divide(config: Path) -> None:
    message = refused(config, "--set", "policy.tensor_parallel=3")
    assert "tensor_parallel 3 does not divide num_attention_heads 4" in message


def test_an_unknown_key_names_the_nearest(config: Path) -> None:
    message = refused(config, "--set", "train.stpes=3")
    assert "train.stpes" in message and "train.steps" in message


def test_fp8_without_transformer_engine(config: Path) -> None:
    message = refused(
        config, "--set", "policy.fp8.recipe=blockwise", "--set", "cluster.device=cuda"
    )
    assert "transformer_engine" in message and "no FP8" in message


def test_a_port_in_use(config: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refused(config, "--set", f"rollout.port={port}")
    assert str(port) in message and "rollout.port" in message


def test_an_answer_that_could_never_be_confirmed(config: Path) -> None:
    data = config.parent / "train.jsonl"
    data.write_text(data.read_text() + '{"prompt": "1+1:", "answer": "two"}\n')
    outcome = finish(config, config.parent / "run")
    assert outcome.exit_code == 1
    assert "line 101: the reference 'two' is not one number" in outcome.output


def begin(config: Path, mode: str = "train") -> Path:
    """A run folder as the first moment of a run leaves it."""
    resolved = resolve_config(config, [], str(config.parent / "run"))
    folder = RunFolder(config.parent / "run")
    folder.path.mkdir()
    refuse_another_run(resolved.config, folder, mode)
    folder.config.write_text(resolved_yaml(resolved.config, resolved.provenance))
    return folder.path


def test_another_run_in_the_folder(config: Path) -> None:
    begin(config)
    message = refused(config, "--set", "seed=2", "--set", "train.steps=9", "--set", "train.lr=0.5")
    assert "holds another run" in message and "seed: 1 in the run folder, 2 now" in message
    assert "train.lr" in message and "train.steps" not in message


def test_a_finished_run_is_not_shown_as_the_result_of_another_config(config: Path) -> None:
    (begin(config) / "done.json").write_text('{"mode": "train", "steps": 4}')
    assert "algorithm.preset" in refused(config, "--set", "algorithm.preset=grpo")


def test_changed_data_is_another_run(config: Path) -> None:
    begin(config)
    data = config.parent / "train.jsonl"
    data.write_text(data.read_text() + '{"prompt": "1+1:", "answer": "2"}\n')
    assert "data.path: its content has changed" in refused(config)


def claim(config: Path, folder: RunFolder, **data: str) -> None:
    """Claim the folder as a start with these settings of ``data`` does, and leave what the start leaves there."""
    sets = [f"data.{key}={value}" for key, value in data.items()]
    resolved = resolve_config(config, sets, str(folder.path))
    folder.path.mkdir(exist_ok=True)
    refuse_another_run(resolved.config, folder, "train")
    folder.config.write_text(resolved_yaml(resolved.config, resolved.provenance))


def test_a_data_folder_may_move_and_difficulty_may_not_change(config: Path) -> None:
    parts, rates = config.parent / "parts", config.parent / "rates.arrow"
    parts.mkdir()
    shutil.move(config.parent / "train.jsonl", parts / "train.jsonl")
    rates.write_bytes(b"first")
    folder = RunFolder(config.parent / "run")
    claim(config, folder, path=str(parts), difficulty=str(rates))

    moved = parts.rename(config.parent / "moved")
    claim(config, folder, path=str(moved), difficulty=str(rates))
    rates.write_bytes(b"second")
    with pytest.raises(ConfigError, match=r"data\.difficulty: its content has changed"):
        claim(config, folder, path=str(moved), difficulty=str(rates))


def test_a_folder_in_use(config: Path) -> None:
    folder = RunFolder(config.parent / "run")
    folder.path.mkdir()
    with only_command_on(folder):
        assert "is in use by another agpo-megatron" in refused(config)


def test_replay_of_what_is_no_run(config: Path) -> None:
    assert "is not a journal" in refused(config, "--replay", "/nowhere/run")


def test_a_server_that_dies_while_it_starts(config: Path) -> None:
    run_dir = config.parent / "run"
    run = subprocess.Popen(command(config, run_dir), stderr=subprocess.PIPE, text=True)
    while not (pids := running_processes(RunFolder(run_dir))):
        assert run.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    children = psutil.Process(run.pid).children(recursive=True)
    os.kill(pids["rollout server 0"], signal.SIGKILL)
    _, message = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "rollout server 0 was killed by signal 9" in message
    assert not psutil.wait_procs(children, timeout=10)[1]


@pytest.mark.full
def test_a_full_disk_ends_the_run_and_loses_nothing(config: Path) -> None:
    run_dir = config.parent / "run"
    run_dir.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(run_dir)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        full = finish(config, run_dir)
        # The journal's refusal, with its fix, or the failure of the trainer's checkpoint: whichever is first.
        assert full.exit_code == (2 if "Nothing committed is lost" in full.output else 1)
        assert "No space left on device" in full.output, full.output
        subprocess.run(["mount", "-o", "remount,size=100m", str(run_dir)], check=True)
        outcome = finish(config, run_dir)
        assert outcome.exit_code == 0, outcome.output
        check_nothing_lost_or_repeated(run_dir, steps=4, prompts=4, group_size=4)
    finally:
        subprocess.run(["umount", "-l", str(run_dir)], check=True)
        shutil.rmtree(run_dir, ignore_errors=True)
