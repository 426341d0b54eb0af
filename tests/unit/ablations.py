"""A small ablation of two arms on two tasks, for tests of tools/ablate.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from ablation.plan import Plan, read_plan

REPO = Path(__file__).parents[2]
FILE = {
    "config": str(REPO / "configs" / "tiny_cpu.yaml"),
    "base": "grpo",
    "seeds": [1, 2],
    "tasks": {
        "sums": {"prepare.recipe": "tiny_sums"},
        "needed": {"prepare": {"recipe": "tiny_sums_needed"}},
    },
    "arms": {"grpo": {"algorithm.preset": "grpo"}, "v3": {"algorithm": {"preset": "agpo_v3"}}},
    "settings": {"train.steps": 3},
}


def plan_of(folder: Path, **changes: Any) -> Plan:
    path = folder / "plan.yaml"
    path.write_text(json.dumps({**FILE, **changes}))
    return read_plan(path, folder / "out")
