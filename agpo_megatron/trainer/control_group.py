"""JSON over a gloo group that spans all trainer ranks: commands from rank 0 out, results back.

gloo also on GPUs: a NCCL broadcast that idles while the rollouts run would hit its time limit.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist


class ControlGroup:
    """Messages between all ranks. Collective: every rank must call the same methods in the same order. ``group``: gloo,
    over all ranks."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._group = group

    def broadcast(self, message: dict[str, Any] | None) -> dict[str, Any]:
        """Return rank 0's message on every rank."""
        data = json.dumps(message).encode() if self.rank == 0 else b""
        size = torch.tensor([len(data)])
        dist.broadcast(size, 0, group=self._group)
        buffer = torch.empty(int(size), dtype=torch.uint8)
        if self.rank == 0:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(buffer, 0, group=self._group)
        result: dict[str, Any] = json.loads(buffer.numpy().tobytes())
        return result

    def gather(self, message: dict[str, Any]) -> list[dict[str, Any]] | None:
        """Return every rank's message, in rank order, on rank 0; None elsewhere."""
        data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([data.numel()]), group=self._group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: data.numel()] = data
        parts = (
            [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world_size)]
            if self.rank == 0
            else None
        )
        dist.gather(padded, parts, 0, group=self._group)
        if parts is None:
            return None
        return [
            json.loads(part[: int(size)].numpy().tobytes())
            for part, size in zip(parts, sizes, strict=True)
        ]
