"""The statistics of a loss: summed over the micro-batches of an optimizer step, then turned into its metrics."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from agpo_megatron.algorithm.gate import Adaptive, Gate
from agpo_megatron.algorithm.kl import LOG_RATIO_LIMIT
from agpo_megatron.algorithm.limits import FAR
from agpo_megatron.algorithm.loss_rows import LossRows
from agpo_megatron.algorithm.settings import LossSettings

AGES = (0, 1, 2, 4, 8)
"""Lower ends of the ages (staleness, optimizer steps) by which tokens are told apart in the metrics."""
SUMS = (
    "loss",
    "scale",
    "adapted",
    "gain",
    "kl",
    "weighted_entropy",
    "entropy",
    "ratio",
    "clipped",
    "tokens",
    "old_diff",
    "old_tokens",
    "correction",
    "corrected_tokens",
    "rollout_diff",
    "rollout_tokens",
    "rollout_far",
    "token_q",
    "token_q2",
    "sequences",
    "sequence_q",
    "sequence_q2",
    *(f"rollout_diff_age{age}" for age in AGES),
    *(f"rollout_tokens_age{age}" for age in AGES),
)
"""Statistics that are summed over micro-batches. ``loss`` is L, by the surrogate; ``scale`` the size of its terms,
sum |w c A|; ``adapted`` phi of it, for scopes within a micro-batch; ``correction`` the factors that the loss computed
itself. Those after it compare server and trainer (``against_rollout``). Beside them are ``MAXIMA``."""
MAXIMA = ("rollout_diff_max", "old_diff_max")
"""Largest entries of ``rollout_diff`` and ``old_diff``."""


def against_rollout(current: Tensor, rows: LossRows) -> dict[str, Tensor]:
    """Compare the server's log-probs with the trainer's under the weights that the batch starts from: those scored, or,
    where nothing was scored, ``current`` [N]. Returns fp64 scalars: |log q| of the tokens, by age too, and sums of q
    and q^2 for the effective sample sizes, with q = exp(trainer - server) of a token, and its product over the trained
    tokens of a sequence (logs limited to +-20)."""
    rollout, old = (rows.column(n, current.dtype) for n in ("rollout_logprobs", "old_logprobs"))
    known = ~rollout.isnan()
    gap = torch.where(known, torch.where(old.isnan(), current, old) - rollout, 0.0).double()
    known = known.double()
    diff, staleness = gap.abs(), rows.column("staleness")
    age = torch.stack([staleness >= lowest for lowest in AGES[1:]]).sum(0)

    def sums(x: Tensor, place: Tensor, count: int) -> Tensor:
        return x.new_zeros(count).index_add(0, place, x)

    def importance(log: Tensor, counted: Tensor) -> Tensor:
        return log.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp() * counted

    present = (sums(known, rows.sequence, rows.sequences) > 0).double()
    q = importance(gap, known)
    product = importance(sums(gap, rows.sequence, rows.sequences), present)
    of_age = {"rollout_diff": diff, "rollout_tokens": known}
    return {
        "rollout_diff": diff.sum(),
        "rollout_diff_max": largest(diff),
        "rollout_tokens": known.sum(),
        "rollout_far": (diff > FAR).double().sum(),
        "token_q": q.sum(),
        "token_q2": q.square().sum(),
        "sequences": present.sum(),
        "sequence_q": product.sum(),
        "sequence_q2": product.square().sum(),
        **{
            f"{name}_age{lowest}": value
            for name, x in of_age.items()
            for lowest, value in zip(AGES, sums(x, age, len(AGES)), strict=True)
        },
    }


def largest(x: Tensor) -> Tensor:
    return x.amax() if len(x) else x.sum()


def loss_metrics(
    settings: LossSettings, totals: Mapping[str, float], gate: Gate | None
) -> tuple[dict[str, float], float]:
    """Return the metrics of an optimizer step, from the ``SUMS`` of all its micro-batches, and the gain by which its
    gradient is still to be scaled. ``gate``: None unless it was decided before the forward pass."""
    clip = settings.clip
    unclipped, value, mean_gain, still = totals["loss"], totals["loss"], 1.0, 1.0
    if gate is not None:
        unclipped, value, mean_gain = gate.loss, gate.value, gate.mean
    elif clip.kind != "none" and clip.on == "total":
        unclipped += settings.kl_coef * totals["kl"]
        unclipped -= settings.entropy.coef * totals["weighted_entropy"]
        phi = Adaptive.of(clip)
        value = phi.value(unclipped, totals["scale"])
        mean_gain = still = phi.gain(unclipped, totals["scale"])
    elif clip.kind != "none":
        value, mean_gain = totals["adapted"], totals["gain"] / max(totals["tokens"], 1.0)
    metrics = {
        "loss/policy": value,
        "loss/unclipped": unclipped,
        "tokens/trained": totals["tokens"],
    }
    if tokens := totals["tokens"]:
        if clip.kind != "none":
            metrics["loss/clip_gate"] = mean_gain
        metrics["policy/entropy"] = totals["entropy"] / tokens
        if settings.kl_coef > 0:
            metrics["loss/kl"] = totals["kl"]
        if settings.policy != "nll":
            metrics["policy/ratio_mean"] = totals["ratio"] / tokens
            metrics["policy/clip_frac"] = totals["clipped"] / tokens
    if corrected := totals["corrected_tokens"]:
        metrics["correction/mean"] = totals["correction"] / corrected
        metrics["correction/dropped_frac"] = 0.0
    if scored := totals["old_tokens"]:
        metrics["policy/old_logprob_abs_diff_mean"] = totals["old_diff"] / scored
        metrics["policy/old_logprob_abs_diff_max"] = totals["old_diff_max"]
    return metrics | _rollout_metrics(totals), still


def _rollout_metrics(totals: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of server against trainer. Effective sample size: (sum q)^2 / (N sum q^2), in (0, 1]."""
    if not totals["rollout_tokens"]:
        return {}

    def share(of: str, count: float) -> float:
        return totals[f"{of}_q"] ** 2 / (count * totals[f"{of}_q2"])

    metrics = {
        "rollout/logprob_abs_diff_mean": totals["rollout_diff"] / totals["rollout_tokens"],
        "rollout/logprob_abs_diff_max": totals["rollout_diff_max"],
        "rollout/logprob_far_frac": totals["rollout_far"] / totals["rollout_tokens"],
        "rollout/ess_token": share("token", totals["rollout_tokens"]),
        "rollout/ess_sequence": share("sequence", totals["sequences"]),
    }
    for age in AGES:
        if tokens := totals[f"rollout_tokens_age{age}"]:
            mean = totals[f"rollout_diff_age{age}"] / tokens
            metrics[f"rollout/logprob_abs_diff_age{age}"] = mean
    return metrics
