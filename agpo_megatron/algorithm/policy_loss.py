"""Policy losses per token, one callable per method. Reducing them is aggregation.py's business.

All take the N rows of one pack, of S whole sequences; rho = exp(logprob - old_logprob), the
log-ratio limited to +-20. All have the gradient -A d logprob at rho = 1 (sequence-level ones: its
mean over the sequence), so they differ off policy only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Far outside any trust region, exp still finite: no token turns the step into NaN by 0 * inf."""
PolicyLossName = Literal["ppo", "gspo", "gspo_token", "cispo", "gmpo", "sapo"]


@dataclass(frozen=True)
class Bounds:
    """``low``, ``high``: the ratio stays in [1 - low, 1 + high] (gmpo: its log in [-low, high]).
    ``dual``: c of the dual clip. ``tau_positive``, ``tau_negative``: SAPO's temperatures."""

    low: float
    high: float
    dual: float | None = None
    tau_positive: float = 1.0
    tau_negative: float = 1.05


@dataclass(frozen=True)
class Rows:
    """What a policy loss looks at, each [N] fp32 (or fp64).

    ``logprob``: differentiable. ``old_logprob``: of the policy that the ratio starts from, without
    gradient. ``advantage``. ``sequence``: [N] int64 in [0, ``sequences``), which sequence a row
    belongs to; all trained rows of a sequence are here.
    """

    logprob: Tensor
    old_logprob: Tensor
    advantage: Tensor
    sequence: Tensor
    sequences: int

    def log_ratio(self) -> Tensor:
        return (self.logprob - self.old_logprob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)

    def sequence_mean(self, x: Tensor) -> Tensor:
        """[N]: the mean of ``x`` over the rows of each row's sequence."""
        sums = x.new_zeros(self.sequences).index_add(0, self.sequence, x)
        counts = x.new_zeros(self.sequences).index_add(0, self.sequence, torch.ones_like(x))
        return (sums / counts.clamp_min(1.0))[self.sequence]


@dataclass(frozen=True)
class TokenLoss:
    """``loss`` [N]: to be summed with the weights and differentiated. ``surrogate`` [N], without
    gradient: the value of the objective, -(importance ratio) A, which the adaptive part looks at;
    CISPO's and SAPO's ``loss`` is not that. ``is_clipped`` [N] bool: rows whose ratio is outside
    its bound on the side that matters. ``ratio`` [N] without gradient."""

    loss: Tensor
    surrogate: Tensor
    is_clipped: Tensor
    ratio: Tensor


PolicyLoss = Callable[[Rows, Bounds], TokenLoss]


def ppo(rows: Rows, bounds: Bounds) -> TokenLoss:
    """PPO clip (arXiv:1707.06347), two bounds (clip-higher, arXiv:2503.14476), dual clip (1912.09729).

    ::

        l = max(-rho A, -clip(rho, 1 - low, 1 + high) A)       and for A < 0 at most  -c A

    A clipped token has no gradient.
    """
    return _clipped(rows.log_ratio().exp(), rows.advantage, bounds)


def gspo(rows: Rows, bounds: Bounds) -> TokenLoss:
    """GSPO (arXiv:2507.18071): PPO clip of the sequence's ratio, s = exp(mean_t log rho_t)."""
    return _clipped(rows.sequence_mean(rows.log_ratio()).exp(), rows.advantage, bounds)


def gspo_token(rows: Rows, bounds: Bounds) -> TokenLoss:
    """GSPO-token (arXiv:2507.18071): value of GSPO, gradient token by token.

    ::

        s_t = sg[s] pi_t / sg[pi_t]
    """
    own = (rows.logprob - rows.logprob.detach()).exp()
    ratio = rows.sequence_mean(rows.log_ratio().detach()).exp() * own
    return _clipped(ratio, rows.advantage, bounds)


def cispo(rows: Rows, bounds: Bounds) -> TokenLoss:
    """CISPO (arXiv:2506.13585):  l = -sg[clip(rho, 1 - low, 1 + high)] A log pi.

    No token loses its gradient; ``low`` = 1 is no lower bound. Surrogate: -clip(rho) A.
    """
    ratio = rows.log_ratio().exp().detach()
    bounded = ratio.clamp(1.0 - bounds.low, 1.0 + bounds.high)
    loss = -bounded * rows.advantage * rows.logprob
    return TokenLoss(loss, -bounded * rows.advantage, bounded != ratio, ratio)


def gmpo(rows: Rows, bounds: Bounds) -> TokenLoss:
    """GMPO (arXiv:2507.20673): geometric mean of token ratios, each clipped before in log space.

    ::

        x_t = min(log rho_t, high)  for A > 0,   max(log rho_t, -low)  for A < 0
        l   = -exp(mean_t x_t) A
    """
    log_ratio = rows.log_ratio()
    positive = rows.advantage > 0
    is_clipped = torch.where(positive, log_ratio > bounds.high, log_ratio < -bounds.low)
    bounded = torch.where(
        is_clipped, torch.where(positive, bounds.high, -bounds.low).to(log_ratio.dtype), log_ratio
    )
    ratio = rows.sequence_mean(bounded).exp()
    loss = -ratio * rows.advantage
    return TokenLoss(loss, loss.detach(), is_clipped, log_ratio.detach().exp())


def sapo(rows: Rows, bounds: Bounds) -> TokenLoss:
    """SAPO (arXiv:2511.20347): a soft gate instead of a clip.

    ::

        l = -(4 / tau) sigmoid(tau (rho - 1)) A      tau = tau_positive for A > 0, else tau_negative

    Its value at rho = 1 is -2 A / tau; the surrogate is -rho A.
    """
    ratio = rows.log_ratio().exp()
    tau = torch.where(rows.advantage > 0, bounds.tau_positive, bounds.tau_negative).to(ratio.dtype)
    loss = -(4.0 / tau) * torch.sigmoid(tau * (ratio - 1.0)) * rows.advantage
    plain = ratio.detach()
    return TokenLoss(
        loss, -plain * rows.advantage, torch.zeros_like(plain, dtype=torch.bool), plain
    )


POLICY_LOSSES: dict[PolicyLossName, PolicyLoss] = {
    "ppo": ppo,
    "gspo": gspo,
    "gspo_token": gspo_token,
    "cispo": cispo,
    "gmpo": gmpo,
    "sapo": sapo,
}
SEQUENCE_RATIO_LOSSES: frozenset[PolicyLossName] = frozenset({"gspo", "gspo_token", "gmpo"})
"""Those in which a token's gradient depends on the other tokens of its sequence."""


def negative_log_likelihood(logprob: Tensor) -> Tensor:
    """Token loss of supervised tuning, ``-logprob``. [N] in, [N] out."""
    return -logprob


def _clipped(ratio: Tensor, advantage: Tensor, bounds: Bounds) -> TokenLoss:
    unclipped = -ratio * advantage
    clipped = -ratio.clamp(1.0 - bounds.low, 1.0 + bounds.high) * advantage
    # A selection, not torch.maximum, which splits the gradient wherever both sides are equal.
    is_clipped = clipped > unclipped
    loss = torch.where(is_clipped, clipped, unclipped)
    if bounds.dual is not None:
        ceiling = -bounds.dual * advantage
        beyond = (advantage < 0) & (loss > ceiling)
        loss, is_clipped = torch.where(beyond, ceiling, loss), is_clipped | beyond
    return TokenLoss(loss, loss.detach(), is_clipped, ratio.detach())
