"""What tools/ablate.py makes of the metrics of runs."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pandas as pd
import pytest

from agpo_megatron.config import Config, load_config

REPO = Path(__file__).parents[2]
ABLATE = runpy.run_path(str(REPO / "tools" / "ablate.py"), run_name="ablate")
STEP = {
    "reward/accuracy": 0.5,
    "response/tokens_mean": 30.0,
    "loss/unclipped": 1.0,
    "group/zero_variance_frac": 0.25,
    "policy/entropy": 0.3,
    "tokens/trained": 100,
}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    overrides = ["train.prompts_per_batch=8"]
    return load_config(REPO / "configs" / "tiny_cpu.yaml", overrides, str(tmp_path))


def test_curves_count_what_was_wasted_and_leave_out_what_was_not_measured(config: Config) -> None:
    rows = [
        {"step": 1, **STEP},
        {"step": 2, **STEP, "loss/unclipped": 3.0, "sampling/discarded_groups": 8},
        {"step": 3, **STEP, "loss/clip_gate": 0.0, "tokens/trained": 0},
    ]
    curves = ABLATE["curves_of"](rows, config)
    assert list(curves.index) == [1, 2, 3]
    assert list(curves["share of wasted samples"]) == [0.25, (0.25 + 1) / 2, 1.0]
    assert list(curves["gate closed"]) == [0.0, 0.0, 1.0]
    assert list(curves["policy entropy (nats)"].isna()) == [False, False, True]
    fluctuation = curves.filter(like="fluctuation").squeeze()
    assert list(fluctuation) == pytest.approx([0.0, math.sqrt(2), math.sqrt(4 / 3)])


def test_the_table_has_a_line_per_value_with_the_spread_over_seeds(config: Config) -> None:
    def run(accuracy: float) -> object:
        curves = ABLATE["curves_of"]([{"step": s, **STEP} for s in (1, 2)], config)
        scores = {"accuracy": [0.1, accuracy], "tokens_mean": [40.0, 20.0]}
        return ABLATE["Finished"](curves, pd.DataFrame(scores, index=[0, 2]))

    text = ABLATE["table"]({"grpo": [run(0.5), run(0.7)], "agpo": [run(0.9), run(0.9)]}, "preset")
    head, _, grpo, agpo, *_ = text.splitlines()
    assert head.startswith("| preset | held-out accuracy | before | held-out tokens | training")
    assert grpo.startswith("| `grpo` | 0.600 ± 0.141 | 0.100 ± 0.000 | 20.000 ± 0.000 | 0.500")
    assert agpo.startswith("| `agpo` | 0.900 ± 0.000 |")
