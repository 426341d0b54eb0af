"""The written configuration reference is that of the schema."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from agpo_megatron.config.key_tables import configuration_reference
from agpo_megatron.config.keys import schema_keys

COMMITTED = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_committed_reference_is_up_to_date() -> None:
    assert COMMITTED.read_text(encoding="utf-8") == configuration_reference(), (
        "run: python -m agpo_megatron.config.key_tables docs/configuration.md"
    )


def test_there_are_at_most_176_keys_and_each_is_documented() -> None:
    keys = [key for key in schema_keys() if not key.is_section]
    assert len(keys) <= 176
    assert [key.name for key in schema_keys() if not key.doc] == []
    page = configuration_reference()
    assert [key.name for key in keys if f"| `{key.name}` |" not in page] == []


def test_keys_that_scripts_rely_on_exist() -> None:
    relied_on = (
        "seed train.steps data.path model.path algorithm.preset policy.tensor_parallel policy.pipeline_parallel "
        "policy.context_parallel policy.expert_parallel policy.sequence_parallel policy.dtype rollout.servers "
        "cluster.trainer_nodes cluster.rollout_nodes"
    )
    assert set(relied_on.split()) <= {key.name for key in schema_keys()}


def test_types_and_limits_are_shown() -> None:
    page = configuration_reference()
    assert "| `rollout.group_size` | integer ≥ 2 | `8` | Samples per prompt (G). |" in page
    assert "| `rollout.server_args` | section of any keys | `{}` |" in page
    assert "| `reward.workers` | integer ≥ 1 or null | `null` |" in page
    assert "| `policy.dtype` | `fp32` or `bf16` | `bf16` |" in page
    assert "| `model.path` | text | **required** |" in page
    assert "| `agpo_v1` | `agpo` | `0.1` | `group_norm` | `constant` | `ppo` | `0.2` |" in page


def test_the_generator_writes_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    command = [sys.executable, "-m", "agpo_megatron.config.key_tables", str(page)]
    subprocess.run(command, check=True, timeout=60, cwd=COMMITTED.parents[1])
    assert page.read_text(encoding="utf-8") == configuration_reference()
