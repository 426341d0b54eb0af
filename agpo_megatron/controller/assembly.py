"""Puts one run together: which parts each mode needs, in which order they start and stop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from rich.console import Console

from agpo_megatron.cluster.start_folder import StartFolder
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.config.schema import Config
from agpo_megatron.controller.evaluation import Rollouts, measure
from agpo_megatron.controller.live import live, live_recipe
from agpo_megatron.controller.loop import train
from agpo_megatron.controller.run import Recipe, Run, StoppedOnRequest
from agpo_megatron.controller.sources import recorded, supervised_recipe, worked_examples
from agpo_megatron.controller.status import StatusWriter
from agpo_megatron.controller.trainer_client import TrainerClient
from agpo_megatron.conversion.hf_checkpoint import read_config
from agpo_megatron.data.problems import DataError, Problem, load_problems
from agpo_megatron.data.sft_examples import load_sft_examples
from agpo_megatron.data.stream import PromptStream, prompts_in_order
from agpo_megatron.data.tokenizer import load_tokenizer
from agpo_megatron.files import write_durably
from agpo_megatron.journal import Journal, JournalReader
from agpo_megatron.observe.curves import draw_curves
from agpo_megatron.observe.metrics import MetricsWriter, read_metrics
from agpo_megatron.observe.progress import Progress
from agpo_megatron.observe.summary import read_summary, summary_path
from agpo_megatron.reward.numeric import reference
from agpo_megatron.reward.workers import RewardPool
from agpo_megatron.rollout.client import ServerClient, server_connector
from agpo_megatron.rollout.pool import RolloutPool
from agpo_megatron.samples import Ints


@dataclass(frozen=True)
class StartContext:
    """What the supervisor tells the controller about this start. ``url``: where it listens. ``signal_lead``: seconds
    between Slurm's signal and the time limit, if there is one."""

    url: str
    token: str
    servers: list[str]
    start: StartFolder
    signal_lead: float | None = None


async def execute(
    mode: str, config: Config, folder: RunFolder, context: StartContext, replayed: Path | None
) -> None:
    """Run ``mode`` to its end. Raises what ended it early, after every part has been closed."""
    if mode == "eval":
        async with rollouts_of(config, context, False, None) as rollouts:
            rollouts.pool.serve_as_started()
            evaluation = await measure(rollouts)
        evaluation.write(folder.evaluation(0))
        Console().print(evaluation.scores)
        return
    sft = config.sft if mode == "sft" else None
    recipe = supervised_recipe(sft) if sft else live_recipe(config)
    other = JournalReader(RunFolder(replayed).journal) if replayed else None
    async with run_of(mode, config, folder, context, recipe) as (run, status):
        await run.load(other)
        if other:
            await train(run, recorded(run, other, last=recipe.steps))
        elif sft:
            examples = await asyncio.to_thread(
                load_sft_examples, sft.path, config.data, load_tokenizer(sft.base)
            )
            done = recorded(run, run.journal.reader)
            await train(run, done, worked_examples(run, examples, sft))
        else:
            async with rollouts_of(config, context, True, status) as rollouts:
                await train(run, recorded(run, run.journal.reader), live(run, rollouts))
        await run.export(Path(config.model.path) if sft else folder.exported_model)
        await run.trainers.call("stop")
    summary = read_summary(folder.path) if summary_path(folder.path).exists() else None
    draw_curves(
        read_metrics(folder.path),
        folder.curves,
        title=f"{folder.path.name}: {title_of(mode, config)}",
        summary=summary,
    )
    write_durably(folder.done, json.dumps({"mode": mode, "steps": recipe.steps}).encode())


def title_of(mode: str, config: Config) -> str:
    return {"sft": "cold start", "replay": "replay"}.get(mode, config.algorithm.preset)


@asynccontextmanager
async def run_of(
    mode: str,
    config: Config,
    folder: RunFolder,
    context: StartContext,
    recipe: Recipe,
) -> AsyncIterator[tuple[Run, StatusWriter]]:
    journal = await asyncio.to_thread(Journal, folder.journal)
    trainers = TrainerClient(
        config.policy.world_size,
        context.token,
        journal.attempt,
        config.cluster.heartbeat_timeout,
        config.cluster.command_timeout,
    )
    address = urlsplit(context.url)
    await trainers.start(address.hostname or "127.0.0.1", address.port or 0)
    metrics = MetricsWriter(folder.path)
    base = config.sft.base if mode == "sft" and config.sft else config.model.path
    hidden = int(read_config(base)["hidden_size"])
    try:
        with Progress(recipe.steps, title_of(mode, config)) as progress:
            run = Run(config, folder, journal, trainers, metrics, progress, recipe, hidden)
            run.stop_requested = context.start.stop_requested.exists
            run.signal_lead = context.signal_lead
            async with StatusWriter(context.start, trainers) as status:
                try:
                    yield run, status
                except StoppedOnRequest:
                    await trainers.call("stop")
                    raise
    finally:
        metrics.close()
        await trainers.close()


@asynccontextmanager
async def rollouts_of(
    config: Config, context: StartContext, training: bool, status: StatusWriter | None
) -> AsyncIterator[Rollouts]:
    """Pool, rewards and prompts (none to train on unless ``training``); every server has generated once."""
    tokenizer = load_tokenizer(config.model.path)
    problems = await asyncio.to_thread(
        problems_in, config.data.path if training else "", config, tokenizer
    )
    held_out = await asyncio.to_thread(problems_in, config.eval.path, config, tokenizer)

    def decode(tokens: Ints) -> str:
        return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=True))

    async with aiohttp.ClientSession(connector=server_connector()) as session:
        clients = [
            ServerClient(url, session, config.rollout.request_timeout) for url in context.servers
        ]
        async with (
            RolloutPool(clients, config.rollout, decode) as pool,
            RewardPool(config.reward) as rewards,
        ):
            if status:
                status.pool = pool
            # A controller that replaces another must not wait for servers that have been lost since.
            await pool.wait_alive(1 if context.start.serving.exists() else None)
            context.start.serving.touch()
            yield Rollouts(
                pool,
                rewards,
                PromptStream(problems, config.seed),
                prompts_in_order(held_out[: config.eval.max_prompts]),
            )


def problems_in(path: str, config: Config, tokenizer: Any) -> list[Problem]:
    """Problems of a file ("" has none). Raises DataError also for an answer that the verifier could never confirm."""
    problems = load_problems(path, config.data, tokenizer) if path else []
    for number, problem in enumerate(problems, start=1):
        try:
            reference(problem.answer)
        except ValueError as error:
            raise DataError(f"{path}, problem {number}: {error}") from error
    return problems
