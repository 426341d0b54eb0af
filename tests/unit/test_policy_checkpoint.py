from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import policy_models
import pytest
import torch
from converter import convert
from made import loss

from agpo_megatron.config.schema import PolicyConfig

pytestmark = pytest.mark.processes

BATCH = policy_models.sequences([20, 9, 14])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policy_models.save(policy_models.hf_model("tied"), tmp_path_factory.mktemp("m") / "hf")


def step(policy: Any) -> dict[str, float]:
    stats: dict[str, float] = policy.update([BATCH], loss=loss(policy="nll"), lr=1e-3)
    return stats


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed", [True, False])
def test_a_fresh_process_continues_bit_by_bit(
    folder: Path, tmp_path: Path, dtype: str, distributed: bool
) -> None:
    from agpo_megatron.policy import checkpoint

    config = PolicyConfig(dtype=dtype, distributed_optimizer=distributed)  # type: ignore[arg-type]
    with policy_models.one_rank(folder, config) as policy:
        step(policy), step(policy)
        checkpoint.save(tmp_path / "c", policy, 2, {"attempt": 3, "cursor": [1, 2]})
        draws = [torch.rand(3), random.random()]
        expected = [step(policy), step(policy)]
    with policy_models.one_rank(folder, config, seed=99) as policy:
        assert checkpoint.load(tmp_path / "c", policy) == (2, {"attempt": 3, "cursor": [1, 2]})
        assert torch.equal(torch.rand(3), draws[0]) and random.random() == draws[1]
        assert [step(policy), step(policy)] == expected


def test_a_checkpoint_before_the_first_step(folder: Path, tmp_path: Path) -> None:
    from agpo_megatron.policy import checkpoint

    with policy_models.one_rank(folder) as policy:
        checkpoint.save(tmp_path / "c", policy, 0, {})
        expected = step(policy)
        checkpoint.load(tmp_path / "c", policy)
        assert step(policy) == expected


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_policy_of_a_converted_checkpoint_is_the_same_and_trains_the_same(
    folder: Path, tmp_path: Path, dtype: str
) -> None:
    config = PolicyConfig(dtype=dtype)  # type: ignore[arg-type]
    assert convert("to-megatron", folder, tmp_path / "m", "--tp", 4, "--pp", 2) == 0
    with policy_models.one_rank(folder, config) as policy:
        weights = {name: tensor.clone() for name, tensor in policy.named_hf_tensors()}
        expected = [step(policy), step(policy)]  # the optimizer's own copies as well
    with policy_models.one_rank(tmp_path / "m", config) as policy:
        for name, tensor in policy.named_hf_tensors():
            assert torch.equal(tensor, weights.pop(name)), name
        assert weights == {}
        assert [step(policy), step(policy)] == expected


def test_a_damaged_converted_checkpoint_begins_no_run(folder: Path, tmp_path: Path) -> None:
    from agpo_megatron.policy.marker import CheckpointError

    assert convert("to-megatron", folder, tmp_path / "m") == 0
    _flipped(tmp_path / "m")
    with (
        pytest.raises(CheckpointError, match="is not what was written"),
        policy_models.one_rank(tmp_path / "m"),
    ):
        pass


def inodes(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_ino for p in folder.iterdir()}


def test_a_complete_checkpoint_is_never_replaced(folder: Path, tmp_path: Path) -> None:
    """Neither by its like, which changes nothing, nor by anything else, which is refused."""
    from agpo_megatron.policy import checkpoint

    target = tmp_path / "c"
    with policy_models.one_rank(folder) as policy:
        checkpoint.save(target, policy, 1, {"note": (1, 2)})
        files = inodes(target)
        step(policy)
        checkpoint.save(target, policy, 1, {"note": (1, 2)})
        for number, extra in ((2, {"note": (1, 2)}), (1, {})):
            with pytest.raises(checkpoint.CheckpointError, match=r"complete .*step 1.* else"):
                checkpoint.save(target, policy, number, extra)
        assert inodes(target) == files
        assert checkpoint.load(target, policy)[0] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from agpo_megatron.policy import checkpoint

    target = tmp_path_factory.mktemp("c") / "saved"
    with policy_models.one_rank(folder) as policy:
        checkpoint.save(target, policy, 1, {})
    return target


def _missing(c: Path) -> None:
    for file in c.iterdir():
        file.unlink()
    c.rmdir()


def _unfinished(c: Path) -> None:
    (c / "complete.json").unlink()


def _flipped(c: Path) -> None:
    data = next(c.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)


def _truncated(c: Path) -> None:
    data = next(c.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-100])


def _lost(c: Path) -> None:
    (c / ".metadata").unlink()


def _garbled(c: Path) -> None:
    (c / "complete.json").write_text("{")


def _other_format(c: Path) -> None:
    marker = json.loads((c / "complete.json").read_text())
    (c / "complete.json").write_text(json.dumps({**marker, "format": 99}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_missing, "does not exist"),
        (_unfinished, "never written to its end"),
        (_flipped, "is not what was written"),
        (_truncated, "is not what was written"),
        (_lost, ".metadata is missing"),
        (_garbled, "complete.json is damaged"),
        (_other_format, "has format 99"),
    ],
)
def test_what_is_no_checkpoint_is_refused(
    folder: Path, saved: Path, tmp_path: Path, damage: Any, words: str
) -> None:
    from agpo_megatron.policy import checkpoint

    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    damage(copy)
    with policy_models.one_rank(folder) as policy:
        before = {n: t.clone() for n, t in policy.named_hf_tensors()}
        with pytest.raises(checkpoint.CheckpointError, match=words):
            checkpoint.load(copy, policy)
        assert all(torch.equal(before[n], t) for n, t in policy.named_hf_tensors())


@pytest.mark.parametrize("damage", [_unfinished, _flipped, _garbled])
def test_what_is_no_checkpoint_makes_room(
    folder: Path, saved: Path, tmp_path: Path, damage: Any
) -> None:
    from agpo_megatron.policy import checkpoint

    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    damage(copy)
    (copy / "stray").write_text("")
    with policy_models.one_rank(folder) as policy:
        checkpoint.save(copy, policy, 1, {})
        assert checkpoint.load(copy, policy)[0] == 1
    assert not (copy / "stray").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_a_save_that_fails_leaves_the_folder_alone(folder: Path, tmp_path: Path) -> None:
    """The place of the temporary folder is taken by something that cannot be removed as a folder."""
    from agpo_megatron.policy import checkpoint

    (tmp_path / ".c.partial").write_text("in the way")
    with policy_models.one_rank(folder) as policy:
        with pytest.raises(checkpoint.CheckpointError, match="preparing .*partial"):
            checkpoint.save(tmp_path / "c", policy, 2, {})
        assert not (tmp_path / "c").exists()


def test_another_models_checkpoint_is_refused(saved: Path, tmp_path: Path) -> None:
    from agpo_megatron.policy import checkpoint

    other = policy_models.save(policy_models.hf_model("qwen2"), tmp_path / "hf")
    with (
        policy_models.one_rank(other) as policy,
        pytest.raises(checkpoint.CheckpointError, match="loading"),
    ):
        checkpoint.load(saved, policy)
