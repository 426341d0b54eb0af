"""The slow, obvious version of ``fused.selected_logprobs``: every logit at once, in fp64."""

from __future__ import annotations

from torch import Tensor

from agpo_megatron.logprob.fused import LogProbs


def reference_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    temperature: float,
    softcap: float | None = None,
) -> LogProbs:
    """Log-prob of each row's target and entropy of each row's distribution, fp64, differentiable.

    ``hidden`` [N, H]; ``weight`` [V, H] with V >= ``vocab_size``, the whole vocabulary, rows beyond
    ``vocab_size`` being padding; ``targets`` [N] int64. ``softcap``: logits become
    softcap * tanh(logits / softcap), before the temperature.
    """
    logits = hidden.double() @ weight.double()[:vocab_size].T  # [N, vocab_size]
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    log_p = (logits / temperature).log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return LogProbs(log_p.gather(1, targets[:, None]).squeeze(1), entropy)
