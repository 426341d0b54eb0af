"""Any rank of a world of any size in this one process: torch's fake process group, whose collectives do nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import policy_models  # noqa: F401  (activates the backend before megatron is imported)
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from agpo_megatron.config.schema import PolicyConfig
from agpo_megatron.policy import backend

Members = tuple[int, ...] | None
"""Ranks of a group; None: all."""


@contextmanager
def simulated_rank(
    policy: PolicyConfig, rank: int, groups: list[tuple[str, Members]] | None = None
) -> Iterator[Any]:
    """``parallel.initialize`` of one rank as on NCCL; yields its Layout. ``groups``: takes (backend, ranks) of every
    group that it asks for, in order."""
    from agpo_megatron.policy import parallel

    active = backend.current()

    new_group: Callable[..., Any] = dist.new_group

    def recorded(
        ranks: Any = None, timeout: Any = None, backend: Any = None, **options: Any
    ) -> Any:
        if groups is not None:
            groups.append((backend or "nccl", tuple(ranks) if ranks is not None else None))
        options.pop("pg_options", None)
        return new_group(ranks, backend="fake", **options)

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=policy.world_size)
    dist.new_group = recorded
    try:
        backend._active = replace(active, dist_backend="nccl")
        layout = parallel.initialize(policy, 1)
        backend._active = active
        yield layout
    finally:
        backend._active = active
        dist.new_group = new_group
        parallel.shutdown()
        dist.destroy_process_group()
