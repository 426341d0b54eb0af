"""Megatron's optimizer: AdamW, Transformer Engine's or apex's fused one where importable (megatron-core chooses)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from agpo_megatron.config.schema import PolicyConfig, TrainConfig
from agpo_megatron.policy.model import parameter_dtype


def build_optimizer(chunks: Sequence[Any], policy: PolicyConfig, train: TrainConfig) -> Any:
    """AdamW over ``chunks`` with fp32 state, sharded over DP x CP if ``policy.distributed_optimizer``.

    The learning rate is set before every step (``set_rates``); weight decay spares norms and biases.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        min_lr=0.0,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_eps=train.adam_eps,
        clip_grad=train.grad_clip,
        bf16=policy.dtype == "bf16",
        params_dtype=parameter_dtype(policy),
        use_distributed_optimizer=policy.distributed_optimizer,
    )
    return get_megatron_optimizer(config, list(chunks))


def begin_state(optimizer: Any) -> None:
    """Give an optimizer that has never stepped the state that its first step would start from, so that it can be saved.

    Fused optimizers make moments and count of steps at their first step; megatron-core's checkpoint code takes both for
    granted (``distrib_optimizer.py``: ``get_parameter_state_dp_zero``, ``state_dict``).
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.init_state_fn is None or all(
            part.optimizer.state.get(p) for g in part.optimizer.param_groups for p in g["params"]
        ):
            continue
        part.init_state_fn(part.optimizer, part.config)
        for group in part.optimizer.param_groups:
            group.setdefault("step", 0)


@contextmanager
def ungathered(optimizer: Any) -> Iterator[None]:
    """Within: a distributed optimizer of one replica gives its state for a save without the gather over replicas, in
    which megatron-core (``distrib_optimizer.py``: ``get_parameter_state_dp_zero``) allocates it four times over."""
    alone = [
        part
        for part in getattr(optimizer, "chained_optimizers", [optimizer])
        if hasattr(part, "get_parameter_state_dp_zero")
        and not part.is_stub_optimizer  # of a stage without parameters of its kind
        and part.data_parallel_group.size() == 1
    ]
    for part in alone:
        part.get_parameter_state_dp_zero = partial(_whole_state, part)
    try:
        yield
    finally:
        for part in alone:
            del part.get_parameter_state_dp_zero


def _whole_state(optimizer: Any, **_: Any) -> dict[Any, Any]:
    """Return what ``get_parameter_state_dp_zero`` does, of one replica: per buffer, fp32 [elements] on the host of main
    parameters and moments."""
    keys = ("param", *optimizer.optimizer_state_keys)
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for number, by_dtype in enumerate(optimizer.gbuf_ranges):
        buffer = optimizer.buffers[number]
        whole = {key: torch.empty(buffer.numel_unpadded, dtype=torch.float32) for key in keys}
        ((dtype, buckets),) = by_dtype.items()
        offset = 0
        for ranges, bucket in zip(buckets, buffer.buckets, strict=True):
            for parameter, where in ranges["param_map"].items():
                place = where["gbuf_local"]
                tensors = optimizer._get_main_param_and_optimizer_states(parameter)
                for key in keys:
                    whole[key][offset + place.start : offset + place.end].copy_(
                        tensors[key].detach()
                    )
            offset += bucket.numel_unpadded
        state[number] = {dtype: {**whole, "numel_unpadded": buffer.numel_unpadded}}
    return state


def clear_state(optimizer: Any) -> None:
    """Set moments and count of steps to 0, as before the first step."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is None:
            continue
        for state in part.optimizer.state.values():
            for name, value in state.items():
                if (
                    name != "master_param"
                ):  # fp32 weights that some fused optimizers keep beside the moments
                    value.zero_()
        for group in part.optimizer.param_groups:
            if "step" in group:
                group["step"] = 0


def set_rates(optimizer: Any, lr: float, weight_decay: float) -> None:
    """Set ``lr`` for all groups, and weight decay times each group's factor, as Megatron's parameter scheduler does."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
