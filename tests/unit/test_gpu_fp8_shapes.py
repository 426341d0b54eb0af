"""Every matmul of the three configurations for a GPU has shapes that its FP8 recipe takes, on every rank.

The rules are those of Transformer Engine 2.20.2, written out here from its sources: ``utils.py``
``assert_dim_for_fp8_exec`` (rows % 8, columns % 16, of the activations that a rank holds and of its weights) and
``is_quantizable`` of the two block quantisers, which otherwise exchange activations in bf16, or refuse weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made
import pytest

from agpo_megatron.config import load_config
from agpo_megatron.config.schema import Config, PolicyConfig
from agpo_megatron.conversion.shape import ModelShape
from agpo_megatron.policy.memory import layer_weights
from agpo_megatron.policy.packing import pack, pack_all, pack_multiple, sequence_multiple
from agpo_megatron.samples import TrainSequence

pytestmark = pytest.mark.processes

CONFIGS = Path(__file__).parents[2] / "configs"
LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 131072}
SHAPES: dict[str, dict[str, Any]] = {
    "agpo_8b.yaml": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "agpo_70b.yaml": LLAMA
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "agpo_72b_qwen2.5.yaml": LLAMA
    | {
        "model_type": "qwen2",
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
    },
}
"""``config.json`` of the published checkpoints, as far as shapes go."""
BLOCK = {"tensorwise": 1, "delayed": 1, "blockwise": 128, "mxfp8": 32}


def takes(recipe: str, rows: int, columns: int) -> bool:
    return (
        rows % 8 == 0
        and columns % 16 == 0
        and rows % BLOCK[recipe] == 0
        and columns % BLOCK[recipe] == 0
    )


def sequence(name: str, tokens: int) -> TrainSequence:
    return made.sequence(name, [1] * tokens, 1.0, [0] + [1] * (tokens - 1), 1.0)


def packs(config: Config) -> Iterator[tuple[str, int]]:
    """Token counts of what a rank may be given: full packs, ragged ones, the probe, and a filler."""
    policy, budget = config.policy, config.train.micro_batch_tokens
    work = {
        "longest": [sequence("a", budget)],
        "ragged": [sequence("a", budget // 2 + 3), sequence("b", 17), sequence("c", 2)],
        "probe": [sequence("probe", 32)],
        "filler": [],
    }
    for name, sequences in work.items():
        batch = pack(sequences, pack_multiple(policy), each=sequence_multiple(policy))
        yield name, len(batch.tokens)
    every = pack_all([work["probe"]], pack_multiple(policy), 2, same_length=False)
    yield "filler beside the probe", len(every[1].tokens)


@pytest.mark.parametrize("name", SHAPES)
def test_rows_of_every_pack(name: str) -> None:
    config = load_config(CONFIGS / name)
    policy = config.policy
    assert policy.fp8.recipe != "none", "the test is of FP8 configurations"
    for what, tokens in packs(config):
        share = tokens // policy.context_parallel
        local = share // policy.tensor_parallel if policy.sequence_parallel else share
        assert tokens % (policy.context_parallel * policy.tensor_parallel) == 0
        for rows in (share, local):
            assert takes(policy.fp8.recipe, rows, 128), f"{what}: {rows} rows on a rank"


@pytest.mark.parametrize("name", SHAPES)
def test_weights_of_every_layer(name: str) -> None:
    policy = load_config(CONFIGS / name).policy
    weights = layer_weights(ModelShape.from_hf(SHAPES[name]), policy)
    assert set(weights) == {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
    for what, (rows, columns) in weights.items():
        assert takes(policy.fp8.recipe, rows, columns), f"{what} is {rows} x {columns} on a rank"


@pytest.mark.parametrize("name", SHAPES)
def test_the_budget_is_a_whole_pack(name: str) -> None:
    """A micro-batch of just the budget is not padded beyond it, which the memory figures rest on."""
    config = load_config(CONFIGS / name)
    assert config.train.micro_batch_tokens % pack_multiple(config.policy) == 0


def test_the_72b_model_does_not_take_blocks() -> None:
    """Why its recipe is another one."""
    policy = load_config(CONFIGS / "agpo_72b_qwen2.5.yaml").policy
    rows, columns = layer_weights(ModelShape.from_hf(SHAPES["agpo_72b_qwen2.5.yaml"]), policy)[
        "linear_fc2"
    ]
    assert not takes("blockwise", rows, columns)


def test_a_local_shard_that_only_its_sum_rescues() -> None:
    """What the former rule, CP x lcm(TP, 16), allowed: 16 tokens on 8 ranks are 2 rows each."""
    policy = PolicyConfig.model_validate(
        {"tensor_parallel": 8, "sequence_parallel": True, "fp8": {"recipe": "tensorwise"}}
    )
    assert takes("tensorwise", 16, 16) and not takes("tensorwise", 16 // 8, 16)
    assert pack_multiple(policy) // 8 >= 8
