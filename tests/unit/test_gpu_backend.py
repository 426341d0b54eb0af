"""The CUDA branches of the backend, in processes of their own whose ``torch.cuda`` is a fake device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

FAKE_DEVICE = """
import torch
asked = []
torch.cuda.is_available = lambda: True
torch.cuda.set_device = asked.append
from agpo_megatron.policy import backend
"""


def run(folder: Path, program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), *sys.path])
    env = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FAKE_DEVICE + program],
        capture_output=True,
        text=True,
        env=env,
    )


def write_engine(folder: Path, code: str) -> None:
    package = folder / "transformer_engine" / "pytorch"
    package.mkdir(parents=True)
    (folder / "transformer_engine" / "__init__.py").write_text("")
    (package / "__init__.py").write_text(code)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (None, "ModuleNotFoundError: No module named 'transformer_engine'"),
        (
            "raise ImportError('libtransformer_engine.so: undefined symbol')",
            "ImportError: libtransf",
        ),
        ("raise OSError('libcudnn.so.9: cannot open')", "OSError: libcudnn.so.9"),
        ("raise RuntimeError('built for torch 2.12')", "RuntimeError: built for torch 2.12"),
    ],
)
def test_a_transformer_engine_that_cannot_be_imported_is_an_error(
    tmp_path: Path, code: str | None, words: str
) -> None:
    if code is not None:
        write_engine(tmp_path, code)
    done = run(tmp_path, "backend.activate('cuda')")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "BackendError: Transformer Engine cannot be imported" in last
    assert words in last and "policy.layers to local" in last


def test_a_sound_one_is_used(tmp_path: Path) -> None:
    write_engine(tmp_path, "")
    done = run(
        tmp_path,
        "backend._patch_torch_adamw_checkpoint = lambda: None\n"  # imports megatron with the real package
        "b = backend.activate('auto')\n"
        "assert b == backend.Backend('cuda', 'nccl', torch.device('cuda', 3), True), b\n"
        "assert asked == [3]\n"
        "x = torch.zeros(1)\n"
        "with b.scope(): assert x.type() == 'torch.FloatTensor'\n",
        LOCAL_RANK="3",
    )
    assert done.returncode == 0, done.stderr[-1500:]


def test_local_layers_on_a_gpu_are_asked_for_and_get_torchs_optimizer(tmp_path: Path) -> None:
    """Although a Transformer Engine lies there, broken or not; its fused optimizer must not meet the local layers."""
    write_engine(tmp_path, "raise RuntimeError('broken')")
    done = run(
        tmp_path,
        "b = backend.activate('cuda', 'local')\n"
        "assert not b.transformer_engine\n"
        "from megatron.core.optimizer import distrib_optimizer\n"
        "assert not distrib_optimizer.HAVE_APEX_OR_TE\n"
        "assert distrib_optimizer.Adam.__module__ == 'torch.optim.adam'\n"
        "assert distrib_optimizer.DistributedOptimizer.state_dict.__module__ == backend.__name__\n",
    )
    assert done.returncode == 0, done.stderr[-1500:]


def test_a_cpu_run_does_not_look_for_it(tmp_path: Path) -> None:
    write_engine(tmp_path, "raise RuntimeError('broken')")
    done = run(tmp_path, "assert backend.activate('cpu').device_type == 'cpu'")
    assert done.returncode == 0, done.stderr[-1500:]
