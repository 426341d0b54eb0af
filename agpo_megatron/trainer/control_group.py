"""Messages between all trainer ranks over a gloo group: commands from rank 0 out, results back.

gloo also on GPUs: a NCCL broadcast that idles while the rollouts run would hit its time limit.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


class ControlGroup:
    """Messages between all ranks. Collective: every rank must call the same methods in the same order. ``group``: gloo,
    over all ranks."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._group = group

    def broadcast(self, message: dict[str, Any] | None) -> dict[str, Any]:
        """Return rank 0's message on every rank."""
        messages = [message]
        dist.broadcast_object_list(messages, 0, group=self._group)
        assert messages[0] is not None
        return messages[0]

    def gather(self, message: dict[str, Any]) -> list[dict[str, Any]] | None:
        """Return every rank's message, in rank order, on rank 0; None elsewhere."""
        messages: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(message, messages, 0, group=self._group)
        return messages
