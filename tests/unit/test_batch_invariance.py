"""What stands in for SGLang's batch-invariant kernels on a CPU."""

from __future__ import annotations

import importlib.util
import struct
from types import ModuleType

import pytest
import torch

from agpo_megatron.config.schema import Config
from agpo_megatron.rollout.server import STAND_INS, sampling_seed, server_command

WORD = 0xFFFFFFFF


@pytest.fixture(scope="module")
def invariance() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "agpo_batch_invariance", STAND_INS / "agpo_batch_invariance.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def murmur3(data: bytes) -> int:
    """MurmurHash3_x86_32 of ``data`` with seed 0, written after its public description."""

    def rotated(x: int, r: int) -> int:
        return (x << r | x >> (32 - r)) & WORD

    hashed = 0
    whole = len(data) // 4 * 4
    for start in range(0, len(data), 4):
        block = int.from_bytes(data[start : start + 4], "little")
        hashed ^= rotated(block * 0xCC9E2D51 & WORD, 15) * 0x1B873593 & WORD
        if start < whole:
            hashed = (rotated(hashed, 13) * 5 + 0xE6546B64) & WORD
    hashed ^= len(data)
    hashed = (hashed ^ hashed >> 16) * 0x85EBCA6B & WORD
    hashed = (hashed ^ hashed >> 13) * 0xC2B2AE35 & WORD
    return hashed ^ hashed >> 16


def test_the_hash_is_murmur3(invariance: ModuleType) -> None:
    # Published values, for the reference above.
    assert murmur3(b"test") == 0xBA6BD213
    assert murmur3(b"The quick brown fox jumps over the lazy dog") == 0x2E4FF723
    seeds = [0, 1, 2**31 + 7, 2**40 + 3, 3141592653]
    positions, columns = [0, 1, 17, 4096, 131071], [0, 1, 2, 151935]
    found = invariance.murmur_hash32(
        torch.tensor(seeds, dtype=torch.uint64), torch.tensor(positions), torch.tensor(columns)
    )
    expected = [
        [murmur3(struct.pack("<QII", seed, position, column)) for column in columns]
        for seed, position in zip(seeds, positions, strict=True)
    ]
    assert found.tolist() == expected


def test_a_row_of_a_product_is_the_same_among_any_number_of_rows(invariance: ModuleType) -> None:
    torch.manual_seed(0)
    left, right, bias = torch.randn(80, 512), torch.randn(512, 128), torch.randn(128)
    whole, plus_bias = invariance.mm(left, right), invariance.addmm(bias, left, right)
    torch.testing.assert_close(whole, left @ right)
    torch.testing.assert_close(plus_bias, torch.addmm(bias, left, right))
    for count in (1, 2, 5, 7, 15, 16, 17, 40):
        assert torch.equal(invariance.mm(left[:count], right), whole[:count])
        assert torch.equal(invariance.addmm(bias, left[:count], right), plus_bias[:count])


def test_servers_are_asked_for_it_by_one_key() -> None:
    def settings(**server_args: object) -> Config:
        return Config.model_validate(
            {
                "seed": 7,
                "model": {"path": "m"},
                "data": {"path": "d"},
                "cluster": {"device": "cpu"},
                "rollout": {"server_args": server_args},
            }
        )

    plain, seeded = settings(), settings(enable_deterministic_inference=True)
    assert sampling_seed(plain) is None
    assert sampling_seed(seeded) == 7
    for config, asked in ((plain, False), (seeded, True)):
        launch = server_command(config, "m", port=1)
        assert ("--enable-deterministic-inference" in launch.argv) == asked
        assert (launch.env.get("SGLANG_ENABLE_DETERMINISTIC_INFERENCE") == "1") == asked
