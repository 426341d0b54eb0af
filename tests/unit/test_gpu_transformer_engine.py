"""The layers of a GPU run, with a stub that has Transformer Engine's signatures and plain torch behind them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import policy_models
import pytest

pytestmark = [pytest.mark.processes, pytest.mark.full]

WORKER = Path(__file__).parent / "te_worker.py"


@dataclass(frozen=True)
class Found:
    """What processes with either kind of layers answered, by what they were asked."""

    folder: Path
    te: dict[str, Any]
    local: dict[str, Any]


@pytest.fixture(scope="module", params=["llama3", "qwen2"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Both write a checkpoint and read the other's."""
    folder = tmp_path_factory.mktemp("m") / request.param
    policy_models.save(policy_models.hf_model(request.param), folder)
    te = run(folder, "te", "updates,resumed,write,calls")
    local = run(folder, "local", "updates,write,read")
    return Found(folder, te | run(folder, "te", "read"), local)


def run(folder: Path, layers: str, what: str) -> dict[str, Any]:
    here = os.pathsep.join([str(WORKER.parent), *sys.path])
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder), layers, what],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": here},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def test_they_compute_what_the_local_layers_compute(found: Found) -> None:
    """Packs in THD with padding, rotary angles that restart, grouped queries, biases, the fused optimizer."""
    te, local = found.te["updates"], found.local["updates"]
    assert te["layer"] == "TELayerNormColumnParallelLinear" and te["optimizer"] == "FusedAdam"
    assert local["layer"] == "ColumnParallelLinear" and local["optimizer"] == "AdamW"
    assert te["losses"] == pytest.approx(local["losses"], rel=2e-6)
    assert te["logprobs"] == pytest.approx(local["logprobs"], abs=2e-5)


def test_training_resumes_from_before_the_first_step_and_from_after_it(found: Found) -> None:
    resumed = found.te["resumed"]
    assert resumed["from_zero"] == resumed["expected"]
    assert resumed["from_one"] == resumed["expected"][1:]


def test_weights_change_from_one_kind_of_layers_to_the_other(found: Found) -> None:
    for writer, reader in ((found.te, found.local), (found.local, found.te)):
        written, read = writer["write"]["logprobs"], reader["read"]["logprobs"]
        assert read == pytest.approx(written, abs=2e-5)


def test_rows_and_arguments_are_those_of_fp8_and_of_the_configuration(found: Found) -> None:
    calls = found.te["calls"]
    for recipe, block in (("tensorwise", 16), ("blockwise", 128), ("mxfp8", 32)):
        assert calls["rows"][recipe], "no matmul was seen"
        assert all(rows % block == 0 for rows in calls["rows"][recipe]), calls["rows"]
    attention = [given for name, given in calls["layers"] if name == "DotProductAttention"]
    assert {a["num_gqa_groups"] for a in attention} == {"2"}
    assert {a["attn_mask_type"] for a in attention} == {"causal"}
    norms = [given for name, given in calls["layers"] if name == "LayerNormLinear"]
    assert {given["normalization"] for given in norms} == {"RMSNorm"}
    epsilon = json.loads((found.folder / "config.json").read_text())["rms_norm_eps"]
    assert {float(given["eps"]) for given in norms} == {epsilon}
