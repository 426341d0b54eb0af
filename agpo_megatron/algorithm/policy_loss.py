"""Per-token losses. Reducing them to one number is aggregation.py's business."""

from __future__ import annotations

import torch
from torch import Tensor

_LOG_RATIO_LIMIT = 20.0
"""Far outside any trust region, exp still finite: no token turns the step into NaN by 0 * inf."""


def ppo_clip(
    logprob: Tensor, old_logprob: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Clipped policy-gradient loss per token (arXiv:1707.06347; two bounds: arXiv:2503.14476).

    ``logprob`` [N] fp32, differentiable; ``old_logprob`` [N] fp32, of the policy that the ratio
    starts from, without gradient; ``advantage`` [N] fp32::

        rho = exp(logprob - old_logprob)
        l   = max(-rho A, -clip(rho, 1 - clip_low, 1 + clip_high) A)

    Returns (loss [N], to be minimised; is_clipped [N] bool, true where the bound is active and the
    token therefore gets no gradient; ratio [N] without gradient). At rho = 1 the gradient of l is
    exactly -A d logprob. The log-ratio is limited to +-20.
    """
    log_ratio = (logprob - old_logprob).clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    unclipped = -ratio * advantage
    clipped = -ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantage
    # A selection, not torch.maximum, which splits the gradient wherever both sides are equal.
    is_clipped = clipped > unclipped
    return torch.where(is_clipped, clipped, unclipped), is_clipped, ratio.detach()


def negative_log_likelihood(logprob: Tensor) -> Tensor:
    """Token loss of supervised tuning, ``-logprob``. [N] in, [N] out."""
    return -logprob
