"""What a rank of a layout writes and reads of a checkpoint."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path
from typing import Any

from agpo_megatron.config.schema import PolicyConfig, TrainConfig
from agpo_megatron.policy import backend


def execute(rank: int, hf_dir: str, policy: PolicyConfig, folder: str) -> dict[str, Any]:
    """Save and load again. ``written``: bytes by file of this rank; ``read``: elements that it asked storage for;
    ``held``: elements of its sharded state."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    backend.activate("cpu")
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

    from agpo_megatron.policy import checkpoint, parallel
    from agpo_megatron.policy.policy import Policy

    read: list[int] = []
    load = TorchDistLoadShardedStrategy.load

    def counted(self: Any, state: Any, *arguments: Any, **more: Any) -> Any:
        tensors = [p for p in nested_values(state) if isinstance(p, ShardedTensor)]
        read.extend(math.prod(t.local_shape) for t in tensors)
        return load(self, state, *arguments, **more)

    try:
        built = Policy.build(hf_dir, policy, TrainConfig(), temperature=1.0, seed=1)
        checkpoint.save(folder, built, 0, {})
        TorchDistLoadShardedStrategy.load = counted
        checkpoint.load(folder, built)
        files = {p.name: p.stat().st_size for p in Path(folder).glob(f"__{rank}_*.distcp")}
        held = sum(p.numel() for chunk in built.chunks for p in chunk.parameters())
        return {"written": files, "read": sum(read), "held": held}
    finally:
        TorchDistLoadShardedStrategy.load = load
        parallel.shutdown()
