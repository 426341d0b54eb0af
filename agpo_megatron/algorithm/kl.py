"""Other loss terms: KL to a reference policy, and the coefficient of the entropy bonus.

objective = phi(L_policy) + beta sum w k - c_H sum w H          (clip.on: policy)
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from agpo_megatron.algorithm.settings import KlEstimator
from agpo_megatron.samples import Floats

LOG_RATIO_LIMIT = 20.0
"""Limit far outside any trust region with a finite exp: no token turns the step into NaN by 0 * inf."""


def kl_estimate(
    logprob: Tensor,
    ref_logprob: Tensor,
    estimator: KlEstimator,
    old_logprob: Tensor | None = None,
) -> Tensor:
    """Estimate KL(pi || pi_ref) per sampled token; [N] in, [N] out, differentiable.

    With d = logprob - ref_logprob (limited to +-20)::

        k1 = d        k2 = d^2 / 2        k3 = e^-d + d - 1

    As a loss, the expected gradient of k1 is 0, that of k2 is the gradient of the reverse KL, that
    of k3 is biased; as a reward term k1 is unbiased. With ``old_logprob`` the estimate is multiplied
    by rho = exp(logprob - old_logprob), which makes the expected gradient of k1 and k3 that of the
    reverse KL (DeepSeek-V3.2; k2 gains nothing by it).
    Source: J. Schulman, "Approximating KL Divergence"; 2512.02556 for the importance correction.
    """
    d = (logprob - ref_logprob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    match estimator:
        case "k1":
            k = d
        case "k2":
            k = 0.5 * d * d
        case "k3":
            k = (-d).exp() + d - 1.0
        case _:
            raise ValueError(f"unknown KL estimator {estimator!r}")
    if old_logprob is None:
        return k
    return (logprob - old_logprob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp() * k


def kl_sum(logprobs: Floats, ref_logprobs: Floats, estimator: KlEstimator) -> float:
    """Sum the estimate over the tokens of one response. A KL penalty subtracts beta times this from the reward."""
    own, ref = (torch.from_numpy(np.asarray(x, dtype=np.float64)) for x in (logprobs, ref_logprobs))
    return float(kl_estimate(own, ref, estimator).sum())


ENTROPY_STEP = 0.005
"""Step of the adaptive entropy coefficient (delta)."""


def next_entropy_coefficient(
    coefficient: float, entropy: float, target: float
) -> tuple[float, float]:
    """Adapt the entropy coefficient (Skywork-OR1, arXiv:2505.22312).

    ``entropy``: current policy's, on the tokens of this step, nats. Returns (coefficient to
    carry to the next step, coefficient to apply in this one)::

        c' = c + delta if H <= target, else max(0, c - delta)
        applied: c' if H <= target, else 0
    """
    if entropy <= target:
        return coefficient + ENTROPY_STEP, coefficient + ENTROPY_STEP
    return max(0.0, coefficient - ENTROPY_STEP), 0.0
