"""Connection of the publish protocol (sync/) with this run's trainer commands, pool and layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice

from agpo_megatron.config.schema import Config, PolicyConfig
from agpo_megatron.controller.trainer_client import TrainerClient
from agpo_megatron.conversion.hf_checkpoint import read_config
from agpo_megatron.conversion.manifest import buckets, publish_manifest
from agpo_megatron.conversion.shape import ModelShape, TensorSpec
from agpo_megatron.rollout.excerpts import readable_rows
from agpo_megatron.rollout.pool import RolloutPool
from agpo_megatron.rollout.server import server_dtype
from agpo_megatron.samples import Prompt, WeightVersion
from agpo_megatron.sync.messages import PublishReport, StageReport
from agpo_megatron.sync.protocol import Publisher

BUCKET_BYTES = 512 * 1024**2
# Allowed difference of log-probs by precision (the coarser of server and policy); a wrong weight exceeds it by far.
# bf16: differences of 0.5 nats occur at single tokens of SmolLM2's own samples.
PROBE_TOLERANCE = {"float32": 1e-3, "fp32": 1e-3, "bfloat16": 2.0, "bf16": 2.0}
PROBE_LENGTH = 32
COMMAND_MARGIN = 30.0
"""Seconds after its deadline until a trainer command counts as lost, which ends the run: a failed broadcast still takes
part in the gathers of the other ranks."""

BucketPlan = Sequence[Sequence[Sequence[TensorSpec]]]


class PublishingTrainer:
    """``sync.messages.TrainerPublishing`` over trainer commands."""

    def __init__(self, trainers: TrainerClient, plan: BucketPlan) -> None:
        self._trainers = trainers
        self._plan = [[[asdict(spec) for spec in bucket] for bucket in stage] for stage in plan]

    async def publish_open(
        self, epoch: str, world_size: int, seconds: float
    ) -> Mapping[int, tuple[str, int]]:
        answers = await self._trainers.call(
            "publish_open", timeout=seconds + COMMAND_MARGIN, epoch=epoch, world_size=world_size
        )
        return {a["stage"]: (a["host"], a["port"]) for a in answers if a["stage"] is not None}

    async def publish_send(
        self, version: WeightVersion, seconds: float, excerpts: Mapping[str, int]
    ) -> PublishReport:
        answers = await self._trainers.call(
            "publish_send",
            timeout=seconds + COMMAND_MARGIN,
            plan=self._plan,
            seconds=seconds,
            step=version.step,
            excerpts=dict(excerpts),
        )
        sources = [a for a in answers if a["stage"] is not None]
        stages = {a["stage"]: StageReport(**a["report"]) for a in sources}
        return PublishReport(answers[0]["step"], stages)

    async def score_tokens(self, tokens: list[int], seconds: float) -> tuple[int, list[float]]:
        answers = await self._trainers.call(
            "score", timeout=seconds + COMMAND_MARGIN, tokens=tokens, temperature=1.0
        )
        return answers[0]["step"], answers[0]["logprobs"][1:]


def probe_tokens(prompts: Iterable[Prompt]) -> list[int]:
    """Return the first ``PROBE_LENGTH`` tokens of the concatenated prompts, fixed for the run.

    They are text of the task, not random ids: in bf16, rounding alone changes log-probs of absurd tokens by nats.
    """
    tokens = (int(token) for prompt in prompts for token in prompt.tokens)
    return list(islice(tokens, PROBE_LENGTH))


def probe_tolerance(config: Config) -> float:
    """Return the allowed difference between server and policy in the probe's log-probs."""
    return max(PROBE_TOLERANCE[server_dtype(config)], PROBE_TOLERANCE[config.policy.dtype])


def stage_layers(layers: int, policy: PolicyConfig) -> list[list[int]]:
    """Return the global layer numbers of each pipeline stage: an even split, interleaved over virtual chunks.

    This is the placement of megatron-core 0.19.2 (transformer_block.get_transformer_layer_offset).
    """
    stages, chunks = policy.pipeline_parallel, policy.virtual_pipeline
    per_chunk = layers // (stages * chunks)
    return [
        [
            (chunk * stages + stage) * per_chunk + i
            for chunk in range(chunks)
            for i in range(per_chunk)
        ]
        for stage in range(stages)
    ]


def make_publisher(
    config: Config,
    pool: RolloutPool,
    trainers: TrainerClient,
    backend: str,
    prompts: Iterable[Prompt],
) -> Publisher:
    """Build the publisher of a run. ``backend``: gloo or nccl, by the trainer's device. ``prompts``: for the probe."""
    hf_config = read_config(config.model.path)
    shape = ModelShape.from_hf(hf_config)
    layers = stage_layers(shape.layers, config.policy)
    # A server copies what it receives into its own tensors: only in its precision do all ends hash the same bytes.
    manifest = publish_manifest(hf_config, layers, server_dtype(config))
    plan = [buckets(stage, BUCKET_BYTES) for stage in manifest]
    ranks = config.rollout.tensor_parallel
    shapes = {spec.name: spec.shape for stage in manifest for spec in stage}
    hashes_known = backend == "gloo" and ranks == 1  # trainer/publishing.py reports them
    return Publisher(
        pool,
        PublishingTrainer(trainers, plan),
        plan,
        server_ranks=ranks,
        backend=backend if config.cluster.publish_backend == "auto" else "gloo",
        probe_tokens=probe_tokens(prompts),
        probe_tolerance=probe_tolerance(config),
        timeout=config.cluster.command_timeout,
        keep_running=config.rollout.kv_on_publish == "keep",
        readable={} if hashes_known else readable_rows(hf_config, shapes, ranks),
    )
