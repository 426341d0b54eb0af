"""``agpo-megatron export``: a checkpoint without servers and ranks is what the policy would have exported."""

from __future__ import annotations

import json
from pathlib import Path

import policy_models
import pytest
from safetensors.torch import load_file
from test_policy_checkpoint import step

from agpo_megatron.cli import main
from agpo_megatron.config.run_folder import RunFolder

pytestmark = pytest.mark.processes


def test_a_checkpoint_is_exported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = policy_models.save(policy_models.hf_model("llama"), tmp_path / "hf")
    run = RunFolder(tmp_path / "run")
    with policy_models.one_rank(model) as policy:
        from agpo_megatron.policy import checkpoint
        from agpo_megatron.trainer.export import export_hf

        step(policy)
        checkpoint.save(run.checkpoint(3), policy, 3, {})
        export_hf(policy, tmp_path / "live", model)
    assert main(["export", str(run.path), "--step", "3"]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    run.config.write_text(f"model: {{path: {model}}}\ndata: {{path: d}}\n")
    run.inputs.write_text(json.dumps({"mode": "train"}))
    assert main(["export", str(run.path), "--step", "2"]) == 2
    assert "no checkpoint of that step; there are step-00000003" in capsys.readouterr().err
    assert not run.exports.exists()
    live = load_file(tmp_path / "live" / "model.safetensors")
    for more, out in (([], run.export(3)), (["--out", str(tmp_path / "o")], tmp_path / "o")):
        assert main(["export", str(run.path), "--step", "3", *more]) == 0
        assert capsys.readouterr().out.endswith(f"{out}\n")
        found = load_file(out / "model.safetensors")
        assert found.keys() == live.keys()
        assert all((found[name] == live[name]).all() for name in live)
    held = (run.export(3) / "model.safetensors").stat().st_ino
    assert main(["export", str(run.path), "--step", "3"]) == 0
    assert (run.export(3) / "model.safetensors").stat().st_ino == held
