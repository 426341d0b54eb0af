"""The recipes of the GPU environments: they agree with each other and with the registry, and NCCL is installed last."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agpo_megatron.cluster.environment_probe import loaded_nccl

pytestmark = pytest.mark.processes

REPO = Path(__file__).parents[2]
IMAGES = REPO / "launch" / "images"
LISTS = {
    "cpu": REPO / "launch" / "requirements-cpu.txt",
    "train": IMAGES / "requirements-train.txt",
    "rollout": IMAGES / "requirements-rollout.txt",
    "nccl": IMAGES / "nccl.txt",
}
PYTHON = "3.12"
"""Of Ubuntu 24.04, which both images are."""


def pins(name: str) -> dict[str, str]:
    """Package (with extras) -> version; every line is an exact pin."""
    found = {}
    for line in LISTS[name].read_text().splitlines():
        if line and not line.startswith("#"):
            package, version = line.split("==")
            found[package] = version
    return found


# ---------------------------------------------------------------- the recipes, run with a pip that only writes down

FAKE_PYTHON = """#!/bin/bash
if [ "$1" = -m ] && [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit; fi
echo "$@" >>"$LOG"
"""


@pytest.fixture
def calls(tmp_path: Path, request: pytest.FixtureRequest) -> list[str]:
    python, log = tmp_path / "python3", tmp_path / "log"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python), "LOG": str(log)}
    script = IMAGES / request.param
    subprocess.run(["bash", str(script), str(tmp_path / "venv")], check=True, env=env)
    return log.read_text().splitlines()


@pytest.mark.parametrize("calls", ["train.sh", "rollout.sh"], indirect=True)
def test_nccl_is_the_last_thing_installed_and_is_checked(calls: list[str]) -> None:
    *installs, last, check = calls
    assert all(call.startswith("-m pip install") for call in [*installs, last])
    assert last.endswith(f"--no-deps -r {IMAGES / 'nccl.txt'}")
    assert not any("nccl" in call for call in installs)
    assert check == f"{IMAGES / 'check_nccl.py'} {IMAGES / 'nccl.txt'}"


@pytest.mark.parametrize("calls", ["train.sh"], indirect=True)
def test_what_is_compiled_against_torch_comes_after_it(calls: list[str]) -> None:
    torch = next(i for i, call in enumerate(calls) if "requirements-cpu.txt" in call)
    engine = next(i for i, call in enumerate(calls) if "requirements-train.txt" in call)
    assert torch < engine and "--no-build-isolation" in calls[engine]
    assert "torch" in pins("cpu") and "transformer-engine-torch" in pins("train")


@pytest.mark.parametrize("name", ["train", "rollout"])
def test_a_dockerfile_copies_what_its_commands_use(name: str) -> None:
    text = (IMAGES / f"{name}.Dockerfile").read_text().replace("\\\n", " ")
    copied = [w for line in re.findall(r"^COPY (.+)$", text, re.M) for w in line.split()[:-1]]
    assert copied and all((REPO / path).is_file() for path in copied)
    names = {Path(path).name for path in copied}
    used = set(re.findall(r"/tmp/recipe/([\w.-]+)", text)) - {"supervisor.txt"}
    if name == "train":
        used |= {p.name for p in (LISTS["cpu"], LISTS["train"], LISTS["nccl"])} | {"check_nccl.py"}
    assert used <= names, "a command names a file that is not copied"
    assert names <= used | {"train.sh"}, "a copied file is not used"
    for package in ("rdma-core", "libibverbs1", "ibverbs-providers"):
        assert re.search(rf"apt-get install [^&]*\b{package}\b", text), f"no InfiniBand: {package}"
    (base,) = re.findall(r"^FROM (\S+)$", text, re.M)
    assert not base.endswith(":latest") and ":" in base
    for command in re.findall(r"^RUN (.+)$", text, re.M):
        assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0
    if name == "rollout":
        assert text.rindex("--no-deps -r /tmp/recipe/nccl.txt") > text.rindex("supervisor.txt")
        assert base.endswith(":v" + pins("rollout")["sglang"])
        assert f"== '{pins('rollout')['sglang']}'" in text


def test_pins_of_one_package_are_the_same_everywhere() -> None:
    cpu, rollout = pins("cpu"), pins("rollout")
    assert {n: cpu[n] for n in rollout.keys() & cpu.keys()} == {
        n: rollout[n] for n in rollout.keys() & cpu.keys()
    }
    install = (REPO / "launch" / "install.sh").read_text()
    assert f"sglang=={rollout['sglang']}\n" in install
    assert f"megatron-core=={pins('train')['megatron-core']}\n" in install
    engine = {v for n, v in pins("train").items() if n.startswith("transformer-engine")}
    assert len(engine) == 1


def test_gpu_environments_are_refused_without_a_driver() -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a driver: the call would install")
    done = subprocess.run(
        ["bash", str(REPO / "launch" / "install.sh"), "--gpu"], capture_output=True, text=True
    )
    assert done.returncode == 1 and "no nvidia-smi here" in done.stderr
    both = ["bash", str(REPO / "launch" / "install.sh"), "--gpu", "--dev"]
    assert "two calls" in subprocess.run(both, capture_output=True, text=True).stderr


def test_gpu_environments_are_made_once(tmp_path: Path) -> None:
    """With tools that only write down: two environments, each stamped; the second call does nothing."""
    tools, log, venv = tmp_path / "tools", tmp_path / "log", tmp_path / "venv"
    tools.mkdir()
    for name in ("nvidia-smi", "nvcc"):
        (tools / name).write_text("#!/bin/sh\n")
        (tools / name).chmod(0o755)
    (tools / "python3").write_text(FAKE_PYTHON)
    (tools / "python3").chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "LOG": str(log), "AGPO_VENV": str(venv)}
    env.pop("PYTHON", None)
    command = ["bash", str(REPO / "launch" / "install.sh"), "--gpu"]
    subprocess.run(command, check=True, env=env, capture_output=True)
    assert (venv / ".train.stamp").exists() and (tmp_path / "venv-rollout/.rollout.stamp").exists()
    first = log.read_text()
    assert first.count("nccl.txt") == 4 and f"-e {REPO}" in first
    subprocess.run(command, check=True, env=env, capture_output=True)
    assert log.read_text() == first
    (venv / ".base.stamp").touch()
    refused = subprocess.run(command, env=env, capture_output=True, text=True)
    assert refused.returncode == 1 and "without GPU; remove it" in refused.stderr
    assert log.read_text() == first


def test_the_loaded_nccl_is_asked(tmp_path: Path) -> None:
    """Not the one that torch was built against: a library that calls itself 2.30.7."""
    source = tmp_path / "n.c"
    source.write_text("int ncclGetVersion(int *v) { *v = 23007; return 0; }\n")
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    library = tmp_path / "libnccl.so.2"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    program = (
        "import json, runpy, sys\n"
        f"sys.argv = ['probe', json.dumps([[], ['torch']])]\n"
        f"runpy.run_path({str(REPO / 'agpo_megatron/cluster/environment_probe.py')!r}, run_name='__main__')\n"
    )
    env = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert json.loads(done.stdout)["versions"]["nccl"] == "2.30.7"
    check = [sys.executable, str(IMAGES / "check_nccl.py")]
    done = subprocess.run([*check, str(LISTS["nccl"])], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    other = tmp_path / "nccl.txt"
    other.write_text("nvidia-nccl-cu13==2.29.7\n")
    done = subprocess.run([*check, str(other)], capture_output=True, text=True, env=env)
    assert "NCCL 2.30.7 is loaded, 2.29.7 is pinned" in done.stderr


def test_without_nccl_there_is_no_version() -> None:
    if loaded_nccl():
        pytest.skip("this machine has NCCL")
    assert loaded_nccl() == ""


# ---------------------------------------------------------------- the registry


def release(package: str, version: str, python: str = PYTHON) -> list[str]:
    """What a release requires, from its metadata alone. Skips the test where the registry cannot be reached."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["--no-deps", "--report", "-", "--disable-pip-version-check"]
    command += ["--ignore-requires-python", f"{package}=={version}"]
    if not package.startswith(
        "transformer-engine-torch"
    ):  # a source package: compiled where it is installed
        command += [
            "--python-version",
            python,
            "--only-binary",
            ":all:",
            "--target",
            "/nonexistent",
        ]
    else:
        command = [sys.executable, "-m", "pip", "index", "versions", package]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    if done.returncode:
        if re.search("Temporary failure|Connection|Max retries|timed out", done.stderr):
            pytest.skip("the package registry cannot be reached")
        raise AssertionError(f"{package}=={version}: {done.stderr[-500:]}")
    if package.startswith("transformer-engine-torch"):
        assert version in re.findall(r"[\d.]+", done.stdout)
        return []
    (found,) = json.loads(done.stdout[done.stdout.index("{") :])["install"]
    assert found["metadata"]["version"] == version
    return list(found["metadata"].get("requires_dist", []))


def required(requirements: list[str], package: str) -> str:
    """The exact version that ``requirements`` ask of ``package``."""
    (version,) = {
        m[1]
        for r in requirements
        if (m := re.match(rf"{re.escape(package)}(?:\[[^]]*\])?==([\w.]+)", r))
    }
    return version


@pytest.mark.full
@pytest.mark.parametrize("name", ["train", "rollout", "nccl"])
def test_every_pinned_wheel_exists(name: str) -> None:
    for package, version in pins(name).items():
        release(package, version)


@pytest.mark.full
def test_torch_cuda_and_nccl_of_both_sides_agree() -> None:
    sglang = release("sglang", pins("rollout")["sglang"])
    servers = release("torch", required(sglang, "torch"))
    trainers = release("torch", pins("cpu")["torch"])
    assert required(servers, "cuda-toolkit") == required(trainers, "cuda-toolkit")
    assert required(servers, "nvidia-nccl-cu13") == pins("nccl")["nvidia-nccl-cu13"]
    assert required(trainers, "nvidia-nccl-cu13") != pins("nccl")["nvidia-nccl-cu13"], (
        "the two agree by now: nccl.txt and its --no-deps can go"
    )
    assert required(sglang, "transformers") == pins("cpu")["transformers"]
