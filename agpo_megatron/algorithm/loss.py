"""The loss of a micro-batch: policy losses of its tokens, KL and entropy terms, and their sums for the metrics.

    sum_micro-batches [ sum_t g w c l  +  beta sum_t w k  -  c_H sum_t w H ]

with l, k, H policy loss, KL estimate and entropy of a token; w its loss weight, c its rollout correction, g the gain
phi'(L) of the gate (gate.py) where that is folded in. This module uses tensors only, nothing of Megatron.

A policy loss is a function of ``Ratios`` and ``LossSettings``, in ``POLICY_LOSSES`` under the name that
``algorithm.loss.policy`` gives. All have the gradient -A d logprob at ratio 1 (sequence-level ones: its mean over the
sequence), so they differ off policy only. To add one, write a function here and its parameters in settings.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from agpo_megatron.algorithm.gate import Adaptive
from agpo_megatron.algorithm.kl import LOG_RATIO_LIMIT, kl_estimate
from agpo_megatron.algorithm.loss_metrics import against_rollout, largest
from agpo_megatron.algorithm.loss_rows import LossRows
from agpo_megatron.algorithm.settings import LossSettings, PolicyLossName


@dataclass(frozen=True)
class Ratios:
    """The inputs of a policy loss: ``logprob`` [N], differentiable; ``old_logprob`` [N], without gradient, the
    denominator of the ratio rho = exp(logprob - old_logprob); and all columns of their ``rows``."""

    logprob: Tensor
    old_logprob: Tensor
    rows: LossRows

    @property
    def advantage(self) -> Tensor:
        return self.rows.column("advantage", self.logprob.dtype)

    def log_ratio(self) -> Tensor:
        """Return log rho, [N], limited to +-20."""
        return (self.logprob - self.old_logprob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)

    def sequence_mean(self, x: Tensor) -> Tensor:
        """Return, for each row, the mean of ``x`` over the rows of its sequence, [N]."""
        sums = x.new_zeros(self.rows.sequences).index_add(0, self.rows.sequence, x)
        ones = torch.ones_like(x)
        counts = x.new_zeros(self.rows.sequences).index_add(0, self.rows.sequence, ones)
        return (sums / counts.clamp_min(1.0))[self.rows.sequence]


@dataclass(frozen=True)
class TokenLoss:
    """The result of a policy loss. ``loss`` [N]: to be summed with the weights and differentiated.
    ``surrogate`` [N], without gradient: the value of the objective, -(importance ratio) A, which
    the gate uses; for CISPO and SAPO it differs from ``loss``. ``is_clipped`` [N] bool: rows whose
    ratio is outside its bound on the side that matters. ``ratio`` [N], without gradient."""

    loss: Tensor
    surrogate: Tensor
    is_clipped: Tensor
    ratio: Tensor


SAPO_TAU_POSITIVE, SAPO_TAU_NEGATIVE = 1.0, 1.05
PolicyLoss = Callable[[Ratios, LossSettings], TokenLoss]


def ppo(ratios: Ratios, settings: LossSettings) -> TokenLoss:
    """PPO clip (arXiv:1707.06347), two bounds (clip-higher, arXiv:2503.14476), dual clip (1912.09729).

    ::

        l = max(-rho A, -clip(rho, 1 - low, 1 + high) A)       and for A < 0 at most  -c A

    A clipped token has no gradient.
    """
    return _clipped(ratios.log_ratio().exp(), ratios.advantage, settings)


def gspo(ratios: Ratios, settings: LossSettings) -> TokenLoss:
    """GSPO (arXiv:2507.18071): PPO clip of the sequence's ratio, s = exp(mean_t log rho_t)."""
    return _clipped(ratios.sequence_mean(ratios.log_ratio()).exp(), ratios.advantage, settings)


def gspo_token(ratios: Ratios, settings: LossSettings) -> TokenLoss:
    """GSPO-token (arXiv:2507.18071): value of GSPO, gradient token by token.

    ::

        s_t = sg[s] pi_t / sg[pi_t]
    """
    own = (ratios.logprob - ratios.logprob.detach()).exp()
    ratio = ratios.sequence_mean(ratios.log_ratio().detach()).exp() * own
    return _clipped(ratio, ratios.advantage, settings)


def cispo(ratios: Ratios, settings: LossSettings) -> TokenLoss:
    """CISPO (arXiv:2506.13585):  l = -sg[clip(rho, 1 - low, 1 + high)] A log pi.

    No token loses its gradient; ``low`` = 1 is no lower bound. Surrogate: -clip(rho) A.
    """
    ratio = ratios.log_ratio().exp().detach()
    bounded = ratio.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    loss = -bounded * ratios.advantage * ratios.logprob
    return TokenLoss(loss, -bounded * ratios.advantage, bounded != ratio, ratio)


def gmpo(ratios: Ratios, settings: LossSettings) -> TokenLoss:
    """GMPO (arXiv:2507.20673): geometric mean of token ratios, each clipped before in log space.

    ::

        x_t = min(log rho_t, high)  for A > 0,   max(log rho_t, -low)  for A < 0
        l   = -exp(mean_t x_t) A
    """
    log_ratio = ratios.log_ratio()
    positive = ratios.advantage > 0
    is_clipped = torch.where(
        positive, log_ratio > settings.clip_high, log_ratio < -settings.clip_low
    )
    bounded = torch.where(
        is_clipped,
        torch.where(positive, settings.clip_high, -settings.clip_low).to(log_ratio.dtype),
        log_ratio,
    )
    ratio = ratios.sequence_mean(bounded).exp()
    loss = -ratio * ratios.advantage
    return TokenLoss(loss, loss.detach(), is_clipped, log_ratio.detach().exp())


def sapo(ratios: Ratios, settings: LossSettings) -> TokenLoss:
    """SAPO (arXiv:2511.20347): a soft gate instead of a clip.

    ::

        l = -(4 / tau) sigmoid(tau (rho - 1)) A      tau = 1.0 for A > 0, else 1.05

    Its value at rho = 1 is -2 A / tau; the surrogate is -rho A.
    """
    ratio = ratios.log_ratio().exp()
    tau = torch.where(ratios.advantage > 0, SAPO_TAU_POSITIVE, SAPO_TAU_NEGATIVE).to(ratio.dtype)
    loss = -(4.0 / tau) * torch.sigmoid(tau * (ratio - 1.0)) * ratios.advantage
    plain = ratio.detach()
    return TokenLoss(
        loss, -plain * ratios.advantage, torch.zeros_like(plain, dtype=torch.bool), plain
    )


def nll(ratios: Ratios, settings: LossSettings) -> TokenLoss:
    """Negative log-likelihood of supervised fine-tuning, -log pi; there is no ratio."""
    plain = ratios.logprob.detach()
    return TokenLoss(
        -ratios.logprob, -plain, torch.zeros_like(plain, dtype=torch.bool), torch.ones_like(plain)
    )


POLICY_LOSSES: dict[PolicyLossName, PolicyLoss] = {
    "ppo": ppo,
    "gspo": gspo,
    "gspo_token": gspo_token,
    "cispo": cispo,
    "gmpo": gmpo,
    "sapo": sapo,
    "nll": nll,
}
SEQUENCE_RATIO_LOSSES: frozenset[PolicyLossName] = frozenset({"gspo", "gspo_token", "gmpo"})
"""Policy losses in which a token's gradient depends on the other tokens of its sequence."""


def check_rows(settings: LossSettings, rows: LossRows) -> None:
    """Raise ValueError if some or all rows (on the host) lack a log-prob that the loss needs."""
    old = rows.column("old_logprobs").isnan()
    if old.any() and not old.all():
        raise ValueError("some sequences have no old_logprobs, others have; score the whole batch")
    if settings.kl_coef > 0 and rows.column("ref_logprobs").isnan().any():
        raise ValueError("a KL term needs reference log-probs; score the batch with them first")
    if settings.old_logprobs == "rollout" and rows.column("rollout_logprobs").isnan().any():
        raise ValueError("old_logprobs rollout needs the log-probs of a rollout server")
    if settings.correction.kind != "none":
        missing = rows.column("correction").isnan()
        if settings.corrects_tokens:
            missing &= rows.column("rollout_logprobs").isnan()
        if missing.any():
            raise ValueError(
                "a rollout correction needs the log-probs of a rollout server, scored against"
            )


def micro_batch_loss(
    settings: LossSettings, logprob: Tensor, entropy: Tensor, rows: LossRows
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return loss (scalar) and statistics (fp64 scalars) of one pack. ``logprob``, ``entropy`` [N], differentiable.

    A pack without rows gives a 0 with a backward pass: every rank takes part in every collective.
    """
    losses, sums = _row_losses(settings, logprob, entropy, rows)
    stats = {name: value.double().sum() for name, value in sums.items()}
    stats["old_diff_max"] = largest(sums["old_diff"].double())
    return losses.sum(), stats | against_rollout(logprob.detach(), rows)


def row_loss(
    settings: LossSettings, rows: LossRows
) -> Callable[[Tensor, Tensor, slice], Tensor] | None:
    """Return the loss per row, if a row's loss depends only on its own log-prob and entropy; else None.

    It depends on other rows with a sequence ratio (gspo, gspo_token, gmpo), and with a gate that is decided within
    the pack by the loss of several rows (scopes ``micro_batch`` and ``sequence``).
    """
    clip = settings.clip
    decided_within = clip.kind != "none" and clip.scope in ("micro_batch", "sequence")
    if settings.policy in SEQUENCE_RATIO_LOSSES or decided_within:
        return None

    def losses(logprob: Tensor, entropy: Tensor, cut: slice) -> Tensor:
        return _row_losses(settings, logprob, entropy, rows.part(cut))[0]

    return losses


def _row_losses(
    settings: LossSettings, logprob: Tensor, entropy: Tensor, rows: LossRows
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (weighted loss of each row; its contributions to ``SUMS``), all [N]."""
    current = logprob.detach()
    ratios = _ratios(settings, logprob, rows)
    w, old = (rows.column(name, current.dtype) for name in ("loss_weight", "old_logprobs"))
    token = POLICY_LOSSES[settings.policy](ratios, settings)
    correction, computed = _correction(settings, current, rows)
    corrected = w * correction
    values = corrected * token.surrogate
    scale = (corrected * ratios.advantage).abs()
    gains, adapted = _gains(settings, w, values, scale, rows)
    losses = corrected * gains * token.loss

    kl = torch.zeros_like(current)
    if settings.kl_coef > 0:
        start = ratios.old_logprob if settings.kl.importance else None
        reference = rows.column("ref_logprobs", w.dtype)
        k = kl_estimate(logprob, reference, settings.kl.estimator, start)
        losses = losses + settings.kl_coef * w * k
        kl = k.detach()
    if settings.entropy.coef > 0:
        losses = losses - settings.entropy.coef * w * entropy

    scored = ~old.isnan()
    return losses, {
        "loss": values,
        "scale": scale,
        "adapted": adapted,
        "gain": gains,
        "kl": w * kl,
        "weighted_entropy": w * entropy.detach(),
        "entropy": entropy.detach(),
        "ratio": token.ratio,
        "clipped": token.is_clipped,
        "tokens": torch.ones_like(current),
        "old_diff": torch.where(scored, (current - old).abs(), 0.0),
        "old_tokens": scored,
        "correction": torch.where(computed, correction, 0.0),
        "corrected_tokens": computed,
    }


def _correction(settings: LossSettings, current: Tensor, rows: LossRows) -> tuple[Tensor, Tensor]:
    """Return (c of each row [N], rows [N] bool whose c is computed here): as decided with the batch; else, truncated by
    token, min(exp(current - rollout), high) without gradient; else 1."""
    decided = rows.column("correction", current.dtype)
    unknown = decided.isnan()
    if not settings.corrects_tokens:
        return torch.where(unknown, 1.0, decided), torch.zeros_like(unknown)
    gap = current - rows.column("rollout_logprobs", current.dtype)
    q = gap.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().clamp(max=settings.correction.high)
    return torch.where(unknown, q, decided), unknown


def _ratios(settings: LossSettings, logprob: Tensor, rows: LossRows) -> Ratios:
    """Return the ratios: from the server's log-probs, or from the scored ones; in the first update of a batch, and
    where nothing was scored, from the policy's own: 1, without the difference between two computations."""
    current = logprob.detach()
    if settings.old_logprobs == "rollout":
        return Ratios(logprob, rows.column("rollout_logprobs", logprob.dtype), rows)
    old = rows.column("old_logprobs", logprob.dtype)
    own = old.isnan() | (rows.column("update") == 0)
    return Ratios(logprob, torch.where(own, current, old), rows)


def _gains(
    settings: LossSettings, w: Tensor, values: Tensor, scale: Tensor, rows: LossRows
) -> tuple[Tensor, Tensor]:
    """Return (gain of each row [N], phi of the parts), for folded gains and for scopes within a pack."""
    nothing, clip = torch.zeros_like(w), settings.clip
    if rows.gains is not None:
        return rows.gains.to(w.dtype)[rows.sequence], nothing
    if clip.kind == "none" or settings.gate_needs_the_step or not len(w):
        return torch.ones_like(w), nothing
    if clip.scope == "micro_batch":
        part, count = torch.zeros_like(rows.sequence), 1
    elif clip.scope == "sequence":
        part, count = rows.sequence, rows.sequences
    else:
        part, count = torch.arange(len(w), device=w.device), len(w)

    def sums(x: Tensor) -> Tensor:
        return x.new_zeros(count, dtype=torch.float64).index_add(0, part, x.double())

    whole = sums(w)
    divisor = whole.where(whole > 0, 1.0)
    means, scales = sums(values) / divisor, sums(scale) / divisor
    phi = Adaptive.of(clip)
    return phi.gains(means, scales).to(w.dtype)[part], whole * phi.values(means, scales)


def _clipped(ratio: Tensor, advantage: Tensor, settings: LossSettings) -> TokenLoss:
    unclipped = -ratio * advantage
    clipped = -ratio.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high) * advantage
    # Not torch.maximum, which splits the gradient wherever both sides are equal.
    is_clipped = clipped > unclipped
    loss = torch.where(is_clipped, clipped, unclipped)
    if settings.dual_clip is not None:
        ceiling = -settings.dual_clip * advantage
        beyond = (advantage < 0) & (loss > ceiling)
        loss, is_clipped = torch.where(beyond, ceiling, loss), is_clipped | beyond
    return TokenLoss(loss, loss.detach(), is_clipped, ratio.detach())
