"""A run small enough for tests: a 0.1 M-parameter random Llama with a character tokenizer, and sums to ask it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHARACTERS = "0123456789+=#: "
VOCABULARY = {"<pad>": 0, "<s>": 1, "</s>": 2, **{c: i + 3 for i, c in enumerate(CHARACTERS)}}


def write_model(
    folder: Path, seed: int = 0, layers: int = 4, long_answers: bool = False, width: int = 1
) -> None:
    """A Llama checkpoint with 4 heads and 2 KV heads: TP 1 and 2, PP 1, 2 and 4 divide it. Its answers have about 20
    tokens; ``long_answers``: 100 to 200. ``width``: multiplies the hidden size."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64 * width,
        intermediate_size=128 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.1 * width**-0.5,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(torch.float32)
    if long_answers:  # one dimension is the same for all tokens, and the EOS is unlikely by it
        with torch.no_grad():
            model.model.embed_tokens.weight[:, 0] = 0.5
            model.lm_head.weight[VOCABULARY["</s>"], 0] = -1.4
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def write_problems(path: Path, count: int, response: bool = False) -> None:
    """``a+b:`` with single digits; the answer of problem i is its last digit, so random models are sometimes right."""
    rows = []
    for i in range(count):
        a, b = i % 10, i // 10 % 10
        row = {"prompt": f"{a}+{b}:", "answer": str((a + b) % 10)}
        rows.append(row | {"response": f"#### {a + b}"} if response else row)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(folder: Path, long_answers: bool = False, **changes: object) -> Path:
    """Model, data and config of a run of 4 short steps; ``changes``: dotted keys. Returns the config's path."""
    write_model(folder / "model", long_answers=long_answers)
    write_problems(folder / "train.jsonl", 100)
    write_problems(folder / "eval.jsonl", 10)
    write_problems(folder / "sft.jsonl", 100, response=True)
    settings: dict[str, object] = {
        "seed": 1,
        "run.checkpoint_every": 2,
        "model.path": str(folder / "model"),
        "data.path": str(folder / "train.jsonl"),
        "eval.sets": [{"path": str(folder / "eval.jsonl")}],
        "train.steps": 4,
        "train.prompts_per_batch": 4,
        "train.lr": 1.0e-3,
        "train.micro_batch_tokens": 128,
        "rollout.group_size": 4,
        "rollout.max_response_tokens": 12,
        "rollout.max_in_flight": 16,
        "policy.dtype": "fp32",
        "policy.tensor_parallel": 2,
        "cluster.device": "cpu",
        **changes,
    }
    tree: dict[str, dict[str, object]] = {}
    for key, value in settings.items():
        section, _, leaf = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[leaf] = value  # type: ignore[assignment]
    path = folder / "config.yaml"
    path.write_text(json.dumps(tree))  # JSON is YAML
    return path
