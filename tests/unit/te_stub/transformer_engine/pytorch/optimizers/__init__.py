"""``pytorch/optimizers/``. FusedAdam counts steps by group and has no state before its first step."""

from __future__ import annotations

from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        set_grad_none: bool | None = None,
    ) -> None:
        assert adam_w_mode and bias_correction and not amsgrad
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "bias_correction": bias_correction})

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            one, two = group["betas"]
            first, second = 1 - one ** group["step"], 1 - two ** group["step"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["exp_avg"].lerp_(p.grad, 1 - one)
                state["exp_avg_sq"].mul_(two).addcmul_(p.grad, p.grad, value=1 - two)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                size = (state["exp_avg_sq"] / second).sqrt_().add_(group["eps"])
                p.addcdiv_(state["exp_avg"], size, value=-group["lr"] / first)


class FusedSGD(torch.optim.SGD):
    pass


def multi_tensor_applier(op: Any, flag: Any, lists: Any, *arguments: Any) -> Any:
    return op(2048 * 32, flag, lists, *arguments)


def multi_tensor_l2norm(
    chunk_size: int, flag: Any, lists: Any, per_tensor: bool = False
) -> tuple[Any, None]:
    norms = torch.stack([t.float().norm() for t in lists[0]])
    return norms.norm().view(1), None


def multi_tensor_scale(chunk_size: int, flag: Any, lists: Any, scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)
