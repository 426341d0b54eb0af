"""One pass of all micro-batches through Megatron's pipeline schedule, with the loss at its end.

GPTModel does not apply the LM head itself: it passes its final hidden states to ``output_processor``, here ``_Head``,
which keeps the trained rows and computes their log-probs without materialising all logits. Token losses are summed with
the weights of the batch, without a later division (design, idea 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from agpo_megatron.algorithm.loss import micro_batch_loss, row_loss
from agpo_megatron.algorithm.settings import LossSettings
from agpo_megatron.logprob.fused import selected_logprobs
from agpo_megatron.logprob.projection import Kernels
from agpo_megatron.logprob.rows import select_rows
from agpo_megatron.policy import backend
from agpo_megatron.policy.attention import PackedSequences, transformer_engine_params
from agpo_megatron.policy.context import Share, share_of
from agpo_megatron.policy.packing import PackedBatch
from agpo_megatron.policy.parallel import Layout


@dataclass(frozen=True)
class HeadSettings:
    """Settings of the log-prob computation. ``vocab_size``: real vocabulary; ``chunk``: rows of logits held at once."""

    vocab_size: int
    temperature: float
    chunk: int
    kernels: Kernels = "auto"


def sum_only_gradients(model: list[Any], num_tokens: Tensor | None, **keywords: Any) -> None:
    """Synchronise gradients as Megatron does, but without dividing by a token count (it is clamped to 1, so it would
    change nothing, at the cost of two collectives and a pass over all gradients)."""
    finalize_model_grads(model, None, **keywords)


def run_training(
    chunks: Sequence[Any],
    layout: Layout,
    batches: Sequence[PackedBatch],
    head: HeadSettings,
    loss: LossSettings,
) -> list[dict[str, Tensor]]:
    """Run forward and backward of all ``batches``; gradients are summed into the buffers and over DP and CP.

    Returns, on the last pipeline stage, per micro-batch the ``SUMS`` and ``MAXIMA`` of algorithm.loss (fp64 scalars);
    elsewhere an empty list.
    """
    return _run(chunks, layout, batches, _Head(layout, head, loss), forward_only=False)


def run_scoring(
    chunks: Sequence[Any], layout: Layout, batches: Sequence[PackedBatch], head: HeadSettings
) -> list[dict[str, Tensor]]:
    """Run forward without autograd. Returns, on the last stage, per micro-batch ``logprob``, ``entropy`` [N]."""
    with torch.no_grad():
        return _run(chunks, layout, batches, _Head(layout, head, None), forward_only=True)


def _run(
    chunks: Sequence[Any],
    layout: Layout,
    batches: Sequence[PackedBatch],
    head: _Head,
    *,
    forward_only: bool,
) -> list[dict[str, Tensor]]:
    device = backend.current().device
    on_device = [batch.to(device) for batch in batches]
    shares = [share_of(batch, layout.cp_group) for batch in on_device]
    packs = [_packed_params(b, share) for b, share in zip(on_device, shares, strict=True)]

    def forward(data: Iterator[int], model: Any) -> tuple[Tensor, Any]:
        index = next(data)
        share = shares[index]
        output = model(
            share.tokens[None],
            share.positions[None],
            None,
            packed_seq_params=packs[index],
            output_processor=head,
            output_processor_context=(on_device[index], share),
        )
        return output, head.result

    iterators = [iter(range(len(batches))) for _ in chunks]
    single = len(chunks) == 1
    results: list[dict[str, Tensor]] = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iterators[0] if single else iterators,
        model=chunks[0] if single else list(chunks),
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.numel(),
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return results


def _packed_params(batch: PackedBatch, share: Share) -> Any:
    if backend.current().transformer_engine:
        return transformer_engine_params(batch.lengths, batch.tokens.device)
    return PackedSequences.of(share, batch.lengths)


class _Head:
    """The ``output_processor``: from hidden states to the loss of a micro-batch, or to its log-probs when scoring."""

    def __init__(self, layout: Layout, head: HeadSettings, loss: LossSettings | None) -> None:
        self.layout, self.head, self.loss = layout, head, loss
        self.stats: dict[str, Tensor] = {}

    def __call__(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        context: tuple[PackedBatch, Share],
        **_: Any,
    ) -> Tensor:
        """Map ``hidden_states`` [T / CP, 1, H] ([T / CP / TP, 1, H] under sequence parallelism) to a scalar."""
        batch, share = context
        weight = output_layer.weight if output_weight is None else output_weight
        group = self.layout.tp_group if self.layout.tp > 1 else None
        one_pass = row_loss(self.loss, share.own(batch.loss)) if self.loss else None
        result = selected_logprobs(
            select_rows(
                hidden_states.squeeze(1),
                share.rows,
                group=group,
                sequence_parallel=output_layer.sequence_parallel,
            ),
            weight,
            share.targets,
            group=group,
            vocab_size=self.head.vocab_size,
            temperature=self.head.temperature,
            chunk=self.head.chunk,
            token_loss=one_pass,
            entropy_gradient=self.loss is not None and self.loss.entropy.coef > 0,
            kernels=self.head.kernels,
        )
        logprob, entropy = share.whole(result.logprob, result.entropy)
        if self.loss is None:
            self.stats = {"logprob": logprob, "entropy": entropy}
            return logprob.sum()
        loss, self.stats = micro_batch_loss(self.loss, logprob, entropy, batch.loss)
        return loss if result.loss is None else result.loss

    def result(self, loss: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return (sum of w l, 0 tokens, statistics) as Megatron's loss function; 0 tokens: nothing is divided."""
        stats, self.stats = self.stats, {}
        return loss, torch.zeros((), dtype=torch.int, device=loss.device), stats
