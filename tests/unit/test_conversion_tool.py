"""tools/convert_hf_checkpoint.py as a user runs it: exit codes, messages, and the way through Megatron and back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from conversion_models import LLAMA, QWEN2, random_weights

from agpo_megatron.conversion.hf_checkpoint import HfCheckpoint
from agpo_megatron.conversion.hf_writer import write_hf_checkpoint

REPO = Path(__file__).parents[2]
TOOL = REPO / "tools" / "convert_hf_checkpoint.py"

# One process for a chain of commands: importing torch and Megatron is most of the time.
CHAIN = """
import json, pathlib, runpy, sys

def damage(folder):
    path = next(pathlib.Path(folder).glob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)

main = runpy.run_path(sys.argv[1])["main"]
codes = [damage(c[1]) if c[0] == "damage" else main(c) for c in json.loads(sys.argv[2])]
print("codes", json.dumps(codes))
"""


def chain(*commands, folder):
    texts = [[str(word) for word in command] for command in commands]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHAIN, str(TOOL), json.dumps(texts)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.rsplit("codes", 1)[1])
    return codes, done.stdout, done.stderr


def test_hf_to_megatron_to_hf_is_exact(tmp_path):
    untied = random_weights(QWEN2, torch.bfloat16)
    write_hf_checkpoint(tmp_path / "q", QWEN2, untied.items())
    (tmp_path / "q" / "tokenizer.json").write_text("{}")
    config = {**LLAMA, "tie_word_embeddings": True}
    tied = random_weights(config, torch.float32)
    write_hf_checkpoint(tmp_path / "t", config, tied.items())
    codes, out, err = chain(
        ["to-megatron", "q", "q-mcore"],
        ["verify", "q", "q-mcore"],
        ["to-hf", "q-mcore", "q-back", "--max-shard-size", "20KB"],
        ["to-megatron", "t", "t-mcore"],
        ["to-hf", "t-mcore", "t-back"],
        ["verify", "t-mcore", "t-back"],
        ["verify", "q-mcore", "t-mcore"],
        ["to-hf", "q-mcore", "x", "--like", "t"],
        ["to-megatron", "t", "t-mcore"],
        ["to-hf", "q", "x"],
        ["damage", "t-mcore"],
        ["to-hf", "t-mcore", "x"],
        folder=tmp_path,
    )
    assert codes == [0, 0, 0, 0, 0, 0, 1, 2, 2, 2, None, 2], err
    assert out.count("equal") == 2
    assert "self_attn.q_proj.bias: only in the first" in out
    assert "linear_qkv.bias, output_layer.weight, which the model at hand has no place for" in err
    assert "t-mcore exists already" in err
    assert "give --like HF_DIR" in err
    assert "t-mcore is damaged" in err
    for name, tensors in (("q-back", untied), ("t-back", tied)):
        back = HfCheckpoint(tmp_path / name)
        assert set(back.specs) == set(tensors)
        for key, tensor in tensors.items():
            assert torch.equal(back.load(key), tensor), key
    assert (tmp_path / "q-back" / "tokenizer.json").read_text() == "{}"
    assert len(list((tmp_path / "q-back").glob("model-*.safetensors"))) > 1
    found = {p.name for p in tmp_path.iterdir()}
    assert found == {"q", "q-mcore", "q-back", "t", "t-mcore", "t-back"}


def test_verify_says_what_differs_and_sets_the_exit_code(tmp_path):
    tensors = random_weights(LLAMA)
    write_hf_checkpoint(tmp_path / "a", LLAMA, tensors.items())
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 0.5
    write_hf_checkpoint(tmp_path / "b", LLAMA, tensors.items())
    codes, out, err = chain(
        ["verify", "a", "a"],
        ["verify", "a", "b"],
        ["verify", "a", "b", "--tolerance", "0.6"],
        ["verify", "a", "nowhere"],
        ["from-gguf", "nowhere.gguf", "out"],
        folder=tmp_path,
    )
    assert codes == [0, 1, 0, 2, 2]
    assert "model.norm.weight: values, max 0.5\n1 tensors differ\n" in out
    assert "error: checkpoint folder nowhere does not exist" in err
    assert "error: GGUF file nowhere.gguf does not exist" in err
