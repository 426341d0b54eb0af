"""The command line and environment of one stock SGLang server (0.5.23); starting it is the cluster room's work.

A GPU server runs SGLang as it is. A CPU server gets, through PYTHONPATH and two of SGLang's own hooks, what the
published wheels lack there (``stand_ins/``): import stand-ins, an attention that is not one call per sequence, a quick
flush of the cache, and a short list of models to import.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agpo_megatron.config.run_folder import is_converted
from agpo_megatron.config.schema import Config

DRIVER = Path("/dev/nvidiactl")
DETERMINISTIC = "enable_deterministic_inference"
STAND_INS = Path(__file__).parent / "stand_ins"
PROMPT_ALLOWANCE = 128
"""Tokens of KV pool per sample on a CPU beside its response: prompts are short there, and G samples share one."""
MIN_CPU_POOL = 4096


@dataclass(frozen=True)
class ServerLaunch:
    """A command to execute. ``env`` holds only what differs from the parent's environment."""

    argv: list[str]
    env: dict[str, str]


def device_of(config: Config) -> Literal["cpu", "cuda"]:
    """Return the device of servers. ``cluster.device: auto`` is cuda where the driver's device file is: the
    supervisor, which asks, must not load torch; the trainers ask torch. Where the two could disagree (a torch
    without CUDA on a GPU machine), set ``cluster.device``."""
    if config.cluster.device == "auto":
        return "cuda" if DRIVER.exists() else "cpu"
    return config.cluster.device


def server_dtype(config: Config) -> str:
    """Precision of the servers, float32 or bfloat16: what they load, and what is published to them."""
    if config.rollout.dtype != "auto":
        return config.rollout.dtype
    return {"fp32": "float32", "bf16": "bfloat16"}[config.policy.dtype]


def sampling_seed(config: Config) -> int | None:
    """Seed of all sampling where the servers infer deterministically (``rollout.server_args:
    {enable_deterministic_inference: true}``), so that a sample depends on weights, prompt and seed alone; else None.
    """
    return config.seed if config.rollout.server_args.get(DETERMINISTIC) else None


def server_command(
    config: Config,
    model_path: str,
    *,
    port: int,
    host: str = "127.0.0.1",
    index: int = 0,
    python: str = sys.executable,
) -> ServerLaunch:
    """Command of rollout server number ``index`` for the model folder ``model_path``, run by ``python``.

    Pure, but for ``device_of`` and a look at the kind of the folder.
    """
    rollout = config.rollout
    device = device_of(config)
    flags: dict[str, object] = {
        "model-path": model_path,
        "host": host,
        "port": port,
        "device": device,
        "dtype": server_dtype(config),
        "tp-size": rollout.tensor_parallel,
        "random-seed": config.seed + index,
        "max-running-requests": rollout.max_in_flight,
        "mem-fraction-static": 0.8,
        "weight-version": "initial",
        "grammar-backend": "none",
        "log-level-http": "warning",
    }
    if is_converted(model_path):
        # SGLang cannot read Megatron's files: until the first publish its weights are random.
        flags["load-format"] = "dummy"
    switches = ["skip-server-warmup"]  # ready() is a real generation
    env = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        flags |= {
            "attention-backend": "torch_native",
            "sampling-backend": "pytorch",
            # Only a sanity check here, of memory that trainers share: the pool's size is given below.
            "mem-fraction-static": 0.95,
        }
        # An idle scheduler otherwise spins, on a core that the trainer needs.
        switches.append("sleep-on-idle")
        # SGLang would size the pool to the machine's memory and fill it.
        per_sample = rollout.max_response_tokens + PROMPT_ALLOWANCE
        flags["max-total-tokens"] = max(MIN_CPU_POOL, rollout.max_in_flight * per_sample)
        env |= cpu_environment()
        if sampling_seed(config) is not None:
            # For the stand-ins; SGLang sets it itself, but after they are loaded.
            env["SGLANG_ENABLE_DETERMINISTIC_INFERENCE"] = "1"
    elif server_dtype(config) == "bfloat16":
        # SGLang rounds logits to bf16 otherwise; the policy that trains has them in fp32.
        switches.append("enable-fp32-lm-head")
    further = {name.replace("_", "-"): value for name, value in rollout.server_args.items()}
    argv = [python, "-m", "sglang.launch_server"]
    for name, value in (flags | dict.fromkeys(switches, True) | further).items():
        argv += words(name, value)
    return ServerLaunch(argv, env)


def words(flag: str, value: object) -> list[str]:
    """A flag as words of a command line. True is the flag alone, false and null are left out, a list is several words,
    a mapping is JSON."""
    if value is None or value is False:
        return []
    if value is True:
        return [f"--{flag}"]
    if isinstance(value, list):
        return [f"--{flag}", *map(str, value)]
    return [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]


def cpu_environment() -> dict[str, str]:
    """Build the environment in which the published SGLang wheel serves on a CPU without AMX."""
    inherited = os.environ.get("PYTHONPATH")
    return {
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_EXTERNAL_MODEL_PACKAGE": "agpo_cpu_models",
        "PYTHONPATH": os.pathsep.join([str(STAND_INS), *([inherited] if inherited else [])]),
        "TORCHDYNAMO_DISABLE": "1",  # no compiler is needed, and three processes start 1.4 s sooner each
        "OMP_NUM_THREADS": "1",  # two threads spin for each other: 6 times the CPU time on a shared machine
    }


def refuse_port_in_use(host: str, port: int, key: str = "rollout.port") -> None:
    """Raise OSError with cause and fix when something listens on, or has bound, ``host:port``, which ``key`` sets."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(
                error.errno,
                f"{key} {port} on {host or 'this node'} is in use; stop what listens there, or set {key} to a free one "
                f"(0: {'picks free ports' if key == 'rollout.port' else 'none'})",
            ) from error
