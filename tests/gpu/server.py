"""A stock SGLang server on one GPU, started as the cluster room starts it, for the stages that need one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "e2e")]


def write_model(folder: Path) -> None:
    """A random Llama that SGLang's GPU kernels take (head_dim 64), with the character tokenizer of the tests."""
    import tiny_run
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny_run.write_model(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_run.VOCABULARY),
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def settings(model: Path, gpus: int, device: str = "cuda") -> Any:
    """The configuration of one trainer rank and one server, on two GPUs or sharing one."""
    from agpo_megatron.config.schema import Config

    return Config.model_validate(
        {
            "model": {"path": str(model)},
            "data": {"path": "unused"},
            "policy": {"dtype": "bf16"},
            "cluster": {"device": device, "publish_backend": "auto" if gpus > 1 else "gloo"},
            "rollout": {
                "group_size": 4,
                "max_in_flight": 16,
                "max_response_tokens": 64,
                "server_args": {"mem_fraction_static": 0.8 if gpus > 1 else 0.3},
            },
        }
    )


@contextmanager
def server(config: Any, gpu: int, log: Path) -> Iterator[Any]:
    """A ``LiveServer`` on the GPU of that number among those that this process may use."""
    from live_server import serve

    from agpo_megatron.cluster.environments import gpu_variables, interpreter

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = visible.split(",")[gpu] if visible else str(gpu)
    env = {**gpu_variables("rollout"), "CUDA_VISIBLE_DEVICES": chosen}
    yield from serve(Path(config.model.path), log, config, interpreter("rollout"), env)
