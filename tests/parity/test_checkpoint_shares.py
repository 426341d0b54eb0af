"""Replicas share the writing and the reading of a checkpoint out."""

from __future__ import annotations

from pathlib import Path

from checkpoint_shares import execute

from agpo_megatron.config.schema import PolicyConfig
from agpo_megatron.parity.contract import Contract
from agpo_megatron.parity.models import LLAMA3


def test_two_replicas_write_and_read_half_each(contract: Contract, tmp_path: Path) -> None:
    model = contract.model("shares", {**LLAMA3, "hidden_size": 128, "intermediate_size": 256})
    policy = PolicyConfig(dtype="fp32", data_parallel=2)
    found = contract.ranks(2).run(2, execute, str(model), policy, str(tmp_path / "c"))
    written = [sum(rank["written"].values()) for rank in found]
    assert min(written) > 0.3 * sum(written), f"bytes by rank: {written}"
    assert all(len(rank["written"]) == 4 for rank in found), "one file for each thread"
    # Weights, and in fp32 the optimizer's parameter and two moments: four times what a rank holds.
    whole = 4 * found[0]["held"]
    read = [rank["read"] for rank in found]
    assert sum(read) < 1.2 * whole and max(read) < 0.7 * whole, (
        f"elements by rank: {read} of {whole}"
    )
