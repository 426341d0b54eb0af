"""The one owner of Megatron's process groups and random state: initialise them, describe them as a ``Layout``."""

from __future__ import annotations

import datetime
import os
import random
from dataclasses import dataclass

import torch
import torch.distributed as dist

from agpo_megatron.config.schema import PolicyConfig
from agpo_megatron.policy import backend


class LayoutError(ValueError):
    """The parallel layout does not fit the ranks at hand, or is one that does not run."""


@dataclass(frozen=True)
class Layout:
    """The place of this rank: sizes and indices of every axis, and the groups that collectives run in.

    ``cp_group``: ranks that hold parts of the same sequences.
    ``dp_cp_group``: ranks that hold the same parameters and different tokens: gradients are summed over it.
    ``ep_group``: ranks of ``dp_cp_group`` that share the experts out, each expert whole on one of them (cut by TP);
    ``expert_dp_rank`` counts the replicas of that.
    ``control_group``: all ranks over gloo, for host-side values; never on the accelerator's stream.
    """

    rank: int
    world: int
    tp: int
    pp: int
    vpp: int
    cp: int
    ep: int
    dp: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    ep_rank: int
    expert_dp_rank: int
    dp_rank: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup
    ep_group: dist.ProcessGroup
    control_group: dist.ProcessGroup

    @property
    def first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def speaks_for_replica(self) -> bool:
        """This rank reports what its data-parallel replica computed: last stage, TP0, CP0."""
        return self.last_stage and self.tp_rank == 0 and self.cp_rank == 0

    @property
    def publishes(self) -> bool:
        """This rank is the source of its stage: TP0, CP0, DP0 (design, publishing weights)."""
        return self.tp_rank == 0 and self.cp_rank == 0 and self.dp_rank == 0

    def sizes(self) -> dict[str, int]:
        """Sizes of the axes, for records and messages."""
        return {axis: getattr(self, axis) for axis in ("tp", "pp", "vpp", "cp", "ep", "dp")}


_layout: Layout | None = None


def _sizes(policy: PolicyConfig) -> dict[str, int]:
    return {
        "tp": policy.tensor_parallel,
        "pp": policy.pipeline_parallel,
        "vpp": policy.virtual_pipeline,
        "cp": policy.context_parallel,
        "ep": policy.expert_parallel,
        "dp": policy.data_parallel,
    }


def initialize(policy: PolicyConfig, seed: int, *, timeout: float = 1800.0) -> Layout:
    """Join the ranks (``torch.distributed`` by environment variables unless done already) and cut them into groups.
    A second call for the same layout returns it again.

    ``timeout``: seconds after which a collective that some rank never joined raises. ``seed``: of the model-parallel
    random states. Rank order is Megatron's tp-cp-ep-dp-pp: TP neighbours are adjacent, stages far apart.

    Raises LayoutError if the world size is not TP x PP x CP x DP or EP does not divide CP x DP.
    """
    global _layout
    device = backend.current()
    _refuse(policy)
    if _layout is not None:
        if _layout.sizes() != _sizes(policy):
            raise LayoutError(
                f"this process is already laid out as {_layout.sizes()}, it cannot change to {_sizes(policy)}"
            )
        return _layout
    if not dist.is_initialized():
        for name, value in (("MASTER_ADDR", "127.0.0.1"), ("RANK", "0"), ("WORLD_SIZE", "1")):
            os.environ.setdefault(name, value)
        limit = datetime.timedelta(seconds=timeout)
        if int(os.environ["WORLD_SIZE"]) == 1 and "MASTER_PORT" not in os.environ:
            store = dist.HashStore()
            dist.init_process_group(
                device.dist_backend, store=store, rank=0, world_size=1, timeout=limit
            )
        else:
            dist.init_process_group(device.dist_backend, timeout=limit)
    world = dist.get_world_size()
    if world != policy.world_size:
        raise LayoutError(
            f"{world} ranks, but tensor_parallel {policy.tensor_parallel} x pipeline_parallel "
            f"{policy.pipeline_parallel} x context_parallel {policy.context_parallel} x data_parallel "
            f"{policy.data_parallel} = {policy.world_size}; change the layout or the number of ranks"
        )
    with device.scope():
        _initialize_megatron(policy, seed, timeout)
        _layout = _describe(policy, timeout)
    return _layout


def current() -> Layout:
    """The layout of this process. Raises LayoutError before ``initialize``."""
    if _layout is None:
        raise LayoutError("policy.parallel.initialize() has not been called in this process")
    return _layout


def shutdown() -> None:
    """Take the groups down again, so that another layout can be initialised over the same ranks (tests do)."""
    global _layout
    from megatron.core import parallel_state as mpu

    mpu.destroy_model_parallel()
    _layout = None
    if not dist.is_initialized():
        return
    # Megatron only forgets its groups; over gloo each of the two dozen keeps three threads.
    dist.barrier()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _refuse(policy: PolicyConfig) -> None:
    """Refuse what megatron-core would run, wrongly or in vain. What it refuses itself is left to it."""
    if policy.context_parallel * policy.data_parallel % policy.expert_parallel:
        raise LayoutError(
            f"expert_parallel {policy.expert_parallel} does not divide context_parallel {policy.context_parallel} x "
            f"data_parallel {policy.data_parallel}: those ranks share the experts out"
        )


def _initialize_megatron(policy: PolicyConfig, seed: int, timeout: float) -> None:
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    mpu.initialize_model_parallel(
        tensor_model_parallel_size=policy.tensor_parallel,
        pipeline_model_parallel_size=policy.pipeline_parallel,
        virtual_pipeline_model_parallel_size=(
            policy.virtual_pipeline if policy.virtual_pipeline > 1 else None
        ),
        context_parallel_size=policy.context_parallel,
        expert_model_parallel_size=policy.expert_parallel,
        expert_tensor_parallel_size=policy.tensor_parallel,
        distributed_timeout_minutes=max(1, round(timeout / 60)),
    )
    random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _describe(policy: PolicyConfig, timeout: float) -> Layout:
    from megatron.core import parallel_state as mpu

    on_gloo = backend.current().dist_backend == "gloo"
    limit = datetime.timedelta(seconds=timeout)
    control = dist.group.WORLD if on_gloo else dist.new_group(backend="gloo", timeout=limit)
    assert control is not None
    return Layout(
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        **_sizes(policy),
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        cp_rank=mpu.get_context_parallel_rank(),
        ep_rank=mpu.get_expert_model_parallel_rank(),
        expert_dp_rank=mpu.get_expert_data_parallel_rank(),
        dp_rank=mpu.get_data_parallel_rank(),
        tp_group=mpu.get_tensor_model_parallel_group(),
        pp_group=mpu.get_pipeline_model_parallel_group(),
        cp_group=mpu.get_context_parallel_group(),
        dp_cp_group=mpu.get_data_parallel_group(with_context_parallel=True),
        ep_group=mpu.get_expert_model_parallel_group(),
        control_group=control,
    )
