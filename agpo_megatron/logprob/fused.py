"""LM head, log-prob, entropy and token loss as one differentiable function that never holds all logits.

**Two pass**: forward keeps a few numbers per row, backward computes the logits again: four matmuls.

**One pass**: a chunk of rows keeps its logits in a buffer while a callable turns their log-probs into losses; the
gradients of the chunk are then formed at once, in forward: three matmuls. Fit for every loss that is a sum over tokens
of something that depends on nothing but that token's own log-prob and entropy.

passes.py has the equations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from agpo_megatron.logprob import passes
from agpo_megatron.logprob.projection import Gradients, Head, Kernels, Shard

RowLoss = Callable[[Tensor, Tensor, slice], Tensor]
"""(logprob [n], entropy [n], which rows they are) to the loss of each of these rows [n], differentiable."""


@dataclass(frozen=True)
class LogProbs:
    """``logprob`` and ``entropy``: nats, [N], fp32 (fp64 for fp64 inputs). With a token loss ``loss`` is its sum, a
    scalar, and what is differentiable; without, ``logprob`` and ``entropy`` are."""

    logprob: Tensor
    entropy: Tensor
    loss: Tensor | None = None


def selected_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    temperature: float,
    chunk: int,
    softcap: float | None = None,
    token_loss: RowLoss | None = None,
    entropy_gradient: bool = False,
    kernels: Kernels = "auto",
) -> LogProbs:
    """Log-prob of each row's target and entropy of each row's softmax(logits / temperature).

    ``hidden`` [N, H] bf16, fp16, fp32 or fp64: last hidden states of the N rows that matter, the same on every rank of
    ``group`` (from ``rows.select_rows``). ``weight`` [V_local, H], same dtype: this rank's rows
    [rank * V_local, (rank + 1) * V_local) of the LM head, padded at the end of the vocabulary. ``targets`` [N] int64:
    vocabulary ids, not shard-local ones. ``group``: tensor parallel group, None for a whole head. ``vocab_size``: real
    vocabulary; columns beyond it take no part in the values and get a gradient of exactly 0. ``chunk``: rows of logits
    [chunk, V_local] (fp32; fp64 for fp64 inputs) that the buffers of one pass hold in all. ``softcap``: the logits are
    softcap * tanh(logits / softcap), before the temperature. ``kernels``: what treats logits between the matmuls;
    "auto" is Triton on CUDA where it can be imported.

    ``token_loss``: one pass instead of two. Gradients are formed in forward, for an upstream gradient of 1; to scale
    them, scale inside the token loss, or the gradients later. ``entropy_gradient``: the token loss depends on the
    entropy (costs one more exponential per logit). Where autograd records nothing (``torch.no_grad()``) nothing is kept
    and no gradient is touched, whatever is asked for.

    Results are the same on every rank, bit for bit. Collectives in forward: an all_gather of [4, N] (two pass, also for
    N = 0), or one of [4, n] per chunk while the next chunk's matmul runs (one pass). None in backward: THE GRADIENT OF
    ``hidden`` IS THIS SHARD'S PARTIAL SUM, which the backward of ``select_rows`` adds up over ``group``. The gradient
    of ``weight`` is complete for its rows, summed in fp32, in ``weight.main_grad`` if there is one (during forward in
    one pass). Backward runs once; there is no second derivative.

    Raises ValueError for shapes or dtypes that do not fit, a temperature, chunk or softcap that is not positive, a head
    smaller than the vocabulary, a token loss that depends on the entropy unannounced, and (CPU tensors; elsewhere the
    check would stall the device, and such a row gives NaN) a target outside the vocabulary; RuntimeError for Triton
    where it cannot run, and in backward of one pass for another upstream gradient than 1.
    """
    rank, shards = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    _check(hidden, weight, targets, shards, vocab_size)
    for name, value in (("temperature", temperature), ("chunk", chunk), ("softcap", softcap)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} {value} must be positive")
    first = rank * weight.shape[0]
    shard = Shard(
        group=group,
        vocab_size=vocab_size,
        first=first,
        columns=min(max(vocab_size - first, 0), weight.shape[0]),
        temperature=temperature,
        softcap=softcap,
        chunk=chunk,
        kernels=kernels,
    )
    if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        return _without_gradient(Head(hidden, weight, targets, shard), token_loss)
    if token_loss is None:
        return LogProbs(*_TwoPass.apply(hidden, weight, targets, shard))  # type: ignore[no-untyped-call]
    loss, logprob, entropy = _OnePass.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, shard, token_loss, entropy_gradient
    )
    return LogProbs(logprob, entropy, loss)


@torch.no_grad()
def _without_gradient(head: Head, token_loss: RowLoss | None) -> LogProbs:
    logprob, entropy = passes.values(passes.row_statistics(head))
    loss = None
    if token_loss is not None:
        loss = token_loss(logprob, entropy, slice(0, len(logprob))).sum()
    return LogProbs(logprob, entropy, loss)


class _TwoPass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, shard: Shard
    ) -> tuple[Tensor, Tensor]:
        stats = passes.row_statistics(Head(hidden, weight, targets, shard))
        ctx.save_for_backward(hidden, weight, targets, stats)
        ctx.shard = shard
        ctx.set_materialize_grads(False)
        return passes.values(stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, stats = ctx.saved_tensors
        head = Head(hidden, weight, targets, ctx.shard)
        gradients = Gradients(head, ctx.needs_input_grad[:2])
        g = torch.zeros_like(stats[0]) if g is None else g
        passes.two_pass_gradients(head, stats, g, h, gradients)
        return gradients.hidden, gradients.weight(), None, None


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        shard: Shard,
        token_loss: RowLoss,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = Head(hidden, weight, targets, shard)
        gradients = Gradients(head, ctx.needs_input_grad[:2])
        losses = [torch.zeros((), dtype=head.dtype, device=hidden.device)]

        def token_gradient(
            logprob: Tensor, entropy: Tensor, rows: slice
        ) -> tuple[Tensor, Tensor | None]:
            with torch.enable_grad():
                inputs = (logprob.detach().requires_grad_(), entropy.detach().requires_grad_())
                loss = token_loss(*inputs, rows).sum()
            g, h = torch.autograd.grad(loss, inputs, allow_unused=True)
            if h is not None and not entropy_gradient:
                raise ValueError("the token loss depends on the entropy; say entropy_gradient=True")
            losses.append(loss.detach())
            return torch.zeros_like(logprob) if g is None else g, h

        result = passes.one_pass(head, token_gradient, gradients, entropy_gradient=entropy_gradient)
        ctx.save_for_backward(gradients.hidden, gradients.weight())
        logprob, entropy = result
        ctx.mark_non_differentiable(logprob, entropy)
        return torch.stack(losses).sum(), logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        explanation = (
            "the gradients of one pass are formed in forward, for an upstream gradient of 1; "
            "scale inside the token loss, or the gradients afterwards"
        )
        if upstream.device.type != "cpu":
            torch._assert_async(upstream == 1.0, explanation)  # without waiting for the device
        elif upstream.item() != 1.0:
            raise RuntimeError(f"upstream gradient {upstream.item()}: {explanation}")
        return *ctx.saved_tensors, None, None, None, None


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, shards: int, vocab_size: int) -> None:
    """Refuse what cannot be right, naming it."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "selected_logprobs needs hidden [N, H] and weight [V_local, H], "
            f"not {list(hidden.shape)} and {list(weight.shape)}"
        )
    if hidden.dtype != weight.dtype or not hidden.dtype.is_floating_point:
        raise ValueError(
            f"hidden is {hidden.dtype} but weight is {weight.dtype}; cast one of them first"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets must be int64 of shape [{hidden.shape[0]}], one per row of hidden, "
            f"not {targets.dtype} of {list(targets.shape)}"
        )
    if not 0 < vocab_size <= shards * weight.shape[0]:
        raise ValueError(
            f"the LM head has {shards} shards x {weight.shape[0]} rows = "
            f"{shards * weight.shape[0]}, fewer than the vocabulary of {vocab_size}; "
            "pad the head up to a multiple of the tensor parallel size"
        )
    if targets.device.type == "cpu" and targets.numel():
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"target id {low if low < 0 else high} lies outside the vocabulary of "
                f"{vocab_size}; do tokenizer and checkpoint belong together?"
            )
