"""The part of one rank in publishing: the source of a stage broadcasts to the servers, the others help to gather."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from agpo_megatron.config.schema import Config
from agpo_megatron.conversion.shape import TensorSpec
from agpo_megatron.policy.policy import Policy
from agpo_megatron.sync.messages import group_name
from agpo_megatron.sync.source import WeightSource, bucketed


class PolicyPublisher:
    """Handlers of ``publish_open`` and ``publish_send``; they return the stage number on its source, else None."""

    def __init__(self, policy: Policy, config: Config) -> None:
        self._policy = policy
        self._timeout = config.cluster.command_timeout
        on_gpu = policy.backend.device_type == "cuda"
        device = "cuda" if on_gpu and config.cluster.publish_backend == "auto" else "cpu"
        checks = not on_gpu and config.rollout.tensor_parallel == 1
        self._source = (
            WeightSource(device, server_checksums=checks) if policy.layout.publishes else None
        )

    def open(self, epoch: str, world_size: int) -> dict[str, Any]:
        """Open the update group of this stage; the servers join it at (host, port)."""
        if self._source is None:
            return {"stage": None}
        stage = self._policy.layout.pp_rank
        host = os.environ["AGPO_ADDRESS"]
        port = self._source.open(host, group_name(epoch, stage), world_size, self._timeout)
        return {"stage": stage, "host": host, "port": port}

    def send(
        self,
        plan: list[list[list[dict[str, Any]]]],
        seconds: float,
        step: int,
        excerpts: dict[str, int],
        held: int,
    ) -> dict[str, Any]:
        """Broadcast this stage's buckets within ``seconds``; ``plan[stage][bucket]`` lists the tensors as the servers
        expect them.

        ``step``: the requested weights; ``held``: the policy's current step. Nothing is sent if they differ.
        ``excerpts``: of how many leading rows, by tensor, to report a digest.
        """
        stage = self._policy.layout.pp_rank if self._source else None
        if step != held:
            reason = (
                f"the weights of step {step} were asked for, the trainer holds those of step {held}"
            )
            report = self._source.refuse(reason) if self._source else None
            return {"stage": stage, "step": held, "report": report and asdict(report)}
        tensors = self._policy.named_hf_tensors()
        if self._source is None or stage is None:
            for _ in tensors:
                pass  # take part in the gathers
            return {"stage": None, "step": held}
        specs = [[tensor_spec(entry) for entry in bucket] for bucket in plan[stage]]
        report = self._source.broadcast(bucketed(tensors, specs), seconds, excerpts)
        for _ in tensors:
            pass  # rest of a refused plan: the other ranks take part in its gathers
        return {"stage": stage, "step": held, "report": asdict(report)}


def tensor_spec(entry: dict[str, Any]) -> TensorSpec:
    return TensorSpec(entry["name"], tuple(entry["shape"]), entry["dtype"])
