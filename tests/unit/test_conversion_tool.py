"""tools/convert_hf_checkpoint.py as a user runs it: exit codes, messages, there and back, interruption, damage."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conversion_models import ALL, LLAMA, MIXTRAL, QWEN2, QWEN3_MOE, random_weights
from converter import TOOL, convert, tool

from agpo_megatron.conversion.cutting import padded_vocabulary, shard_to_megatron
from agpo_megatron.conversion.hf_checkpoint import HfCheckpoint
from agpo_megatron.conversion.hf_writer import write_hf_checkpoint
from agpo_megatron.conversion.shape import TensorSpec
from agpo_megatron.conversion.weight_map import WeightMap
from agpo_megatron.policy.stored_reader import StoredCheckpoint, StoredModel

pytestmark = pytest.mark.processes

TIED = {**LLAMA, "tie_word_embeddings": True}


def write(folder, config=LLAMA, dtype=torch.bfloat16):
    tensors = random_weights(config, dtype)
    write_hf_checkpoint(folder, config, tensors.items())
    return tensors


def assert_holds(folder, tensors):
    found = HfCheckpoint(folder)
    assert set(found.specs) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found.load(name), tensor), name


@pytest.mark.parametrize("config", [*ALL.values(), TIED], ids=[*ALL, "tied"])
@pytest.mark.parametrize(("dtype", "cut"), [("bf16", ()), ("fp32", ("--tp", 4, "--pp", 2))])
def test_hf_to_megatron_to_hf_is_exact(tmp_path, capsys, config, dtype, cut):
    tensors = write(tmp_path / "hf", config, getattr(torch, tool().DTYPE_NAMES[dtype]))
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    assert convert("to-megatron", tmp_path / "hf", tmp_path / "m", *cut) == 0
    assert convert("verify", tmp_path / "hf", tmp_path / "m") == 0
    assert convert("to-hf", tmp_path / "m", tmp_path / "back", "--max-shard-size", "20KB") == 0
    assert convert("verify", tmp_path / "m", tmp_path / "back") == 0
    assert capsys.readouterr().out.count("equal") == 2
    assert_holds(tmp_path / "back", tensors)
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hf", "m"]


@pytest.mark.parametrize("config", [*ALL.values(), TIED], ids=[*ALL, "tied"])
@pytest.mark.parametrize("cut", [(), ("--tp", 4, "--pp", 2)])
def test_a_rank_of_any_layout_reads_what_it_would_cut_from_the_original(tmp_path, config, cut):
    config = {
        **config,
        "vocab_size": 70,
    }  # of four ranks the third has padding, the fourth nothing else
    tensors = write(tmp_path / "hf", config)
    assert convert("to-megatron", tmp_path / "hf", tmp_path / "m", *cut) == 0
    weights = WeightMap(config)
    model = StoredModel(StoredCheckpoint(tmp_path / "m"), weights)
    rules = [*weights.rules(), weights.for_megatron("output_layer.weight")]
    for tp in (1, 2, 4):
        rows = padded_vocabulary(70, tp)
        for rule in rules:
            for rank in range(tp):
                expected = shard_to_megatron(
                    rule, [tensors[t.name] for t in rule.hf], weights.shape, tp, rank, rows
                )
                assert torch.equal(model.load_shard(rule, tp, rank), expected), (rule, tp, rank)


def test_the_folder_is_a_model_and_its_marker_covers_all_of_it(tmp_path):
    write(tmp_path / "hf")
    for name in ("tokenizer.json", "generation_config.json"):
        (tmp_path / "hf" / name).write_text("{}")
    assert convert("to-megatron", tmp_path / "hf", tmp_path / "m") == 0
    assert (tmp_path / "m" / "config.json").read_bytes() == (
        tmp_path / "hf" / "config.json"
    ).read_bytes()
    listed = json.loads((tmp_path / "m" / "complete.json").read_text())["files"]
    files = {p.name for p in (tmp_path / "m").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "config.json"} <= files
    assert files == {*listed, "complete.json"}


def test_what_is_stored_in_rows_is_handed_out_as_it_is_stored(tmp_path):
    """In pieces of the tensor parallel ranks, not put together: that is what ``to-hf`` does not copy."""
    tensors = write(tmp_path / "hf", LLAMA)
    assert convert("to-megatron", tmp_path / "hf", tmp_path / "m", "--tp", 2) == 0
    model = StoredModel(StoredCheckpoint(tmp_path / "m"), WeightMap(LLAMA))
    pieces = {}
    for rule, _ in model.specs():
        for name, blocks in model.load_rows(rule).items():
            pieces[name.split(".")[-2]] = len(blocks)
            assert torch.equal(torch.cat(blocks), tensors[name])
    for name in ("embed_tokens", "lm_head", "gate_proj", "up_proj"):
        assert pieces.pop(name) == 2
    assert set(pieces.values()) == {
        1
    }  # q, k, v interleaved; o and down cut along columns; norms whole


def test_dtypes(tmp_path):
    tensors = write(tmp_path / "hf", QWEN2, torch.float32)
    assert convert("to-megatron", tmp_path / "hf", tmp_path / "m", "--dtype", "bf16") == 0
    assert convert("to-hf", tmp_path / "m", tmp_path / "b32", "--dtype", "fp32") == 0
    rounded = {n: t.bfloat16().float() for n, t in tensors.items()}
    assert_holds(tmp_path / "b32", rounded)
    assert json.loads((tmp_path / "b32" / "config.json").read_text())["dtype"] == "float32"
    mixed = {n: t if "norm" in n else t.bfloat16() for n, t in tensors.items()}
    write_hf_checkpoint(tmp_path / "mixed", QWEN2, mixed.items())
    assert convert("to-megatron", tmp_path / "mixed", tmp_path / "x") == 2
    assert convert("to-megatron", tmp_path / "mixed", tmp_path / "x", "--dtype", "fp32") == 0


def test_another_models_checkpoint_is_refused(tmp_path, capsys):
    for name, config in (("q", QWEN2), ("t", TIED), ("e", QWEN3_MOE), ("x", MIXTRAL)):
        write(tmp_path / name, config)
        assert convert("to-megatron", tmp_path / name, tmp_path / f"{name}-m") == 0
    for stored, like, message in (
        ("q-m", "t", r"linear_qkv.bias, output_layer.weight, which the model at hand has no place"),
        ("t-m", "q", "holds decoder.layers.self_attention.linear_qkv.bias with shape []"),
        ("e-m", "x", "q_layernorm.weight, which the model at hand has no place"),
        (
            "x-m",
            "e",
            "holds decoder.layers.self_attention.linear_qkv.weight with shape [2, 48, 24]",
        ),
    ):
        if like == "q":
            message = message.split(" with")[0]
        assert convert("to-hf", tmp_path / stored, tmp_path / "out", "--like", tmp_path / like) == 2
        assert message in capsys.readouterr().err
    assert convert("verify", tmp_path / "q-m", tmp_path / "t-m") == 1
    assert "self_attn.q_proj.bias: only in the first" in capsys.readouterr().out


def test_what_is_there_is_never_overwritten(tmp_path, capsys):
    write(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    assert convert("to-megatron", tmp_path / "hf", tmp_path / "out") == 2
    assert convert("to-hf", tmp_path / "hf", tmp_path / "out") == 2
    assert capsys.readouterr().err.count("out exists already") == 2
    assert convert("to-hf", tmp_path / "hf", tmp_path / "new") == 2
    assert "hf has no complete.json" in capsys.readouterr().err


def test_verify_says_what_differs_and_sets_the_exit_code(tmp_path, capsys):
    tensors = write(tmp_path / "a")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 0.5
    write_hf_checkpoint(tmp_path / "b", LLAMA, tensors.items())
    assert convert("verify", tmp_path / "a", tmp_path / "a") == 0
    assert convert("verify", tmp_path / "a", tmp_path / "b") == 1
    assert convert("verify", tmp_path / "a", tmp_path / "b", "--tolerance", "0.6") == 0
    assert convert("verify", tmp_path / "a", tmp_path / "nowhere") == 2
    assert convert("from-gguf", tmp_path / "nowhere.gguf", tmp_path / "out") == 2
    said = capsys.readouterr()
    assert "model.norm.weight: values, max 0.5" in said.out
    assert "1 tensors differ" in said.out
    assert "nowhere does not exist" in said.err
    assert "nowhere.gguf does not exist" in said.err


def test_inspect(tmp_path, capsys):
    write(tmp_path / "hf", MIXTRAL)
    convert("to-megatron", tmp_path / "hf", tmp_path / "m", "--tp", 2, "--pp", 2)
    capsys.readouterr()
    assert convert("inspect", tmp_path / "hf") == 0
    said = capsys.readouterr().out
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight  [24, 40]  bfloat16" in said
    numbers = sum(
        TensorSpec(n, tuple(t.shape), "bool").numel for n, t in random_weights(MIXTRAL).items()
    )
    assert f"MixtralForCausalLM: 41 tensors in 1 files, {numbers:,} values in bfloat16" in said
    assert convert("inspect", tmp_path / "m") == 0
    said = capsys.readouterr().out
    assert "decoder.layers.mlp.experts.experts.linear_fc1.weight  [2, 4, 80, 24]  bfloat16" in said
    assert f"{numbers:,} parameters in 41 Hugging Face tensors" in said
    assert "cut for tp 2, pp 2, vpp 1, ep 1" in said
    assert convert("inspect", tmp_path) == 2


BIG = {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ({**LLAMA, **BIG, "intermediate_size": 28672, "vocab_size": 128256}, 70_553_706_496),
        ({**QWEN2, **BIG, "intermediate_size": 29568, "vocab_size": 152064}, 72_706_203_648),
    ],
)
def test_a_70b_model_is_planned_without_weights(tmp_path, capsys, config, parameters):
    (tmp_path / "config.json").write_text(json.dumps(config))
    sizes = ("--tp", 8, "--pp", 4, "--vpp", 2)
    assert convert("to-megatron", tmp_path, tmp_path / "out", *sizes, "--plan") == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.startswith(f"{config['architectures'][0]}: {parameters:,} parameters in ")
    assert f"{2 * parameters / 1e9:.1f} GB in bfloat16" in last  # both vocabularies need no padding
    files = [line for line in lines if not line.startswith(" ")]
    assert {line.split("_")[2] for line in files} == {"0", "1", "2", "3"}
    per_layer = 8 if config["model_type"] == "qwen2" else 7
    assert len(lines) - len(files) == 3 + 80 * (per_layer - 1)
    # Chunks of ten layers; stage 0 has the first and the fifth of the eight.
    stage = 0
    for line in lines:
        if not line.startswith(" "):
            stage = int(line.split("_")[2])
        elif "linear_fc2" in line:
            layer = int(line.split("[")[1].split("]")[0])
            assert layer // 10 % 4 == stage
            assert f"[8192, {config['intermediate_size']}]" in line
    assert not (tmp_path / "out").exists()
    assert convert("to-megatron", tmp_path, tmp_path / "out", "--tp", 3, "--plan") == 2
    assert "tensor_parallel 3 does not divide num_attention_heads 64" in capsys.readouterr().err


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, capsys, monkeypatch):
    write(tmp_path / "hf")
    convert("to-megatron", tmp_path / "hf", tmp_path / "m")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=20_000))
    assert convert("to-megatron", tmp_path / "hf", tmp_path / "x") == 2
    assert convert("to-hf", tmp_path / "m", tmp_path / "x") == 2
    assert capsys.readouterr().err.count("0.00 GB free, 0.00 GB are needed; free some space") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "m"]


def test_an_interrupted_conversion_goes_on_where_it_was(tmp_path, monkeypatch):
    """Fails after some files; the second attempt writes only the others, and starts anew if the source has changed."""
    tensors = write(tmp_path / "hf")
    monkeypatch.setattr(tool(), "FILE_BYTES", 5000)
    loads: list[str] = []
    load, fail_at = HfCheckpoint.load, ["model.norm.weight"]

    def counted(self, name):
        loads.append(name)
        if name in fail_at:
            raise OSError(5, "Input/output error")
        return load(self, name)

    monkeypatch.setattr(HfCheckpoint, "load", counted)
    command = ("to-megatron", tmp_path / "hf", tmp_path / "m", "--workers", 1)
    assert convert(*command) == 2
    partial = tmp_path / ".m.partial"
    done = {p.name: p.stat().st_mtime_ns for p in partial.glob("*.distcp")}
    assert 3 < len(done) < 20
    assert not (tmp_path / "m").exists()
    assert convert("inspect", partial) == 2
    fail_at.clear()
    loads.clear()
    assert convert(*command) == 0
    assert 0 < len(loads) <= 3, "only what was missing is read again"
    assert {n: (tmp_path / "m" / n).stat().st_mtime_ns for n in done} == done
    assert not partial.exists()
    assert convert("to-hf", tmp_path / "m", tmp_path / "back") == 0
    assert_holds(tmp_path / "back", tensors)

    shutil.rmtree(tmp_path / "m")
    fail_at.append("model.norm.weight")
    assert convert(*command) == 2
    tensors["model.embed_tokens.weight"][0] += 1
    write_hf_checkpoint(tmp_path / "hf", LLAMA, tensors.items(), overwrite=True)
    fail_at.clear()
    assert convert(*command) == 0
    assert convert("verify", tmp_path / "hf", tmp_path / "m") == 0


def test_to_hf_goes_on_as_well_and_two_at_once_are_refused(tmp_path, capsys, monkeypatch):
    from agpo_megatron.conversion.building import open_building

    tensors = write(tmp_path / "hf", MIXTRAL)
    assert convert("to-megatron", tmp_path / "hf", tmp_path / "m") == 0
    load, calls = StoredModel.load_rows, []

    def broken(self, rule):
        calls.append(rule)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return load(self, rule)

    monkeypatch.setattr(StoredModel, "load_rows", broken)
    command = ("to-hf", tmp_path / "m", tmp_path / "b", "--max-shard-size", "9KB", "--workers", 1)
    assert convert(*command) == 130
    assert "goes on from here" in capsys.readouterr().err
    with open_building(tmp_path / "b", {}), pytest.MonkeyPatch.context():
        assert convert(*command) == 2
    assert "another process is writing" in capsys.readouterr().err
    assert convert(*command) == 0
    assert_holds(tmp_path / "b", tensors)


def test_a_killed_conversion_leaves_no_checkpoint(tmp_path):
    """kill -9 in the middle: what is left is not taken for a checkpoint, and the same command completes it."""
    config = {**LLAMA, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    write(tmp_path / "hf", config)
    slow = (
        "import runpy, sys, time; from agpo_megatron.conversion.hf_checkpoint import HfCheckpoint as C; load = C.load\n"
        "C.load = lambda self, name: (time.sleep(600 * ('layers.5' in name)), load(self, name))[1]\n"
        "main = runpy.run_path(sys.argv[1])['main']; main.__globals__['FILE_BYTES'] = 10**6; main(sys.argv[2:])"
    )
    words = [TOOL, "to-megatron", tmp_path / "hf", tmp_path / "m", "--workers", 2]
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(TOOL.parents[1])},
    )
    partial = tmp_path / ".m.partial"
    deadline = time.monotonic() + 60
    while not list(partial.glob("__*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "m").exists()
    assert convert("verify", tmp_path / "hf", partial) == 2
    tool().FILE_BYTES, default = 10**6, tool().FILE_BYTES
    try:
        assert convert("to-megatron", tmp_path / "hf", tmp_path / "m") == 0
    finally:
        tool().FILE_BYTES = default
    assert convert("verify", tmp_path / "hf", tmp_path / "m") == 0


# ---------------------------------------------------------------- damaged and hostile Megatron checkpoints


class Evil:
    """Unpickled, it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def _resign(folder: Path) -> None:
    """A hostile sender can compute the digests too."""
    from agpo_megatron.policy.marker import digest

    marker = json.loads((folder / "complete.json").read_text())
    marker["files"] = {n: digest(folder / n) for n in marker["files"]}
    (folder / "complete.json").write_text(json.dumps(marker))


def _flip(m: Path) -> None:
    path = next(m.glob("__0*.distcp"))
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def _truncate(m: Path) -> None:
    path = next(m.glob("__0*.distcp"))
    path.write_bytes(path.read_bytes()[:-100])
    _resign(m)


def _evil_metadata(m: Path) -> None:
    (m / ".metadata").write_bytes(pickle.dumps(Evil(m.parent / "evil")))
    _resign(m)


def _evil_record(m: Path) -> None:
    path = next(m.glob("__0*.distcp"))
    with path.open("r+b") as file:
        torch.save(Evil(m.parent / "evil"), file)
    _resign(m)


def _metadata(change):
    def damage(m: Path) -> None:
        content = pickle.loads((m / ".metadata").read_bytes())
        change(content)
        (m / ".metadata").write_bytes(pickle.dumps(content))
        _resign(m)

    return damage


def _outside(metadata) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = "../hf/model.safetensors"


def _beyond(metadata) -> None:
    for info in metadata.storage_data.values():
        info.length = 10**9


def _lost_chunk(metadata) -> None:
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks.pop()


def _other_shape(metadata) -> None:
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].size = torch.Size(
        [2, 1, 1]
    )


def _outside_marker(m: Path) -> None:
    marker = json.loads((m / "complete.json").read_text())
    marker["files"]["../hf/config.json"] = [1, 1]
    (m / "complete.json").write_text(json.dumps(marker))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip, "is not what was written"),
        (_truncate, "points to bytes"),
        (lambda m: next(m.glob("__0*.distcp")).unlink(), "is missing"),
        (lambda m: (m / "complete.json").unlink(), "give --like|has no complete.json"),
        (lambda m: (m / ".metadata").write_bytes(b"\x80\x04."), "is not what was written"),
        (lambda m: ((m / ".metadata").write_bytes(b"\x80\x04."), _resign(m)), "is damaged, or not"),
        (_evil_metadata, r"refers to posix\.mkdir\); it was not loaded"),
        (_evil_record, "cannot read|not what .metadata says"),
        (_metadata(_outside), "points to bytes .* of '../hf/model.safetensors'"),
        (_metadata(_beyond), "points to bytes"),
        (_metadata(_lost_chunk), "holds 0 of the 960 values of decoder.layers.mlp.linear_fc2"),
        (_metadata(_other_shape), "saved from another model"),
        (_outside_marker, "names '../hf/config.json', outside the folder"),
        (lambda m: (m / "config.json").unlink(), "give --like HF_DIR"),
    ],
)
def test_damaged_and_hostile_checkpoints_are_refused(tmp_path, capsys, damage, message):
    import re

    write(tmp_path / "hf")
    assert convert("to-megatron", tmp_path / "hf", tmp_path / "m") == 0
    damage(tmp_path / "m")
    capsys.readouterr()
    assert convert("to-hf", tmp_path / "m", tmp_path / "back") == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert not (tmp_path / "evil").exists(), "the checkpoint's code ran"
    assert not (tmp_path / "back").exists()
