"""Each thing that cannot run is refused with its cause and fix, before it runs wrongly."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import policy_models
import pytest
import torch

from agpo_megatron.config.schema import Fp8Config, PolicyConfig
from agpo_megatron.policy import backend

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policy_models.save(policy_models.hf_model("llama"), tmp_path_factory.mktemp("m") / "hf")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tensor_parallel": 2}, r"1 ranks, but tensor_parallel 2 x .* = 2"),
        ({"context_parallel": 2}, r"1 ranks, but .* x context_parallel 2 x .* = 2"),
        ({"expert_parallel": 2}, "expert_parallel 2 does not divide context_parallel 1 x"),
        ({"sequence_parallel": True}, "sequence parallelism without tensor parallelism"),
        ({"fp8": Fp8Config(recipe="blockwise")}, "blockwise needs Transformer Engine"),
    ],
)
def test_layouts_and_precisions(folder: Path, changes: dict[str, Any], words: str) -> None:
    with (
        pytest.raises(ValueError, match=words),
        policy_models.one_rank(folder, PolicyConfig(dtype="fp32", **changes)),
    ):
        pass


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tensor_parallel": 3}, "tensor_parallel 3 does not divide num_attention_heads 4"),
        ({"tensor_parallel": 32}, "tensor_parallel 32 does not divide num_attention_heads 4"),
        (
            {"pipeline_parallel": 3},
            "3 x virtual_pipeline 1 = 3 does not divide num_hidden_layers 2",
        ),
        ({"expert_parallel": 2}, "expert_parallel 2 does not divide the 0 experts"),
    ],
)
def test_sizes(folder: Path, changes: dict[str, Any], words: str) -> None:
    backend.activate("cpu")
    from agpo_megatron.conversion.hf_checkpoint import read_config
    from agpo_megatron.conversion.shape import ModelShape
    from agpo_megatron.policy.model import ModelError, transformer_config

    with pytest.raises(ModelError, match=words):
        transformer_config(ModelShape.from_hf(read_config(folder)), PolicyConfig(**changes))


def test_routers_have_no_losses_of_their_own() -> None:
    """Megatron multiplies them by token counts that it divides by later; here nothing divides."""
    backend.activate("cpu")
    from agpo_megatron.conversion.shape import ModelShape
    from agpo_megatron.parity.models import MIXTRAL
    from agpo_megatron.policy.model import transformer_config

    asked = {**MIXTRAL, "router_aux_loss_coef": 0.02, "output_router_logits": True}
    config = transformer_config(ModelShape.from_hf(asked), PolicyConfig())
    assert config.moe_aux_loss_coeff == 0.0
    assert config.moe_z_loss_coeff is None


def test_another_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.18.0")
    with pytest.raises(backend.BackendError, match=r"megatron-core 0\.18\.0 .* against 0\.19\.2"):
        backend.activate("cpu")


def test_a_device_that_is_not_there() -> None:
    assert not torch.cuda.is_available()
    with pytest.raises(backend.BackendError, match="torch sees no CUDA device"):
        backend.activate("cuda")


def test_megatron_imported_too_early() -> None:
    program = (
        "import sys, types\n"
        "sys.modules['megatron.core'] = types.ModuleType('megatron.core')\n"
        "from agpo_megatron.policy import backend\n"
        "backend.activate('cpu')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "activate() must run before the first import of megatron.core" in done.stderr


def test_only_the_scope_lies_about_devices() -> None:
    active = backend.activate("cpu")
    x = torch.zeros(2)
    assert x.type() == "torch.FloatTensor"
    with active.scope():
        assert x.type() == "torch.cuda.FloatTensor"
        assert torch.ones(2, device="cuda").device.type == "cpu"
        assert x.cuda(non_blocking=True) is x
        with active.scope():
            pass
        assert x.type() == "torch.cuda.FloatTensor", "leaving an inner scope keeps the outer one"
    assert x.type() == "torch.FloatTensor"


def test_megatron_without_triton() -> None:
    program = (
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'triton': raise ModuleNotFoundError(name)\n"
        "import importlib.util\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, p=None: None if n == 'triton' else real(n, p)\n"
        "sys.meta_path.insert(0, Hide())\n"
        "from agpo_megatron.policy import backend\n"
        "backend.activate('cpu')\n"
        "from agpo_megatron.policy import model\n"
        "assert 'triton' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_gpu_libraries_on_a_cpu_run(tmp_path: Path) -> None:
    """Installed or even imported already: megatron-core must not find them, for they would meet CPU tensors."""
    for name in ("transformer_engine", "apex"):
        package = tmp_path / name
        for folder in ("", "pytorch", "pytorch/optimizers", "optimizers"):
            (package / folder).mkdir(exist_ok=True)
            (package / folder / "__init__.py").write_text("FusedAdam = FusedSGD = object\n")
    program = (
        "import transformer_engine.pytorch.optimizers\n"
        "from agpo_megatron.policy import backend\n"
        "assert not backend.activate('cpu').transformer_engine\n"
        "from megatron.core.optimizer import distrib_optimizer\n"
        "assert distrib_optimizer.Adam.__module__ == 'torch.optim.adam', distrib_optimizer.Adam\n"
        "assert not distrib_optimizer.HAVE_APEX_OR_TE\n"
        "assert distrib_optimizer.DistributedOptimizer.state_dict.__module__ == backend.__name__\n"
    )
    path = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=path)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("group", ["world", "gloo beside nccl"])
def test_control_messages_have_the_deadline_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, group: str
) -> None:
    from agpo_megatron.policy import parallel

    if group != "world":
        describe = parallel._describe

        def on_nccl(*arguments: Any) -> Any:
            with monkeypatch.context() as patch:
                active = dataclasses.replace(backend.current(), dist_backend="nccl")
                patch.setattr(backend, "_active", active)
                return describe(*arguments)

        monkeypatch.setattr(parallel, "_describe", on_nccl)
    with policy_models.one_rank(folder, timeout=77.0) as policy:
        control = policy.layout.control_group
        assert (control is torch.distributed.group.WORLD) == (group == "world")
        limit = control._get_backend(torch.device("cpu")).options._timeout
        assert limit == datetime.timedelta(seconds=77)
