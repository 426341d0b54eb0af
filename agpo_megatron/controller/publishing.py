"""Connects the publish protocol (sync/) with this run's trainer commands, pool and layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from agpo_megatron.config.schema import Config, PolicyConfig
from agpo_megatron.controller.trainer_client import TrainerClient
from agpo_megatron.conversion.hf_checkpoint import read_config
from agpo_megatron.conversion.manifest import buckets, publish_manifest
from agpo_megatron.conversion.shape import ModelShape, TensorSpec
from agpo_megatron.rollout.pool import RolloutPool
from agpo_megatron.sync.messages import PublishReport, StageReport
from agpo_megatron.sync.protocol import Publisher
from agpo_megatron.types import WeightVersion

BUCKET_BYTES = 512 * 1024**2
PUBLISH_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
# Server and policy compute the probe in the policy's precision: a wrong weight shows far above these.
PROBE_TOLERANCE = {"fp32": 1e-3, "bf16": 0.5}
PROBE_LENGTH = 32

Plan = Sequence[Sequence[Sequence[TensorSpec]]]


class PublishingTrainer:
    """``sync.messages.TrainerPublishing`` over trainer commands."""

    def __init__(self, trainers: TrainerClient, plan: Plan, timeout: float) -> None:
        self._trainers, self._timeout = trainers, timeout
        self._plan = [[[asdict(spec) for spec in bucket] for bucket in stage] for stage in plan]

    async def publish_open(self, epoch: str, world_size: int) -> Mapping[int, tuple[str, int]]:
        answers = await self._trainers.call("publish_open", epoch=epoch, world_size=world_size)
        return {a["stage"]: (a["host"], a["port"]) for a in answers if a["stage"] is not None}

    async def publish_send(self, version: WeightVersion) -> PublishReport:
        answers = await self._trainers.call(
            "publish_send", plan=self._plan, seconds=self._timeout, step=version.step
        )
        sources = [a for a in answers if a["stage"] is not None]
        stages = {a["stage"]: StageReport(**a["report"]) for a in sources}
        return PublishReport(answers[0]["step"], stages)

    async def score_tokens(self, tokens: list[int]) -> list[float]:
        answers = await self._trainers.call("score", tokens=tokens, temperature=1.0)
        logprobs: list[float] = answers[0]["logprobs"]
        return logprobs[1:]


def stage_layers(layers: int, policy: PolicyConfig) -> list[list[int]]:
    """Global layer numbers of each pipeline stage: even split, interleaved over ``virtual_pipeline`` chunks.

    As megatron-core 0.19.2 places them (transformer_block.get_transformer_layer_offset).
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
    config: Config, pool: RolloutPool, trainers: TrainerClient, backend: str
) -> Publisher:
    """The publisher of one run. ``backend``: that of the trainer's device, gloo or nccl."""
    hf_config = read_config(config.model.path)
    shape = ModelShape.from_hf(hf_config)
    dtype = PUBLISH_DTYPES[config.policy.dtype]
    manifest = publish_manifest(hf_config, stage_layers(shape.layers, config.policy), dtype)
    plan = [buckets(stage, BUCKET_BYTES) for stage in manifest]
    timeout = config.cluster.command_timeout
    return Publisher(
        pool,
        PublishingTrainer(trainers, plan, timeout),
        plan,
        server_ranks=config.rollout.tensor_parallel,
        backend=backend,
        probe_tokens=[(7 * i + config.seed) % shape.vocab_size for i in range(PROBE_LENGTH)],
        probe_tolerance=PROBE_TOLERANCE[config.policy.dtype],
        timeout=timeout,
    )
