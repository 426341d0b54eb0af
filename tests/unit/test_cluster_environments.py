"""Two environments on one node: each role gets its own Python, and the preflight looks into the right one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import write_run

from agpo_megatron.cluster import environments, preflight
from agpo_megatron.cluster.environments import GPU_VARIABLES, gpu_variables, infiniband_problem
from agpo_megatron.cluster.node import node_roles, server_devices
from agpo_megatron.cluster.preflight import NodeFacts, gather_facts, judge
from agpo_megatron.cluster.processes import Role
from agpo_megatron.cluster.roles import NodeRoles, Plan, machine_plan
from agpo_megatron.cluster.start_folder import StartFolder
from agpo_megatron.config import Config, load_config
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.rollout import server

pytestmark = pytest.mark.processes

REPO = Path(__file__).parents[2]
BOTH = NodeRoles("here", (0, 1), (0,), controller=True)


def environment_without(folder: Path, *hidden: str) -> Path:
    """A Python with all of this one's packages but some: a link to each, behind an interpreter that looks there."""
    packages = folder / "packages"
    packages.mkdir(parents=True)
    here = next(Path(p) for p in sys.path if p.endswith("site-packages"))
    for path in here.iterdir():
        if not path.name.startswith(hidden) and path.suffix != ".pth":
            (packages / path.name).symlink_to(path)
    python = folder / "python"
    path = f"${{PYTHONPATH:+$PYTHONPATH:}}{packages}"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={path} exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    return python


@pytest.fixture(scope="module")
def pythons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("environments")
    return {
        "train": environment_without(folder / "train", "sglang"),
        "rollout": environment_without(folder / "rollout", "megatron"),
    }


def problems(config: Config, roles: NodeRoles = BOTH) -> list[str]:
    return gather_facts(roles, config, "train", "127.0.0.1", "lo", 1).problems


def test_each_package_is_looked_for_where_it_is_used(
    tmp_path: Path, pythons: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(write_run(tmp_path))
    monkeypatch.setenv("TRAIN_PYTHON", str(pythons["train"]))
    monkeypatch.setenv("ROLLOUT_PYTHON", str(pythons["rollout"]))
    facts = gather_facts(BOTH, config, "train", "127.0.0.1", "lo", 1)
    assert facts.problems == []
    assert "sglang" not in facts.versions["trainer"]
    assert "megatron-core" not in facts.versions["rollout"]
    assert facts.versions["trainer"]["torch"] == facts.versions["rollout"]["torch"]
    # Servers' torch may be another one: that is why there are two.
    plan = Plan("train", (BOTH,), 2)
    facts.versions["rollout"]["torch"] = "2.14.1"
    calls = {"here": preflight.Calls()}
    assert judge(plan, {"here": facts}, calls).failure == ""
    facts.versions["trainer"]["nccl"], facts.versions["rollout"]["nccl"] = "2.29.7", "2.30.7"
    assert judge(plan, {"here": facts}, calls).failure == (
        "here: nccl is 2.30.7 in its rollout environment, 2.29.7 in the trainer environment of here; give both the same"
    )


def test_one_environment_for_both_is_named_when_it_lacks_one(
    tmp_path: Path, pythons: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the start of one GPU node met: servers in the trainers' environment."""
    config = load_config(write_run(tmp_path))
    monkeypatch.setenv("TRAIN_PYTHON", str(pythons["train"]))
    monkeypatch.setenv("ROLLOUT_PYTHON", str(pythons["train"]))
    (problem,) = problems(config)
    assert problem.startswith(
        f"the rollout environment ({pythons['train']}) has no sglang; set ROLLOUT"
    )
    monkeypatch.setenv("TRAIN_PYTHON", str(pythons["rollout"]))
    assert "has no megatron-core; set TRAIN_PYTHON" in problems(config)[0]
    assert problems(config, NodeRoles("here", (), (0,))) == [problem]
    assert problems(config, NodeRoles("here", (), (), controller=True)) == []


@pytest.mark.parametrize("python", ["/no/such/python", "/bin/false"])
def test_a_python_that_does_not_run(
    tmp_path: Path, python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROLLOUT_PYTHON", python)
    (problem,) = problems(load_config(write_run(tmp_path)))
    assert f"{python}, cannot be run" in problem and "set ROLLOUT_PYTHON" in problem


@pytest.mark.full
def test_transformer_engine_is_imported_where_it_will_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "gpu_memory", lambda: [81559] * 8)
    monkeypatch.setattr(preflight, "infiniband_problem", lambda: "")
    path = write_run(tmp_path, **{"cluster.device": "cuda"})
    (problem,) = problems(load_config(path))
    assert "cannot import transformer_engine.pytorch (ModuleNotFoundError" in problem
    assert "set TRAIN_PYTHON" in problem and "policy.layers to local" in problem
    assert problems(load_config(path, ["policy.layers=local"])) == []
    assert problems(load_config(path), NodeRoles("here", (), (0,))) == []


def test_infiniband_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "INFINIBAND", tmp_path / "none")
    assert infiniband_problem() == ""
    monkeypatch.setattr(environments, "INFINIBAND", tmp_path)
    assert infiniband_problem() == "", "no device"
    (tmp_path / "mlx5_0").mkdir()

    def load(name: str) -> object:
        assert name == "libibverbs.so.1"
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(environments.ctypes, "CDLL", load)
    assert "install rdma-core, libibverbs1 and ibverbs-providers" in infiniband_problem()
    monkeypatch.setattr(environments.ctypes, "CDLL", lambda name: None)
    assert infiniband_problem() == ""


# ---------------------------------------------------------------- what roles are given


def roles_of(folder: Path, device: str, **changes: object) -> list[Role]:
    config = load_config(write_run(folder, **{"cluster.device": device, **changes}))
    plan = machine_plan(config, "here", "train")
    start = StartFolder.create(RunFolder(folder / "run"), "now", plan, config)
    ports = {"controller": 1, "master": 2, "rollout server 0": 3}
    facts = {"here": NodeFacts("127.0.0.1", "", 4, ports, {}, [], [])}
    return node_roles(plan.on("here"), plan, config, start, facts, ())


def test_roles_run_in_their_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAIN_PYTHON", "/venvs/train/bin/python")
    monkeypatch.setenv("ROLLOUT_PYTHON", "/venvs/rollout/bin/python")
    roles = {role.name: role for role in roles_of(tmp_path, "cpu")}
    assert roles["rollout server 0"].argv[:3] == [
        "/venvs/rollout/bin/python",
        "-m",
        "sglang.launch_server",
    ]
    assert roles["trainer rank 1"].argv[0] == "/venvs/train/bin/python"
    assert roles["controller"].argv[0] == sys.executable
    assert not any(name in role.env for role in roles.values() for name in GPU_VARIABLES["trainer"])


def test_the_launchers_hand_both_pythons_on(tmp_path: Path) -> None:
    """``local.sh`` finds the environment that ``install.sh --gpu`` makes; a site's own choice wins."""
    python = tmp_path / ".venv" / "bin" / "python"
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "local.sh").write_bytes((REPO / "launch" / "local.sh").read_bytes())
    for path in (python, tmp_path / ".venv-rollout" / "bin" / "python"):
        path.parent.mkdir(parents=True)
        path.write_text('#!/bin/sh\necho "$0 $ROLLOUT_PYTHON"\n')
        path.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k not in ("TRAIN_PYTHON", "ROLLOUT_PYTHON")}

    def said(**more: str) -> str:
        command = ["bash", str(tmp_path / "launch" / "local.sh")]
        return subprocess.run(command, env=env | more, capture_output=True, text=True).stdout

    assert said() == f"{python} {tmp_path}/.venv-rollout/bin/python\n"
    assert said(ROLLOUT_PYTHON="/r") == f"{python} /r\n"
    (tmp_path / ".venv-rollout" / "bin" / "python").unlink()
    assert said() == f"{python} \n"


def test_a_slurm_job_exports_both_pythons() -> None:
    """One node: its trainers' supervisor starts the servers."""
    command = ["bash", str(REPO / "launch" / "agpo_8b.sh"), "--dry-run"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    env |= {"TRAIN_PYTHON": sys.executable, "ROLLOUT_PYTHON": "/r/python", "AGPO_SITE_ENV": "/none"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"TRAIN_PYTHON={sys.executable}\n" in done.stdout
    assert "ROLLOUT_PYTHON=/r/python\n" in done.stdout
    assert done.stdout.count("srun ") == 1 and "ranks 0-3, servers 0-3" in done.stderr


def test_both_ends_of_a_communicator_share_memory_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in {**GPU_VARIABLES["trainer"], **GPU_VARIABLES["rollout"]}:
        monkeypatch.delenv(name, raising=False)
    roles = {role.name: role.env for role in roles_of(tmp_path, "cuda")}
    trainer, rollout = roles["trainer rank 0"], roles["rollout server 0"]
    for name in ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE", "TORCH_NCCL_DUMP_ON_TIMEOUT"):
        assert trainer[name] == rollout[name] == "0"
    assert trainer["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert trainer["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert rollout["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in trainer, "trainers' own groups must end them"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in rollout, "SGLang sets its own"


def test_the_site_may_set_other_values_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    assert gpu_variables("trainer")["NCCL_NVLS_ENABLE"] == "1"
    assert gpu_variables("rollout")["NCCL_NVLS_ENABLE"] == "1"


def test_servers_get_the_gpus_behind_the_ranks_or_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    changes: dict[str, object] = {"cluster.device": "cuda", "rollout.servers": 2}
    config = load_config(write_run(tmp_path, **changes))
    here = NodeRoles("here", (0, 1), (0, 1))
    assert server_devices(here, 1, config) == {"CUDA_VISIBLE_DEVICES": "3"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    alone = NodeRoles("here", (0,), (0,))
    assert server_devices(alone, 0, config) == {"CUDA_VISIBLE_DEVICES": ""}, "never shared unasked"
    sharing = load_config(write_run(tmp_path, **changes, **{"cluster.publish_backend": "gloo"}))
    assert server_devices(alone, 0, sharing) == {"CUDA_VISIBLE_DEVICES": "5"}
    assert server_devices(alone, 0, load_config(write_run(tmp_path))) == {}


def test_auto_is_the_drivers_device_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(write_run(tmp_path, **{"cluster.device": "auto"}))
    monkeypatch.setattr(server, "DRIVER", tmp_path / "nvidiactl")
    assert server.device_of(config) == "cpu"
    (tmp_path / "nvidiactl").touch()
    assert server.device_of(config) == "cuda"
