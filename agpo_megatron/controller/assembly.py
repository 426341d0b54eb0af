"""Assembly of one run: the parts that each mode needs, and the order in which they start and stop."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from rich.console import Console

from agpo_megatron.cluster.start_folder import StartFolder
from agpo_megatron.config.loading import leaves
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.config.schema import Config
from agpo_megatron.config.task import SourceConfig, TrainSourceConfig
from agpo_megatron.controller.evaluation import EvalSet, Rollouts, measure, rescore
from agpo_megatron.controller.guard_dump import dumped_step
from agpo_megatron.controller.live import live, live_recipe
from agpo_megatron.controller.loop import train
from agpo_megatron.controller.run import Recipe, Run, StoppedOnRequest
from agpo_megatron.controller.sources import recorded, supervised_recipe, worked_examples
from agpo_megatron.controller.status import StatusWriter
from agpo_megatron.controller.trainer_client import TrainerClient
from agpo_megatron.controller.vitals import Vitals
from agpo_megatron.conversion.hf_checkpoint import read_config
from agpo_megatron.conversion.shape import ModelShape
from agpo_megatron.data.problems import Duplicates, ProblemSet, load_problems, pass_rates
from agpo_megatron.data.sft_examples import load_sft_examples
from agpo_megatron.data.stream import PromptStream
from agpo_megatron.data.tokenizer import load_tokenizer
from agpo_megatron.files import write_durably
from agpo_megatron.journal import Journal, JournalReader
from agpo_megatron.observe.curves import draw_curves
from agpo_megatron.observe.exporter import Exporter, served
from agpo_megatron.observe.metrics import MetricsWriter, read_metrics
from agpo_megatron.observe.progress import Progress
from agpo_megatron.observe.summary import read_summary, summary_path
from agpo_megatron.observe.writers import Row, StepWriter, open_writers
from agpo_megatron.reward.rewards import Rewards, reference_check
from agpo_megatron.rollout.client import ServerClient, server_connector
from agpo_megatron.rollout.pool import RolloutPool
from agpo_megatron.rollout.server import device_of, sampling_seed
from agpo_megatron.samples import Ints

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartContext:
    """The supervisor's settings for this start. ``url``: the controller's address. ``signal_lead``: seconds between
    Slurm's signal and the time limit, if there is one."""

    url: str
    token: str
    servers: list[str]
    start: StartFolder
    signal_lead: float | None = None


async def execute(
    mode: str, config: Config, folder: RunFolder, context: StartContext, replayed: Path | None
) -> None:
    """Run ``mode`` to its end. Closes every part, then raises the error that ended it early, if any."""
    if mode == "eval":
        async with rollouts_of(config, context, False, None) as rollouts:
            rollouts.pool.serve_as_started()
            scores = await measure(rollouts, folder, 0)
        Console().print(scores)
        return
    sft = config.sft if mode == "sft" else None
    recipe = supervised_recipe(sft) if sft else live_recipe(config)
    other = JournalReader(RunFolder(replayed).journal) if replayed else None
    async with run_of(mode, config, folder, context, recipe) as (run, status):
        dumped = dumped_step(replayed) if replayed else None
        saved = RunFolder(replayed).complete_checkpoints() if replayed and dumped else []
        await run.load(other, saved[-1] if saved else (0, None))
        if other:
            await train(run, recorded(run, other, last=dumped or recipe.steps))
        elif sft:
            examples = await asyncio.to_thread(
                load_sft_examples, sft.path, config.data, load_tokenizer(sft.base)
            )
            done = recorded(run, run.journal.reader)
            await train(run, done, worked_examples(run, examples, sft))
        else:
            async with rollouts_of(config, context, True, status) as rollouts:
                await train(run, recorded(run, run.journal.reader), live(run, rollouts))
        steps = run.version.step
        await run.export(Path(config.model.path) if sft else folder.exported_model)
        await run.trainers.call("stop")
    summary = read_summary(folder.path) if summary_path(folder.path).exists() else None
    draw_curves(
        read_metrics(folder.path),
        folder.curves,
        title=f"{folder.path.name}: {title_of(mode, config)}",
        summary=summary,
    )
    write_durably(folder.done, json.dumps({"mode": mode, "steps": steps}).encode())


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
    base = config.sft.base if mode == "sft" and config.sft else config.model.path
    shape = ModelShape.from_hf(read_config(base))
    vitals = Vitals(context.start, trainers)
    updates = 1 if mode == "sft" else config.train.updates_per_batch
    try:
        async with metrics_of(config, folder, vitals) as metrics:
            with Progress(recipe.steps, title_of(mode, config), updates=updates) as progress:
                run = Run(
                    config, folder, journal, trainers, metrics, progress, recipe, shape.hidden
                )
                run.vitals, run.shape = vitals, shape
                run.stop_requested = context.start.stop_requested.exists
                run.signal_lead = context.signal_lead
                async with StatusWriter(context.start, trainers) as status:
                    try:
                        yield run, status
                    except StoppedOnRequest:
                        await trainers.call("stop")
                        raise
    finally:
        await trainers.close()


@asynccontextmanager
async def metrics_of(
    config: Config, folder: RunFolder, vitals: Vitals
) -> AsyncIterator[MetricsWriter]:
    """Open metrics.jsonl and what ``observe`` asks for beside it. Raises ExporterError for a port that is taken."""
    observe = config.observe
    exporter: Exporter | None = None

    def open_others(recorded: Sequence[Row]) -> list[StepWriter]:
        nonlocal exporter
        exporter = Exporter(vitals.readings, recorded)
        others = [name for name in observe.writers if name != "tensorboard"]
        return [exporter, *open_writers(others, folder.path, leaves(config), recorded)]

    metrics = MetricsWriter(folder.path, "tensorboard" in observe.writers, open_others)
    try:
        async with AsyncExitStack() as stack:
            if observe.prometheus_port and exporter:
                await stack.enter_async_context(served(exporter, observe.prometheus_port))
            yield metrics
    finally:
        await asyncio.to_thread(metrics.close)


@asynccontextmanager
async def rollouts_of(
    config: Config, context: StartContext, training: bool, status: StatusWriter | None
) -> AsyncIterator[Rollouts]:
    """Provide pool, rewards and prompts (training prompts only if ``training``), once every server has generated."""
    tokenizer = load_tokenizer(config.model.path)
    sources = config.data.each() if training else []
    problems = await asyncio.to_thread(training_problems, config, sources, tokenizer)
    sets = await asyncio.to_thread(eval_sets, config, len(sources), tokenizer)

    def decode(tokens: Ints, special: bool) -> str:
        return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=not special))

    async with aiohttp.ClientSession(connector=server_connector()) as session:
        clients = [
            ServerClient(url, session, config.rollout.request_timeout) for url in context.servers
        ]
        async with (
            RolloutPool(clients, config.rollout, decode, sampling_seed(config)) as pool,
            Rewards(config.reward, [*sources, *config.eval.sets]) as rewards,
        ):
            if status:
                status.pool = pool
            if device_of(config) == "cuda":
                # NCCL holds the survivors of a broken broadcast for ever, where gloo's closed connections free them.
                start = context.start
                pool.end_hung = lambda number: start.report_hung(f"rollout server {number}")
            # A controller that replaces another must not wait for servers lost in the meantime.
            await pool.wait_alive(1 if context.start.serving.exists() else None)
            context.start.serving.touch()
            yield Rollouts(
                pool,
                rewards,
                PromptStream(problems, config.seed, [source.weight for source in sources]),
                sets,
            )


def training_problems(
    config: Config, sources: Sequence[TrainSourceConfig], tokenizer: Any
) -> list[ProblemSet]:
    """The problems of every source. Raises DataError."""
    rates = pass_rates(config.data.difficulty) if config.data.difficulty and sources else None
    seen = Duplicates()
    found = [
        load_problems(source, config.data, tokenizer, seen, rates, check_of(config, source))
        for source in sources
    ]
    if text := seen.report():
        log.warning("data: %s", text)
    return found


def check_of(config: Config, source: SourceConfig) -> Callable[[Mapping[str, Any], str], None]:
    return reference_check(config.reward.function if source.reward is None else source.reward)


def eval_sets(config: Config, first: int, tokenizer: Any) -> list[EvalSet]:
    """The sets of ``config.eval``, whose rewards come behind ``first`` others. Raises DataError."""
    limit = config.rollout.max_response_tokens
    return [
        EvalSet(
            config=each,
            problems=load_problems(each, config.data, tokenizer, check=check_of(config, each)),
            source=first + number,
            max_tokens=each.max_response_tokens or limit,
        )
        for number, each in enumerate(config.eval.sets)
    ]


async def rescore_evaluations(config: Config, folder: RunFolder) -> None:
    """Score the stored samples of ``folder`` again and show what comes out. Raises DataError, RewardError."""
    sets = eval_sets(config, 0, load_tokenizer(config.model.path))
    async with Rewards(config.reward, config.eval.sets) as rewards:
        Console().print(await rescore(folder, sets, rewards))
