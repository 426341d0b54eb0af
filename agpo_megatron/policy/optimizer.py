"""Megatron's optimizer: AdamW, Transformer Engine's or apex's fused one where importable (megatron-core chooses)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
