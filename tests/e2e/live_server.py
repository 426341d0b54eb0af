"""A real SGLang server on CPU with a tiny model, for end-to-end tests."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from agpo_megatron.cluster.processes import Role, free_port, log_tail, start, stop_all
from agpo_megatron.config.schema import Config
from agpo_megatron.rollout.client import ServerClient, ServerError
from agpo_megatron.rollout.server import server_command

START_SECONDS = 600.0


@dataclass(frozen=True)
class LiveServer:
    """``model``: the Hugging Face folder (fp32, tied embeddings, 70 tokens, EOS 2) it was started from."""

    url: str
    model: Path
    process: subprocess.Popen[bytes]
    start_seconds: float


def tiny_llama(seed: int) -> LlamaForCausalLM:
    """fp32; a vocabulary that SGLang must pad; weights large enough for log-probs to differ clearly."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=70,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).float().eval()


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(67))]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def server_config(**rollout: object) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "unused"},
            "data": {"path": "unused"},
            "policy": {"dtype": "fp32"},
            "cluster": {"device": "cpu"},
            "rollout": {"max_in_flight": 16, "max_response_tokens": 64, **rollout},
        }
    )


def run_server(folder: Path) -> Iterator[LiveServer]:
    """A server of ``tiny_llama``."""
    model = folder / "model"
    tiny_llama(seed=1).save_pretrained(model)
    write_tokenizer(model)
    yield from serve(model, folder / "server.log")


def serve(
    model: Path,
    log: Path,
    config: Config | None = None,
    python: str = sys.executable,
    env: Mapping[str, str] | None = None,
) -> Iterator[LiveServer]:
    """Start a server of a Hugging Face folder (by default in fp32 on the CPU), yield once it has generated, end it. It
    ends with this process too."""
    port = free_port()
    launch = server_command(config or server_config(), str(model), port=port, python=python)
    started = time.monotonic()
    role = start(Role("rollout server 0", launch.argv, {**launch.env, **(env or {})}, log))
    url = f"http://127.0.0.1:{port}"
    try:
        asyncio.run(_until_ready(url, role.process, log))
        yield LiveServer(url, model, role.process, time.monotonic() - started)
    finally:
        stop_all([role], grace=0)


async def _until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    async with aiohttp.ClientSession() as session:
        client = ServerClient(url, session)
        while True:
            try:
                return await client.ready(timeout=20)
            except ServerError as error:
                ended = process.poll() is not None
                if ended or time.monotonic() > deadline:
                    raise RuntimeError(f"{error}\n{log_tail(log, 40)}") from error
                await asyncio.sleep(0.25)
