"""All Megatron checkpoint I/O: model, optimizer and random state, saved in one parallel layout, loaded in any other.

A checkpoint is a folder that appears complete or not at all: written beside its place under a temporary name, every
file digested and synced, a marker with the list of files last, then renamed. Without a marker that matches the files
it is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from agpo_megatron.policy import backend
from agpo_megatron.policy.marker import CheckpointError
from agpo_megatron.policy.model import unwrap
from agpo_megatron.policy.optimizer import begin_state, ungathered
from agpo_megatron.policy.parallel import Layout
from agpo_megatron.policy.policy import Policy
from agpo_megatron.policy.saving import PendingSave
from agpo_megatron.policy.stored import MODEL_KEYS
from agpo_megatron.policy.together import checked_marker, together

SHARDING = "fully_reshardable"
"""Megatron's format of optimizer state in terms of whole parameters."""


EXTRA_STATE = "_extra_state"
"""State that Transformer Engine's layers keep beside their weights: the history of the ``delayed`` FP8 recipe, and
nothing with the others. It is left out, so that checkpoints do not depend on whose layers wrote them; that history
begins anew after a resume."""


FINISH_SECONDS = 1800.0
"""Seconds for the files of a save to be written, where the caller sets none."""


def save(folder: str | os.PathLike[str], policy: Policy, step: int, extra: dict[str, Any]) -> None:
    """Write a checkpoint of ``policy`` after optimizer step ``step``. Every rank calls it; all return together.

    ``extra``: JSON values to keep with it. An undamaged checkpoint of the same step already there stays as it is: it is
    never replaced, so that no kill can leave none. What is no checkpoint is removed.
    Raises CheckpointError on every rank when any rank fails (a full disk, for instance) or when the folder is a
    checkpoint of something else; the folder is then untouched.
    """
    begin_save(folder, policy, step, extra, copy=False).finish(FINISH_SECONDS)


def begin_save(
    folder: str | os.PathLike[str],
    policy: Policy,
    step: int,
    extra: dict[str, Any],
    *,
    copy: bool = True,
) -> PendingSave:
    """Begin to write a checkpoint as ``save`` does. With a ``copy`` of the state in host memory (of this rank's share)
    ``policy`` may go on training; the folder is a checkpoint only after ``finish``. Raises as ``save``, and
    CheckpointError when there is not enough room."""
    facts = {
        "content": "training",
        "step": step,
        "extra": extra,
        "distributed_optimizer": policy.config.distributed_optimizer,
    }
    pending = PendingSave(Path(folder).absolute(), policy.layout, facts)
    pending.begin(lambda: _state(policy, loading=False), _parallel_save(), copy=copy)
    return pending


def load(folder: str | os.PathLike[str], policy: Policy) -> tuple[int, dict[str, Any]]:
    """Restore ``policy`` from a checkpoint saved in any layout; returns (step, extra). Every rank calls it.

    The random state is restored where tensor, pipeline and expert sizes are those of the save; in another layout it
    stays as seeded. Raises CheckpointError on every rank when the checkpoint is missing, incomplete, damaged, of
    another shape or without optimizer state.
    """
    source = Path(folder).absolute()
    layout = policy.layout
    marker = checked_marker(source, layout)
    if marker["content"] != "training":
        raise CheckpointError(
            f"checkpoint {source} holds weights only, no optimizer state: training cannot continue from it; "
            "begin a run from it (model.path)"
        )
    saved = marker["layout"]
    _check_optimizer(source, marker, policy)
    with_rng = all(saved.get(axis, 1) == getattr(layout, axis) for axis in ("tp", "pp", "ep"))
    with backend.current().scope():
        state = _state(policy, loading=True, rng=with_rng)
        loaded = together(
            layout,
            f"loading {source}",
            lambda: dist_checkpointing.load(state, str(source), _parallel_load()),
            share=False,
        )[0]
        for key, chunk in _chunk_keys(policy.chunks):
            _fill(chunk, loaded[key])
        policy.optimizer.load_state_dict(_optimizer_state(policy, loaded["optimizer"]))
        if with_rng:
            _set_rng(loaded["rng"])
    return int(marker["step"]), dict(marker["extra"])


def _check_optimizer(source: Path, marker: dict[str, Any], policy: Policy) -> None:
    """Megatron's two optimizers store their state in different terms, the plain one's of experts rank by rank."""
    mine = policy.config.distributed_optimizer
    if marker.get("distributed_optimizer", mine) != mine:
        raise CheckpointError(
            f"checkpoint {source} was saved with policy.distributed_optimizer {str(not mine).lower()}, whose state the "
            "other optimizer cannot read; set it as it was"
        )
    ep = marker["layout"].get("ep", 1)
    if not mine and ep != policy.layout.ep:
        raise CheckpointError(
            f"checkpoint {source} was saved with policy.expert_parallel {ep}; without policy.distributed_optimizer it "
            f"cannot continue with {policy.layout.ep}; set it as it was"
        )


def load_weights(
    folder: str | os.PathLike[str], chunks: Sequence[Any], layout: Layout
) -> dict[str, Any]:
    """Fill ``chunks`` (of ``model.build_chunks``) from a checkpoint of either kind, saved in any layout; a parameter
    takes its stored value in its own dtype. Returns ``extra``. Every rank calls it. Raises as ``load``."""
    source = Path(folder).absolute()
    marker = checked_marker(source, layout)
    with backend.current().scope():
        state = _weights(chunks)
        _check_all_read(source, state, layout)
        loaded = together(
            layout,
            f"loading {source}",
            lambda: dist_checkpointing.load(state, str(source), _parallel_load()),
            share=False,
        )[0]
        for key, chunk in _chunk_keys(chunks):
            _fill(chunk, loaded[key])
    return dict(marker["extra"])


def _check_all_read(source: Path, state: dict[str, Any], layout: Layout) -> None:
    """Refuse a checkpoint with weights that no rank reads: they belong to another model than was built."""

    def read() -> tuple[set[str], set[str]]:
        stored = dist_checkpointing.load_tensors_metadata(str(source))
        mine = {part.key for chunk in state.values() for part in chunk.values()}
        return {key for key in stored if key.startswith(MODEL_KEYS)}, mine

    answers = together(layout, f"reading {source}", read)
    unread = sorted(answers[0][0].difference(*(mine for _, mine in answers)))
    if unread:
        raise CheckpointError(
            f"checkpoint {source} holds {', '.join(unread[:3])}, which the model at hand has no place for: "
            "it was saved from another model"
        )


# ---------------------------------------------------------------- who writes and reads what

SAVE_THREADS = 4
"""Files that each rank writes at once: one thread does not fill a network file system."""


def _replicas() -> dist.ProcessGroup:
    """Ranks that hold the same parameters: their optimizer shards are gathered on all of them."""
    group: dist.ProcessGroup = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return group


def _parallel_save() -> FullyParallelSaveStrategyWrapper:
    """Every replica writes its part of what all of them hold, instead of the first everything."""
    return FullyParallelSaveStrategyWrapper(
        TorchDistSaveShardedStrategy(thread_count=SAVE_THREADS), _replicas()
    )


def _parallel_load() -> FullyParallelLoadStrategyWrapper:
    """Every replica reads a part and hands it on, instead of all of them everything."""
    return FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), _replicas())


# ---------------------------------------------------------------- what is saved


def _weights(chunks: Sequence[Any], metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    metadata = metadata or {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)
    }
    return {
        key: {
            name: part
            for name, part in unwrap(chunk).sharded_state_dict(metadata=metadata).items()
            if not name.endswith(EXTRA_STATE)
        }
        for key, chunk in _chunk_keys(chunks)
    }


def _fill(chunk: Any, loaded: dict[str, Any]) -> None:
    """Put what was loaded into the model. Raises RuntimeError naming what is missing or has no place."""
    found = unwrap(chunk).load_state_dict(loaded, strict=False)
    missing = [name for name in found.missing_keys if not name.endswith(EXTRA_STATE)]
    if missing or found.unexpected_keys:
        raise RuntimeError(
            f"missing in the checkpoint: {missing}, unknown to the model: {found.unexpected_keys}"
        )


def _state(policy: Policy, *, loading: bool, rng: bool = True) -> dict[str, Any]:
    """The sharded state: fully reshardable, in terms of whole tensors and not of ranks."""
    metadata = {
        "distrib_optim_sharding_type": SHARDING,
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": _replicas(),
    }
    if backend.current().transformer_engine:
        begin_state(policy.optimizer)
    state = _weights(policy.chunks, metadata)
    models = dict(state)
    if len(policy.chunks) == 1:
        models = models["model"]
    with nullcontext() if loading else ungathered(policy.optimizer):
        state["optimizer"] = policy.optimizer.sharded_state_dict(
            models, is_loading=loading, metadata=metadata
        )
    if rng:
        state["rng"] = _rng(policy.layout)
    return state


def _optimizer_state(policy: Policy, loaded: dict[Any, Any]) -> dict[Any, Any]:
    """Return the loaded state in the shape that this layout's optimizer wants.

    Megatron chains a second distributed optimizer for experts when they are shared out, and keeps what is not a tensor
    per optimizer of the saving layout. Of that only the step count matters: rates are set before each step, the rest
    is configuration.
    """
    if not policy.config.distributed_optimizer:
        return loaded
    whole = loaded if "optimizer" in loaded else loaded[0]
    step = whole["optimizer"]["param_groups"][0]["step"]
    optimizers = policy.optimizer.chained_optimizers
    parts = [loaded] if len(optimizers) == 1 else [loaded[i] for i in range(len(optimizers))]
    states: dict[int, Any] = {}
    for i, (optimizer, part) in enumerate(zip(optimizers, parts, strict=True)):
        states[i] = optimizer.state_dict()
        for group in states[i]["optimizer"]["param_groups"]:
            group["step"] = step
        states[i]["param_state"] = part["param_state"]
        states[i]["param_state_sharding_type"] = SHARDING
    return states[0] if len(states) == 1 else states


def _chunk_keys(chunks: Sequence[Any]) -> list[tuple[str, Any]]:
    if len(chunks) == 1:
        return [("model", chunks[0])]
    return [(f"model{i}", chunk) for i, chunk in enumerate(chunks)]


def _rng(layout: Layout) -> ShardedObject:
    """Random states of this (stage, tensor, expert) position; replicas draw the same."""
    return ShardedObject(
        "rng_state",
        _random_states(),
        (layout.pp, layout.tp * layout.ep),
        (layout.pp_rank, layout.tp_rank * layout.ep + layout.ep_rank),
        replica_id=layout.expert_dp_rank,
    )


def _random_states() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "accelerator": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def random_digest() -> str:
    """Digest all random states that a checkpoint holds for this rank: equal where the same would be drawn."""
    states = _random_states()
    parts = [states["torch"], states["accelerator"], *states["tracker"].values()]
    text = repr((states["python"], sorted(states["tracker"]), [p.tolist() for p in parts]))
    return hashlib.sha256(text.encode()).hexdigest()


def _set_rng(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["accelerator"])
    get_cuda_rng_tracker().set_states(states["tracker"])
