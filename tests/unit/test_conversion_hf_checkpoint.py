"""Checkpoint folders: written whole, read back exactly, and every kind of damage refused with its cause."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conversion_models import LLAMA, LLAMA3_SCALING, QWEN2, random_weights
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from agpo_megatron.conversion.comparison import differences
from agpo_megatron.conversion.errors import ConversionError
from agpo_megatron.conversion.hf_checkpoint import HfCheckpoint
from agpo_megatron.conversion.hf_writer import write_hf_checkpoint


def write(folder, config=LLAMA, dtype=torch.float32, **options):
    tensors = random_weights(config, dtype)
    write_hf_checkpoint(folder, config, tensors.items(), **options)
    return tensors


@pytest.mark.parametrize("max_shard_bytes", [10**9, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_then_read_is_exact_in_one_or_many_shards(tmp_path, dtype, max_shard_bytes):
    tensors = write(tmp_path / "m", dtype=dtype, max_shard_bytes=max_shard_bytes)
    checkpoint = HfCheckpoint(tmp_path / "m")
    assert set(checkpoint.specs) == set(tensors)
    for name, tensor in tensors.items():
        spec = checkpoint.specs[name]
        assert (spec.shape, spec.dtype) == (tuple(tensor.shape), str(tensor.dtype)[6:])
        assert torch.equal(checkpoint.load(name), tensor)
    files = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors*"))
    if max_shard_bytes == 10**9:
        assert files == ["model.safetensors"]
    else:
        assert files[0].startswith("model-00001-of-000")
        assert files[-1] == "model.safetensors.index.json"
        index = json.loads((tmp_path / "m" / files[-1]).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        for file_name in files[:-1]:
            held = [
                checkpoint.specs[t].nbytes for t, f in index["weight_map"].items() if f == file_name
            ]
            assert sum(held) <= 9000 or len(held) == 1
    assert checkpoint.weight_map().shape.layers == 2
    assert [p.name for p in tmp_path.iterdir()] == ["m"], "no partial folder may stay behind"


@pytest.mark.parametrize("config", [LLAMA, {**QWEN2, "tie_word_embeddings": True}])
def test_transformers_loads_what_is_written(tmp_path, config):
    config = {**config, "rope_theta": 777.0, "rope_scaling": LLAMA3_SCALING}
    tensors = write(tmp_path / "m", config, max_shard_bytes=9000)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", local_files_only=True)
    assert model.config.rope_parameters == {**LLAMA3_SCALING, "rope_theta": 777.0}
    assert model.dtype == torch.float32
    state = model.state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor), name


def test_views_of_one_parameter_can_be_written(tmp_path):
    both = torch.randn(8, 3)
    pairs = [("a", both[:4]), ("b", both[4:]), ("c", both), ("d", both.t())]
    write_hf_checkpoint(tmp_path / "m", LLAMA, pairs)
    checkpoint = HfCheckpoint(tmp_path / "m")
    assert all(torch.equal(checkpoint.load(name), tensor) for name, tensor in pairs)


def test_tokenizer_files_travel_and_weights_and_code_do_not(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "code.py"):
        (source / name).write_text(name)
    (source / "pytorch_model.bin").write_bytes(b"x")
    write(tmp_path / "m", source_dir=source)
    copied = {p.name for p in (tmp_path / "m").iterdir()} - {"config.json", "model.safetensors"}
    assert copied == {"tokenizer.json", "chat_template.jinja", "generation_config.json"}
    modes = {p.stat().st_mode for p in (tmp_path / "m").iterdir()}
    assert len(modes) == 1, "weights are readable by whoever may read the config"


def test_an_existing_folder_is_kept_unless_told(tmp_path):
    write(tmp_path / "m")
    before = HfCheckpoint(tmp_path / "m").load("model.norm.weight")
    fresh = random_weights(LLAMA, seed=1)
    with pytest.raises(ConversionError, match="exists already"):
        write_hf_checkpoint(tmp_path / "m", LLAMA, fresh.items())
    assert torch.equal(HfCheckpoint(tmp_path / "m").load("model.norm.weight"), before)
    write_hf_checkpoint(tmp_path / "m", LLAMA, fresh.items(), overwrite=True)
    after = HfCheckpoint(tmp_path / "m").load("model.norm.weight")
    assert torch.equal(after, fresh["model.norm.weight"])
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path):
    def broken():
        tensors = random_weights(LLAMA)
        yield from list(tensors.items())[:5]
        raise OSError(28, "No space left on device")

    with pytest.raises(ConversionError, match=r"writing .*m failed: .*No space left"):
        write_hf_checkpoint(tmp_path / "m", LLAMA, broken(), max_shard_bytes=100)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConversionError, match="given twice"):
        write_hf_checkpoint(tmp_path / "m", LLAMA, [("a", torch.ones(1)), ("a", torch.ones(1))])
    with pytest.raises(ConversionError, match="no tensors"):
        write_hf_checkpoint(tmp_path / "m", LLAMA, [])
    assert list(tmp_path.iterdir()) == []


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def _garbage(folder):
    (folder / "model.safetensors").write_bytes(b"\x80\x04garbage")


def _pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _index_to(target):
    def damage(folder):
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        index = {"weight_map": {"model.norm.weight": target}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "does not exist or is not a folder"),
        (lambda f: (f / "config.json").unlink(), r"config\.json does not exist"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json is not readable JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
        (lambda f: (f / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
        (_truncate, r"model\.safetensors is truncated or not a safetensors file"),
        (_garbage, r"model\.safetensors is truncated or not a safetensors file"),
        (_pickle_only, r"pickled weights \(pytorch_model\.bin\), which are never loaded"),
        (_index_to("../secret.safetensors"), r"model\.norm\.weight points outside the folder"),
        (_index_to("/etc/passwd"), "points outside the folder"),
        (_index_to(".."), "points outside the folder"),
        (_index_to(3), "points outside the folder"),
        (_index_to("evil.bin"), "'evil.bin', which is not a safetensors file"),
        (_index_to("gone.safetensors"), r"weight file gone\.safetensors is missing"),
        (_index_to("part.safetensors"), "disagree about"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
            "has no weight_map",
        ),
    ],
)
def test_damaged_and_hostile_folders_are_refused_with_their_cause(tmp_path, damage, message):
    write(tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(ConversionError, match=message):
        HfCheckpoint(tmp_path / "m")


def test_tensors_that_no_rule_covers_or_that_lack_are_refused(tmp_path):
    tensors = random_weights(LLAMA)
    write_hf_checkpoint(tmp_path / "more", LLAMA, [*tensors.items(), ("extra", torch.ones(1))])
    with pytest.raises(ConversionError, match="holds extra, which no rule"):
        HfCheckpoint(tmp_path / "more").weight_map()
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    write_hf_checkpoint(tmp_path / "less", LLAMA, tensors.items())
    with pytest.raises(ConversionError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        HfCheckpoint(tmp_path / "less").weight_map()
    with pytest.raises(ConversionError, match="holds no tensor 'extra'"):
        HfCheckpoint(tmp_path / "less").load("extra")


def test_a_tied_head_stored_twice_must_be_the_embedding(tmp_path):
    config = {**LLAMA, "tie_word_embeddings": True}
    tensors = random_weights(config)
    copy = tensors["model.embed_tokens.weight"].clone()
    write_hf_checkpoint(tmp_path / "same", config, [*tensors.items(), ("lm_head.weight", copy)])
    assert HfCheckpoint(tmp_path / "same").weight_map().shape.tied
    copy[3, 3] += 1
    write_hf_checkpoint(tmp_path / "other", config, [*tensors.items(), ("lm_head.weight", copy)])
    with pytest.raises(ConversionError, match="ties lm_head.weight .* but they differ"):
        HfCheckpoint(tmp_path / "other").weight_map()


def test_an_unknown_stored_dtype_is_refused(tmp_path):
    write(tmp_path / "m")
    save_file({"x": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(ConversionError, match="unknown dtype C64"):
        HfCheckpoint(tmp_path / "m")


def test_differences_name_each_tensor_that_differs(tmp_path):
    tensors = random_weights(LLAMA)
    write_hf_checkpoint(tmp_path / "a", LLAMA, tensors.items())
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    changed["model.norm.weight"][5] += 0.25
    changed["lm_head.weight"] = changed["lm_head.weight"].double()
    changed["model.embed_tokens.weight"] = changed["model.embed_tokens.weight"][:-1]
    changed["model.layers.0.input_layernorm.weight"][0] = float("nan")
    changed["new"] = changed.pop("model.layers.1.mlp.up_proj.weight")
    write_hf_checkpoint(tmp_path / "b", LLAMA, changed.items())
    a, b = HfCheckpoint(tmp_path / "a"), HfCheckpoint(tmp_path / "b")

    def found(one, two, tolerance=0.0):
        pairs = differences(one.specs, one.load, two.specs, two.load, tolerance)
        return {d.name: (d.what, d.max_error) for d in pairs}

    assert found(a, a) == found(b, b) == {}
    exact = found(a, b)
    assert exact.pop("model.norm.weight") == ("values", pytest.approx(0.25, rel=1e-5))
    assert exact.pop("lm_head.weight") == ("dtype float32 against float64", None)
    assert exact.pop("model.embed_tokens.weight") == ("shape [131, 24] against [130, 24]", None)
    assert exact.pop("model.layers.0.input_layernorm.weight") == ("values", float("inf"))
    assert exact.pop("model.layers.1.mlp.up_proj.weight") == ("only in the first", None)
    assert exact == {"new": ("only in the second", None)}
    loose = found(a, b, tolerance=0.3)
    assert "model.norm.weight" not in loose
    assert "lm_head.weight" not in loose
    assert "model.layers.0.input_layernorm.weight" in loose


def test_negative_zero_differs_in_bits_only(tmp_path):
    for name, value in (("p", 0.0), ("n", -0.0)):
        write_hf_checkpoint(tmp_path / name, LLAMA, [("x", torch.tensor([value]))])
    p, n = HfCheckpoint(tmp_path / "p"), HfCheckpoint(tmp_path / "n")
    assert len(list(differences(p.specs, p.load, n.specs, n.load))) == 1
    assert list(differences(p.specs, p.load, n.specs, n.load, tolerance=1e-9)) == []
