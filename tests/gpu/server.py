"""A stock SGLang server on one GPU, started as the cluster room starts it, for the stages that need one."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).parents[1]))


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
                "mem_fraction": 0.8 if gpus > 1 else 0.3,
            },
        }
    )


@contextmanager
def server(config: Any, gpu: int, log: Path) -> Iterator[tuple[str, float]]:
    """URL, and seconds until it had generated."""
    from agpo_megatron.cluster.environments import gpu_variables, interpreter
    from agpo_megatron.cluster.processes import free_port
    from agpo_megatron.rollout.server import server_command

    port = free_port()
    launch = server_command(config, config.model.path, port=port, python=interpreter("rollout"))
    env = {**os.environ, **launch.env, **gpu_variables("rollout"), "CUDA_VISIBLE_DEVICES": str(gpu)}
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            launch.argv, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        asyncio.run(until_ready(url, process, log))
        yield url, time.monotonic() - began
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    from agpo_megatron.cluster.processes import log_tail
    from agpo_megatron.rollout.client import ServerClient, ServerError

    async with aiohttp.ClientSession() as session:
        client = ServerClient(url, session)
        while True:
            try:
                return await client.ready(timeout=60)
            except ServerError as error:
                if process.poll() is not None:
                    raise RuntimeError(f"the server ended: {log_tail(log, 30)}") from error
                await asyncio.sleep(1)
