"""The command line and environment of a server follow from the configuration."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from agpo_megatron.config.schema import Config
from agpo_megatron.rollout.server import (
    STAND_INS,
    refuse_port_in_use,
    server_command,
    server_dtype,
)


def config(device: str = "cpu", policy_dtype: str = "fp32", **rollout: object) -> Config:
    return Config.model_validate(
        {
            "seed": 3,
            "model": {"path": "m"},
            "data": {"path": "d"},
            "policy": {"dtype": policy_dtype},
            "cluster": {"device": device},
            "rollout": rollout,
        }
    )


def flags(argv: list[str]) -> dict[str, str]:
    names = [i for i, word in enumerate(argv) if word.startswith("--")]
    return {argv[i]: "" if i + 1 in [*names, len(argv)] else argv[i + 1] for i in names}


def test_cpu_server() -> None:
    launch = server_command(
        config(max_in_flight=128, max_response_tokens=200), "/models/x", port=4001, index=2
    )
    found = flags(launch.argv)
    assert launch.argv[:3] == [sys.executable, "-m", "sglang.launch_server"]
    assert found["--model-path"] == "/models/x"
    assert found["--port"] == "4001"
    assert found["--dtype"] == "float32"
    assert found["--random-seed"] == "5"
    assert found["--max-running-requests"] == "128"
    assert found["--max-total-tokens"] == str(128 * 328)
    assert "--sleep-on-idle" in found
    assert launch.env["SGLANG_USE_CPU_ENGINE"] == "1"
    assert launch.env["PYTHONPATH"].split(os.pathsep)[0] == str(STAND_INS)


def test_gpu_server_gets_no_stand_ins() -> None:
    launch = server_command(config("cuda", "bf16", tensor_parallel=4), "m", port=1)
    found = flags(launch.argv)
    assert found["--tp-size"] == "4"
    assert found["--dtype"] == "bfloat16"
    assert "--enable-fp32-lm-head" in found
    assert "--enable-fp32-lm-head" not in server_command(config("cuda"), "m", port=1).argv
    assert "--attention-backend" not in found
    assert "--max-total-tokens" not in found
    assert "PYTHONPATH" not in launch.env
    assert not any(name.startswith("SGLANG") for name in launch.env)


def test_dtype_key_wins_over_the_policy() -> None:
    launch = server_command(config(dtype="bfloat16"), "m", port=1)
    assert flags(launch.argv)["--dtype"] == "bfloat16"
    assert server_dtype(config(dtype="bfloat16")) == "bfloat16"
    assert server_dtype(config(policy_dtype="bf16")) == "bfloat16"
    assert server_dtype(config(policy_dtype="bf16", dtype="float32")) == "float32"


def test_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"port {port} on 127.0.0.1 is in use.*rollout\.port"):
            refuse_port_in_use("127.0.0.1", port)
    refuse_port_in_use("127.0.0.1", port)


def test_kernel_stand_in_fails_only_when_called() -> None:
    code = (
        "import sgl_kernel\n"
        "f = sgl_kernel.some_kernel_cpu\n"
        "assert not hasattr(sgl_kernel, 'rmsnorm')\n"
        "try: f(1)\n"
        "except NotImplementedError as e: assert 'some_kernel_cpu' in str(e)\n"
        "else: raise SystemExit('no error')\n"
    )
    env = {**os.environ, "PYTHONPATH": str(STAND_INS)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


def test_a_server_of_a_converted_model_begins_with_random_weights(tmp_path: Path) -> None:
    assert "--load-format" not in flags(server_command(config(), str(tmp_path), port=1).argv)
    (tmp_path / "complete.json").write_text("{}")
    found = flags(server_command(config(), str(tmp_path), port=1).argv)
    assert found["--load-format"] == "dummy"


@pytest.mark.processes
def test_a_flush_on_a_cpu_leaves_garbage_to_python() -> None:
    """What the stand-in replaces is there in the pinned SGLang, and is replaced."""
    code = (
        "import gc, agpo_quick_flush\n"
        "from sglang.srt.platforms.cpu import CpuDeviceMixin\n"
        "walks = []\ngc.collect = lambda *_: walks.append(1)\n"
        "CpuDeviceMixin().empty_cache()\nagpo_quick_flush.activate()\n"
        "CpuDeviceMixin().empty_cache()\nassert len(walks) == 1, walks\n"
    )
    env = {**os.environ, **server_command(config("cpu"), "m", port=1).env}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
