"""Bugs that other trainers have shipped, planted in the ranks for a moment: each must turn the matrix red."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch


@contextmanager
def division_by_micro_batches() -> Iterator[None]:
    """Megatron's own loss scale: 1 / (micro-batches x DP)."""
    from agpo_megatron.policy import policy

    make = policy.transformer_config

    def averaged(*arguments: Any) -> Any:
        return replace(make(*arguments), calculate_per_token_loss=False)

    with patch.object(policy, "transformer_config", averaged):
        yield


@contextmanager
def two_passes() -> Iterator[None]:
    """For bugs on the way back to the log-probs: the one pass has formed its gradients before."""
    from agpo_megatron.policy import step

    with patch.object(step, "row_loss", lambda *_: None):
        yield


@contextmanager
def division_in_two_passes() -> Iterator[None]:
    with two_passes(), division_by_micro_batches():
        yield


@contextmanager
def norms_not_summed_over_tp() -> Iterator[None]:
    """Norm weights without the mark of sequence parallelism keep the gradient of their own part of the tokens."""
    from agpo_megatron.policy.attention import SequenceParallelRMSNorm

    make = SequenceParallelRMSNorm.__init__

    def unmarked(self: Any, *arguments: Any, **keywords: Any) -> None:
        make(self, *arguments, **keywords)
        self.weight.sequence_parallel = False

    with patch.object(SequenceParallelRMSNorm, "__init__", unmarked):
        yield


@contextmanager
def labels_shifted_after_the_split() -> Iterator[None]:
    """Each context-parallel rank takes the next of its own tokens for the target, also at the end of a chunk."""
    from agpo_megatron.policy import step

    make = step.share_of

    def shifted(*arguments: Any) -> Any:
        share = make(*arguments)
        return replace(share, targets=share.tokens.roll(-1)[share.rows])

    with patch.object(step, "share_of", shifted):
        yield


@contextmanager
def loss_divided_by_cp() -> Iterator[None]:
    """The factor that averaging over context-parallel ranks takes away."""
    from agpo_megatron.policy import context

    backward = context._GatherRows.backward

    def divided(ctx: Any, *grads: Any) -> Any:
        return tuple(g if g is None else g / 2 for g in backward(ctx, *grads))

    with two_passes(), patch.object(context._GatherRows, "backward", staticmethod(divided)):
        yield


@contextmanager
def keys_without_the_other_ranks_queries() -> Iterator[None]:
    """Gradients of keys and values from the rank's own queries alone."""
    from agpo_megatron.policy import context

    def alone(ctx: Any, grad: Any) -> Any:
        (own,) = ctx.saved_tensors
        return grad.index_select(0, own), None, None, None

    with patch.object(context._GatherTokens, "backward", staticmethod(alone)):
        yield
