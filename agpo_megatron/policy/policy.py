"""The policy as the trainer sees it: build, update, score, load, publish. One object per rank, same calls on all."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from agpo_megatron.algorithm.adaptive_loss import clip_gate, clipped_value
from agpo_megatron.config.schema import PolicyConfig, TrainConfig
from agpo_megatron.conversion.hf_checkpoint import HfCheckpoint
from agpo_megatron.conversion.weight_map import WeightMap
from agpo_megatron.policy import backend, parallel, step, weights
from agpo_megatron.policy.model import build_chunks, transformer_config, wrap_chunks
from agpo_megatron.policy.optimizer import build_optimizer, set_rates
from agpo_megatron.policy.packing import PackedBatch, pack_all, pack_multiple, sequence_multiple
from agpo_megatron.policy.parallel import Layout
from agpo_megatron.types import TrainSequence

logger = logging.getLogger(__name__)

MicroBatches = Sequence[Sequence[TrainSequence]]


@dataclass(frozen=True)
class Score:
    """``logprobs``: of each token given those before it, aligned with the tokens (entry 0 is 0.0); ``entropy``: mean
    over the scored positions, in nats."""

    logprobs: list[float]
    entropy: float


class Policy:
    """A Megatron model with its optimizer in one layout. Build with ``Policy.build``."""

    def __init__(
        self,
        config: PolicyConfig,
        train: TrainConfig,
        weight_map: WeightMap,
        head: step.HeadSettings,
        layout: Layout,
    ) -> None:
        self.config, self.train, self.weight_map, self.head = config, train, weight_map, head
        self.layout = layout
        self.backend = backend.current()
        with self.backend.scope():
            settings = transformer_config(weight_map.shape, config)
            settings.finalize_model_grads_func = step.sum_only_gradients
            chunks = build_chunks(weight_map.shape, settings, layout)
            self.chunks: list[Any] = list(wrap_chunks(chunks, settings, config))
            self.optimizer: Any = build_optimizer(self.chunks, config, train)

    @staticmethod
    def build(
        hf_dir: str | os.PathLike[str],
        policy: PolicyConfig,
        train: TrainConfig,
        *,
        temperature: float,
        seed: int,
        timeout: float = 1800.0,
    ) -> Policy:
        """The policy of ``hf_dir``'s architecture with its weights. ``backend.activate()`` must have run;
        ``parallel.initialize`` runs here unless it has. ``timeout``: seconds, of every collective.

        Raises ConversionError (checkpoint), ModelError (sizes), LayoutError (ranks), each naming cause and fix.
        """
        source = HfCheckpoint(Path(hf_dir))
        weight_map = source.weight_map()
        layout = parallel.initialize(policy, seed, timeout=timeout)
        head = step.HeadSettings(weight_map.shape.vocab_size, temperature, policy.logprob_chunk)
        built = Policy(policy, train, weight_map, head, layout)
        with built.backend.scope():
            weights.load_hf(built.chunks, weight_map, source, layout)
            built.optimizer.reload_model_params()  # its own fp32 copies
        return built

    def update(
        self,
        micro_batches: MicroBatches,
        *,
        loss: Literal["ppo", "nll"],
        lr: float,
        clip_low: float = 0.2,
        clip_high: float = 0.28,
        gate_min: float | None = None,
        when_clipped: Literal["step", "skip_step"] = "step",
        old_logprobs: Mapping[str, Sequence[float]] | None = None,
    ) -> dict[str, float]:
        """One optimizer step on this DP replica's ``micro_batches`` (the same on its TP and PP ranks).

        Replicas may have different numbers of them, or none: fillers of weight 0 make up the difference.
        ``old_logprobs``: by sample id, aligned with the tokens; None means on-policy (ratio 1).
        ``gate_min``: lower bound of the loss of the whole step (AGPO v3); at or below it the gradient is multiplied by
        0, and the optimizer steps on it (``step``: moments decay, weights still move) or not (``skip_step``).

        Returns global statistics, the same on every rank: loss/policy, loss/unclipped, loss/clip_gate, policy/entropy,
        grad_norm, tokens/trained; for the loss "ppo" policy/ratio_mean, policy/clip_frac; where rollout log-probs of
        trained tokens are known rollout/logprob_abs_diff_mean, rollout/logprob_abs_diff_max.
        Raises ValueError for a loss, FloatingPointError for a gradient norm that is not finite: the weights of this
        process are then unusable.
        """
        batches = self._pack(micro_batches, every_token=False, old_logprobs=old_logprobs)
        with self.backend.scope():
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            settings = step.LossSettings(loss, clip_low, clip_high)
            results = step.run_training(self.chunks, self.layout, batches, self.head, settings)
            totals = self._reduce(results)
            value, gate = totals["loss"], 1.0
            if gate_min is not None:
                gate = clip_gate(value, gate_min, totals["scale"])
                value = clipped_value(value, gate_min, totals["scale"])
            grad_norm = self._step(gate, lr, when_clipped)
        return {
            "loss/policy": value,
            "loss/unclipped": totals["loss"],
            "loss/clip_gate": gate,
            "grad_norm": grad_norm,
            "tokens/trained": totals["tokens"],
            **_token_means(totals, ratios=loss == "ppo"),
        }

    def score(
        self, micro_batches: MicroBatches, *, temperature: float | None = None
    ) -> dict[str, Score]:
        """Log-probs and entropy of every token under the current weights, of all replicas' sequences, on rank 0 (an
        empty dict elsewhere). Sample ids must be unique. ``temperature``: that of rollouts by default."""
        batches = self._pack(micro_batches, every_token=True, old_logprobs=None)
        with self.backend.scope():
            head = self.head if temperature is None else replace(self.head, temperature=temperature)
            results = step.run_scoring(self.chunks, self.layout, batches, head)
        local: list[tuple[str, Tensor, float]] = []
        if self.layout.last_stage and self.layout.tp_rank == 0 and self.layout.cp_rank == 0:
            for batch, result in zip(batches, results, strict=True):
                logprob, entropy = result["logprob"].cpu(), result["entropy"].double().cpu()
                for span in batch.spans:
                    part = slice(span.start, span.stop)
                    mean = float(entropy[part].mean()) if span.stop > span.start else 0.0
                    local.append((span.sample_id, logprob[part].clone(), mean))
        gathered: list[Any] | None = [None] * self.layout.world if self.layout.rank == 0 else None
        dist.gather_object(local, gathered, dst=0, group=self.layout.control_group)
        return {
            sample: Score([0.0, *logprobs.tolist()], entropy)
            for part in gathered or []
            for sample, logprobs, entropy in part
        }

    def named_hf_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """This stage's weights as full Hugging Face tensors, on its TP0 rank of DP0, in publishing order.

        Every rank must exhaust the iterator. See ``weights.named_hf_tensors``.
        """
        # no scope: it would stay open in the consumer between two tensors
        yield from weights.named_hf_tensors(self.chunks, self.weight_map, self.layout)

    def named_hf_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The gradients of the last update, as ``named_hf_tensors``. See ``weights.named_hf_gradients``."""
        yield from weights.named_hf_gradients(self.chunks, self.weight_map, self.layout)

    def _pack(
        self,
        micro_batches: MicroBatches,
        *,
        every_token: bool,
        old_logprobs: Mapping[str, Sequence[float]] | None,
    ) -> list[PackedBatch]:
        """Packs of this replica, as many as the replica with the most has; a multiple of PP when interleaved."""
        count = torch.tensor([max(len(micro_batches), 1)])
        dist.all_reduce(count, op=dist.ReduceOp.MAX, group=self.layout.control_group)
        total = int(count)
        interleaved = self.layout.vpp > 1
        if interleaved:
            total = -(-total // self.layout.pp) * self.layout.pp
        return pack_all(
            micro_batches,
            pack_multiple(self.config),
            total,
            each=sequence_multiple(self.config),
            same_length=interleaved,
            every_token=every_token,
            old_logprobs=old_logprobs,
        )

    def _reduce(self, results: list[dict[str, Tensor]]) -> dict[str, float]:
        """Statistics of the whole step on every rank: one rank of each replica's last stage contributes."""
        names = [*step.SUMS, "rollout_diff_max"]
        mine = torch.zeros(len(names), dtype=torch.float64)
        if results and self.layout.tp_rank == 0 and self.layout.cp_rank == 0:
            stacked = torch.stack([torch.stack([r[n] for n in names]) for r in results]).cpu()
            mine[:-1] = stacked[:, :-1].sum(0)
            mine[-1] = stacked[:, -1].max()
        parts = [torch.empty_like(mine) for _ in range(self.layout.world)]
        # A gather, not a reduction: all ranks add the same numbers in the same order and take the same decision.
        dist.all_gather(parts, mine, group=self.layout.control_group)
        every = torch.stack(parts)
        values = [*every[:, :-1].sum(0).tolist(), float(every[:, -1].max())]
        return dict(zip(names, values, strict=True))

    def _step(self, gate: float, lr: float, when_clipped: Literal["step", "skip_step"]) -> float:
        """Gate, clip, step. Returns the gradient norm after the gate."""
        if gate == 0.0 and when_clipped == "skip_step":
            return 0.0
        if gate != 1.0:
            for chunk in self.chunks:
                chunk.scale_gradients(gate)
        set_rates(self.optimizer, lr, self.train.weight_decay)
        _, grad_norm, _ = self.optimizer.step()
        norm = float(grad_norm or 0.0)
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"gradient norm is {norm}; the weights of this process are unusable, resume from the last checkpoint"
            )
        return norm


def _token_means(totals: Mapping[str, float], *, ratios: bool) -> dict[str, float]:
    """Means over the trained tokens of a step; of those with a known rollout log-prob if there are any."""
    tokens, known = max(totals["tokens"], 1.0), totals["rollout_tokens"]
    means = {"policy/entropy": totals["entropy"] / tokens}
    if ratios:
        means["policy/ratio_mean"] = totals["ratio"] / tokens
        means["policy/clip_frac"] = totals["clipped"] / tokens
    if known:
        means["rollout/logprob_abs_diff_mean"] = totals["rollout_diff"] / known
        means["rollout/logprob_abs_diff_max"] = totals["rollout_diff_max"]
    return means
