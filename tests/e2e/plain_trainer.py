"""A trainer of one process and two pipeline "stages" in plain torch, to publish from without Megatron."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from agpo_megatron.conversion.manifest import buckets, publish_manifest
from agpo_megatron.conversion.shape import TensorSpec
from agpo_megatron.samples import WeightVersion
from agpo_megatron.sync.messages import PublishReport, StageReport, group_name
from agpo_megatron.sync.source import WeightSource, bucketed

BUCKET_BYTES = 100_000


class PlainTrainer:
    """Implements ``TrainerPublishing``; its every wait has a deadline, which the publisher must have set.

    ``spoil``: (name, index) of an element that is flipped on the wire. ``stale``: the wire carries what it carried
    before, as if the servers ignored the update. ``hashes``: reproduce those of the servers.
    """

    def __init__(self, model: LlamaForCausalLM, step: int, hashes: bool = True) -> None:
        self.model, self.step, self.hashes = model, step, hashes
        self.spoil: tuple[str, int] | None = None
        self.stale = False
        self.opened: list[str] = []
        config = model.config.to_dict()
        half = config["num_hidden_layers"] // 2
        layers = [range(half), range(half, config["num_hidden_layers"])]
        manifest = publish_manifest(config, layers, "float32")
        self.plan: list[list[list[TensorSpec]]] = [buckets(s, BUCKET_BYTES) for s in manifest]
        self._sources = [SpoilingSource(self) for _ in self.plan]

    async def publish_open(
        self, epoch: str, world_size: int, seconds: float
    ) -> Mapping[int, tuple[str, int]]:
        assert seconds > 0
        self.opened.append(epoch)
        return {
            i: ("127.0.0.1", source.open("127.0.0.1", group_name(epoch, i), world_size, seconds))
            for i, source in enumerate(self._sources)
        }

    async def publish_send(
        self, version: WeightVersion, seconds: float, excerpts: Mapping[str, int]
    ) -> PublishReport:
        assert seconds > 0
        if version.step != self.step:
            refused = [source.refuse(f"holds step {self.step}") for source in self._sources]
            return PublishReport(self.step, dict(enumerate(refused)))
        sends = [asyncio.to_thread(self._send, i, seconds, excerpts) for i in range(len(self.plan))]
        reports = await asyncio.gather(*sends)
        return PublishReport(self.step, dict(enumerate(reports)))

    def _send(self, stage: int, seconds: float, excerpts: Mapping[str, int]) -> StageReport:
        tensors = self.model.state_dict()
        named = [(s.name, tensors[s.name]) for bucket in self.plan[stage] for s in bucket]
        buckets = bucketed(named, self.plan[stage])
        return self._sources[stage].broadcast(buckets, seconds, excerpts)

    async def score_tokens(self, tokens: list[int], seconds: float) -> tuple[int, list[float]]:
        assert seconds > 0
        return self.step, logprobs(self.model, tokens)

    def close(self) -> None:
        for source in self._sources:
            source.close()


class SpoilingSource(WeightSource):
    """A source whose wire may carry something else than the checksums are taken of."""

    def __init__(self, trainer: PlainTrainer) -> None:
        super().__init__("cpu", server_checksums=trainer.hashes)
        self._trainer = trainer
        self.sent: dict[int, Tensor] = {}  # by the bucket's number

    def _joined_group(self, seconds: float) -> Any:
        return Wire(super()._joined_group(seconds), self, lambda: self._trainer.stale)

    def flatten(self, bucket: list[tuple[str, Tensor]]) -> Tensor:
        flat = super().flatten(bucket)
        start = 0
        for name, tensor in bucket:
            if self._trainer.spoil and self._trainer.spoil[0] == name:
                flat[start + 4 * self._trainer.spoil[1]] ^= 1
            start += tensor.nbytes
        return flat


class Wire:
    """A group that may carry what it carried the last time, whatever it is given."""

    def __init__(self, group: Any, source: SpoilingSource, stale: Callable[[], bool]) -> None:
        self._group, self._sent, self._stale, self._number = group, source.sent, stale, 0

    def broadcast(self, tensors: list[Tensor], options: Any) -> Any:
        if self._stale():
            tensors = [self._sent[self._number]]
        self._sent[self._number] = tensors[0]
        self._number += 1
        return self._group.broadcast(tensors, options)


@torch.no_grad()
def logprobs(model: LlamaForCausalLM, tokens: list[int], temperature: float = 1.0) -> list[float]:
    """transformers' log-probs of ``tokens[1:]``."""
    logits = model(torch.tensor([tokens])).logits[0, :-1].float() / temperature
    found = logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])
    return found[:, 0].tolist()


def changed(model: LlamaForCausalLM, seed: int) -> None:
    """Scale every weight, norms included, by noise that changes log-probs by tenths. (The padding token's zeros stay:
    noise there, normalised, would change them by nats.)"""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.03 * torch.randn(p.shape, generator=generator))
