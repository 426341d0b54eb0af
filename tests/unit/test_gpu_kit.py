"""The acceptance kit without a GPU: what is skipped and why, that nothing hides anything, and the report."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import kit
import machine
import pytest
import record
import status
import torch

from agpo_megatron.cluster.node import server_devices
from agpo_megatron.cluster.roles import machine_plan
from agpo_megatron.config import check_config, load_config
from agpo_megatron.config.schema import PolicyConfig
from agpo_megatron.conversion.cutting import check_layout
from agpo_megatron.conversion.shape import ModelShape

pytestmark = pytest.mark.processes

REPO = Path(__file__).parents[2]
TRAIN = {"torch": "2.13.0", "megatron-core": "0.19.2"}
EIGHT = [["NVIDIA H100", 80 << 30, "9.0"]] * 8


def here(gpus: int = 8, **changes: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "cuda": "13.0",
        "gpus": EIGHT[:gpus],
        "driver": "580.1",
        "train": {"python": "/t/python", "versions": TRAIN, "broken": {}},
        "rollout": {"python": "/r/python", "versions": {"sglang": "0.5.23"}, "broken": {}},
    }
    return facts | changes


def run_kit(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "TRAIN_PYTHON": sys.executable, "ROLLOUT_PYTHON": sys.executable}
    command = ["bash", str(REPO / "tests" / "gpu" / "run.sh"), "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, env=env)


# ---------------------------------------------------------------- this machine


def test_without_a_gpu_every_stage_says_why(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run_kit(tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu_report.json").read_text())
    assert [s["stage"] for s in report["stages"]] == list("abcdef")
    assert {s["status"] for s in report["stages"]} == {"skipped"}
    assert {s["reason"] for s in report["stages"]} == {"torch sees no CUDA device"}
    assert done.stdout.count("torch sees no CUDA device") == 6
    assert report["machine"]["train"]["versions"]["torch"] == importlib.metadata.version("torch")


@pytest.mark.full
def test_small_sizes_on_a_cpu(tmp_path: Path) -> None:
    done = run_kit(tmp_path, "--device", "cpu")
    assert done.returncode == 0, done.stdout
    report = json.loads((tmp_path / "gpu_report.json").read_text())
    found = {s["stage"]: s for s in report["stages"]}
    assert [found[key]["status"] for key in "abcdef"] == ["passed"] * 2 + ["skipped"] * 4
    checks = {key: [e for e in found[key]["entries"] if e["kind"] == "check"] for key in "ab"}
    assert len(checks["a"]) == 20 and len(checks["b"]) > 30
    assert all(e["ok"] for entries in checks.values() for e in entries)
    page = (tmp_path / "gpu_report.md").read_text()
    assert "| a | log-prob head" in page and "measured matmul rate" in page
    assert status.table(report).count("| never |") == 6, "a CPU counts for nothing"


# ---------------------------------------------------------------- what is missing


@pytest.mark.parametrize(
    ("stage", "facts", "reason"),
    [
        ("a", here(1), ""),
        ("a", here(0), "torch sees no CUDA device"),
        (
            "b",
            here(1, train={"python": "/t", "versions": {"torch": "2"}}),
            "no megatron-core in /t",
        ),
        ("a", here(1, train={"python": "/t", "versions": {}}), "no torch in /t"),
        (
            "c",
            here(
                1,
                train={
                    "python": "/t",
                    "versions": TRAIN,
                    "broken": {"transformer_engine.pytorch": "ImportError: x"},
                },
            ),
            "Transformer Engine cannot be imported: ImportError: x",
        ),
        ("c", here(1), ""),
        ("d", here(1, rollout={"python": "/r", "versions": {}}), "no SGLang in /r"),
        ("d", here(1), ""),
        ("e", here(1), ""),
        ("f", here(1), "needs 8 GPUs, there are 1"),
        ("f", here(8), ""),
    ],
)
def test_what_a_stage_needs(stage: str, facts: dict[str, Any], reason: str) -> None:
    facts["train"].setdefault("broken", {})
    assert machine.missing(stage, facts, "cuda") == reason


# ---------------------------------------------------------------- nothing hides anything

WELL = "record.check('one', True)"
FAILS = "record.check('one', True); record.close('two', float('nan'), 1.0)"
CRASHES = "record.check('one', True); raise RuntimeError('the device is gone')"
HANGS = """
record.check('one', True)
import subprocess, time
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
record.figure('pid', child.pid)
time.sleep(60)
"""
SILENT = "pass"


def test_a_stage_that_fails_crashes_or_hangs_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = tmp_path / "stages"
    stages.mkdir()
    for key, body in zip("abcdef", (FAILS, CRASHES, HANGS, SILENT, WELL, WELL), strict=True):
        (stages / f"stage_{key}.py").write_text(
            f"import sys\nsys.path.insert(0, {str(REPO / 'tests' / 'gpu')!r})\n"
            f"from pathlib import Path\nfrom record import Record\nrecord = Record(Path(sys.argv[2]))\n{body}\n"
        )
    monkeypatch.setattr(kit, "HERE", stages)
    monkeypatch.setattr(kit, "STAGES", [replace(s, limit=5.0) for s in kit.STAGES])
    monkeypatch.setattr(machine, "describe", here)
    monkeypatch.setattr(
        machine, "missing", lambda stage, *_: "there is no f here" if stage == "f" else ""
    )
    monkeypatch.setattr(sys, "argv", ["kit", "--out", str(tmp_path / "out")])
    assert kit.main() == 1
    report = json.loads((tmp_path / "out" / "gpu_report.json").read_text())
    lines = {s["stage"]: s for s in report["stages"]}
    assert [lines[k]["status"] for k in "abcdef"] == ["failed"] * 4 + ["passed", "skipped"]
    assert lines["a"]["reason"] == "did not hold: two"
    assert lines["b"]["reason"] == "RuntimeError: the device is gone"
    assert lines["c"]["reason"] == "stopped after its limit of 5 s"
    assert lines["d"]["reason"] == "reported nothing"
    assert all(lines[k]["entries"][0]["name"] == "one" for k in "abce")
    left = int(next(e["value"] for e in lines["c"]["entries"] if e["name"] == "pid"))
    assert not alive(left)
    page = (tmp_path / "out" / "gpu_report.md").read_text()
    assert "8 x NVIDIA H100" in page and "| two | **does not hold** |" in page
    assert status.table(report).count("H100") == 5 and "| f: eight" in status.table(report)
    assert "a  failed" in capsys.readouterr().out


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_targets() -> None:
    found = record.Record(Path(os.devnull))
    found.figure("a", 1.2, most=1.1)
    found.figure("b", 1.2)
    found.at_least("c", 0.46, 0.45)
    found.close("d", float("nan"), 1.0)
    assert [e.ok for e in found.entries] == [False, None, True, False]


def test_unknown_stages_are_refused(tmp_path: Path) -> None:
    done = run_kit(tmp_path, "--stages", "ax")
    assert done.returncode == 2 and "no stage x" in done.stderr


def test_limits_of_stages() -> None:
    assert all(s.limit < 480 for s in kit.STAGES), "each ends inside 8 minutes"
    assert all((REPO / "tests" / "gpu" / f"stage_{s.key}.py").exists() for s in kit.STAGES)


@pytest.mark.parametrize("page", status.PAGES)
def test_the_pages_say_what_has_run(page: Path) -> None:
    text = page.read_text()
    assert status.with_table(text, status.table(status.committed())) == text, (
        "run: python3 tests/gpu/status.py"
    )


def test_the_loop_on_one_gpu_is_a_sound_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import stage_e

    asked: list[tuple[Path, tuple[str, ...]]] = []

    def train(_: Any, name: str, path: Path, run: Path, *sets: str, steps: int = 4) -> None:
        asked.append((path, sets))

    monkeypatch.setattr(stage_e, "train", train)
    monkeypatch.setattr(stage_e, "agpo", lambda *_: True)
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "config.json").write_text("{}")
    monkeypatch.setenv("AGPO_SMOLLM2_RUN", str(tmp_path))
    entries = record.Record(tmp_path / "entries")
    stage_e.one_gpu(entries, tmp_path / "run")
    stage_e.smollm2(entries)
    stage_e.quickstart(entries, tmp_path / "q")
    assert len(asked) == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6")
    for path, sets in asked:
        config = load_config(path, list(sets))
        assert check_config(config) == []
        plan = machine_plan(config, "here", "train")
        assert plan.world_size == 1 and plan.server_count == 1
        assert server_devices(plan.nodes[0], 0, config) == {"CUDA_VISIBLE_DEVICES": "6"}


ON_A_CPU = """
import os, sys
sys.path[:0] = [{gpu!r}, {tests!r}]
from pathlib import Path
from record import Record
record = Record(Path(sys.argv[1]))
{body}
"""
BODIES = {
    "d": "import stage_d\nstage_d.run(record, 'cpu', 0)",
    "e": "import stage_e\nstage_e.one_gpu_settings = lambda: ('cluster.device=cpu', 'policy.tensor_parallel=1', "
    "'policy.dtype=bf16', 'algorithm.loss.correction.kind=tis')\n"
    "stage_e.one_gpu(record, Path(sys.argv[1]).parent / 'run')",
}


@pytest.mark.full
@pytest.mark.parametrize("key", BODIES)
def test_later_stages_work_on_a_cpu(key: str, tmp_path: Path) -> None:
    """With a real server: what they ask of it and of the policy, and what they make of the answers."""
    tests = REPO / "tests"
    program = ON_A_CPU.format(gpu=str(tests / "gpu"), tests=str(tests), body=BODIES[key])
    command = [sys.executable, "-c", program, str(tmp_path / "entries.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    entries = record.load(tmp_path / "entries.json")
    assert [e for e in entries if e["ok"] is False] == []
    assert len([e for e in entries if e["ok"]]) == {"d": 5, "e": 3}[key]


def test_layouts_of_eight_gpus_fit() -> None:
    import stage_f

    for name, axes in stage_f.LAYOUTS.items():
        policy = PolicyConfig(**axes)
        assert policy.world_size == stage_f.WORLD, name
        assert policy.context_parallel * policy.data_parallel % policy.expert_parallel == 0
        shape = ModelShape.from_hf(stage_f.model_of(name))
        check_layout(
            shape,
            policy.tensor_parallel,
            policy.pipeline_parallel,
            policy.virtual_pipeline,
            policy.expert_parallel,
        )
    for axis in ("tensor", "pipeline", "context", "expert", "data"):
        assert any(f"{axis}_parallel" in axes for axes in stage_f.LAYOUTS.values())


@pytest.mark.parametrize("key", "abcdef")
def test_stages_can_be_imported(key: str) -> None:
    """Names that they import must exist, GPU or not; their packages of a GPU are imported inside."""
    program = f"import sys; sys.path.insert(0, {str(REPO / 'tests/gpu')!r}); import stage_{key}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
