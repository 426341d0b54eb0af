"""The two Python environments of a run, trainers' and servers', and what their processes are told on a GPU.

SGLang pins another torch than the trainers use, so the two are installed apart. ``TRAIN_PYTHON`` and ``ROLLOUT_PYTHON``
name their interpreters; where they are not set, it is this one.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agpo_megatron.cluster.keeper import die_with_parent
from agpo_megatron.config.record import PACKAGES, package_versions

Kind = Literal["trainer", "rollout"]
VARIABLES: dict[Kind, str] = {"trainer": "TRAIN_PYTHON", "rollout": "ROLLOUT_PYTHON"}
PROBE = Path(__file__).parent / "environment_probe.py"
PROBE_SECONDS = 300.0
"""For importing torch and Transformer Engine for the first time, from a shared file system."""
INFINIBAND = Path("/sys/class/infiniband")

SAME_NCCL = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}
"""All members of a communicator must agree on how memory is shared. SGLang 0.5.23 sets both to 0 for itself
(``entrypoints/engine.py``), NCCL's defaults are others, and trainers and servers meet in the update groups."""
NO_TEAR_DOWN = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
"""A collective that fails makes torch signal every group of the process to dump, and the default group's monitor then
ends the process (``ProcessGroupNCCL::HeartbeatMonitor::runLoop``): also when it was only an update group's."""
GPU_VARIABLES: dict[Kind, dict[str, str]] = {
    "trainer": {
        **SAME_NCCL,
        **NO_TEAR_DOWN,
        # Kernels start in the order of their calls: megatron-core's overlap of communication rests on it.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        # Packs differ in length: without it the allocator's fixed pieces leave gaps.
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    },
    "rollout": {
        **SAME_NCCL,
        **NO_TEAR_DOWN,
        # A server must outlive an update group that has lost a member: its watchdog would end it.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    },
}


def interpreter(kind: Kind) -> str:
    """Python of one environment."""
    return os.environ.get(VARIABLES[kind]) or sys.executable


def gpu_variables(kind: Kind) -> dict[str, str]:
    """Return the variables to set for a role on a GPU; what the site has set stays, and must be the same everywhere."""
    return {name: os.environ.get(name, value) for name, value in GPU_VARIABLES[kind].items()}


@dataclass(frozen=True)
class Environment:
    """``versions``: of Python and the packages that matter. ``broken``: module -> why it cannot be imported."""

    versions: dict[str, str]
    broken: dict[str, str]


class ProbeFailed(RuntimeError):
    """A probe gave no answer; the message is the last that it said, or why it could not be run."""


def answered(command: Sequence[str]) -> Any:
    """Run a probe in a process of its own; return what it printed last, decoded from JSON. Raises ProbeFailed."""
    said = ""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            preexec_fn=die_with_parent,
        )
        said = done.stderr.strip()
        return json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        raise ProbeFailed(said.splitlines()[-1] if said else str(error)) from None


def inspect(kind: Kind, imports: tuple[str, ...] = ()) -> Environment:
    """Ask the interpreter of ``kind`` what it has, and import ``imports`` there, in a process of its own.

    The version of NCCL that torch has loaded is among the versions where torch is imported and has CUDA. Raises
    RuntimeError, naming the variable to correct, when the interpreter cannot be run.
    """
    python = interpreter(kind)
    command = [python, "-P", str(PROBE), json.dumps([PACKAGES, imports])]
    try:
        answer = answered(command)
    except ProbeFailed as error:
        raise RuntimeError(
            f"the {kind} environment's Python, {python}, cannot be run ({error}); "
            f"set {VARIABLES[kind]} to a Python that can"
        ) from None
    # The node's own process, not the servers', is what runs this project's code there.
    ours = {k: v for k, v in package_versions().items() if k == "agpo_megatron"}
    return Environment({**answer["versions"], **ours}, answer["broken"])


def infiniband_problem() -> str:
    """Why NCCL would not use the InfiniBand devices of this node but plain sockets; "" if it can, or there are none."""
    if not INFINIBAND.is_dir() or not any(INFINIBAND.iterdir()):
        return ""
    try:
        ctypes.CDLL("libibverbs.so.1")
    except OSError as error:
        return (
            f"there are InfiniBand devices in {INFINIBAND}, but libibverbs cannot be loaded ({error}): NCCL would use "
            "sockets; install rdma-core, libibverbs1 and ibverbs-providers in the image"
        )
    return ""
