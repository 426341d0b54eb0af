"""The policy for the trainer: build, update, score, publish. One object per rank; all ranks make the same calls."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from agpo_megatron.algorithm.gate import Gate, LossNotFinite, PartSum, gate_of, on_policy_parts
from agpo_megatron.algorithm.limits import Limit, broken, not_finite
from agpo_megatron.algorithm.loss import check_rows
from agpo_megatron.algorithm.loss_metrics import MAXIMA, SUMS, loss_metrics
from agpo_megatron.algorithm.settings import LossSettings, WhenClipped
from agpo_megatron.config.run_folder import is_converted
from agpo_megatron.config.schema import PolicyConfig, TrainConfig
from agpo_megatron.conversion.hf_checkpoint import HfCheckpoint, read_config
from agpo_megatron.conversion.weight_map import WeightMap
from agpo_megatron.policy import backend, parallel, step, weights
from agpo_megatron.policy.model import build_chunks, transformer_config, wrap_chunks
from agpo_megatron.policy.optimizer import build_optimizer, clear_state, set_rates
from agpo_megatron.policy.packing import PackedBatch, pack_all, pack_multiple, sequence_multiple
from agpo_megatron.policy.parallel import Layout
from agpo_megatron.policy.stored_reader import StoredCheckpoint, StoredModel
from agpo_megatron.samples import Floats, TrainSequence, group_of

MicroBatches = Sequence[Sequence[TrainSequence]]


@dataclass(frozen=True)
class Score:
    """Scores of one sequence. ``logprobs``: of each token given those before it, aligned with the tokens (entry 0 is
    0.0) if every token was scored, else of the trained tokens in order; ``entropy``: mean over scored tokens, nats."""

    logprobs: Floats
    entropy: float


class Policy:
    """A Megatron model with its optimizer in one layout, built by ``Policy.build``."""

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
        self._reference: list[list[Tensor]] | None = None

    @staticmethod
    def build(
        model: str | os.PathLike[str],
        policy: PolicyConfig,
        train: TrainConfig,
        *,
        temperature: float,
        seed: int,
        timeout: float = 1800.0,
    ) -> Policy:
        """Build the policy of the architecture of ``model``, a folder of Hugging Face or of ``to-megatron``, with its
        weights. ``backend.activate()`` must have run; ``parallel.initialize`` runs here unless it has. ``timeout``:
        limit of every collective, seconds.

        Raises ConversionError and CheckpointError (the folder), ModelError (sizes), LayoutError (ranks), each naming
        cause and fix.
        """
        source = opened(Path(model))
        weight_map = source.weights if isinstance(source, StoredModel) else source.weight_map()
        layout = parallel.initialize(policy, seed, timeout=timeout)
        head = step.HeadSettings(
            weight_map.shape.vocab_size, temperature, policy.logprob_chunk, policy.logprob_kernels
        )
        built = Policy(policy, train, weight_map, head, layout)
        built.load_initial(model)
        return built

    def update(
        self,
        micro_batches: MicroBatches,
        *,
        loss: LossSettings,
        lr: float,
        limits: Sequence[Limit] = (),
        hold: bool = False,
    ) -> dict[str, float]:
        """Take one optimizer step on this DP replica's ``micro_batches`` (the same on its TP and PP ranks).

        Replicas may have different numbers of them, or none: fillers of weight 0 make up the difference.

        The adaptive part acts on the whole step, exactly, in every layout. It is decided before anything is computed
        (eq. 1c), and its gain is folded into the weights of the policy loss alone; if all gains are 0 and nothing else
        has gradients, forward and backward are not run. With ``clip.on: total`` the gradient is scaled by the gain
        before it is clipped. At a gain of 0 the optimizer steps on a zero gradient (``step``: moments decay, weights
        still move) or not (``skip_step``).

        Returns global statistics, the same on every rank: those of ``algorithm.loss.loss_metrics``, and grad_norm.
        The optimizer step is not taken, and ``skipped`` is 1, if loss or gradient norm are not finite, if they break
        one of ``limits``, or with ``hold``: weights, moments and the optimizer's count of steps are then as they were.
        """
        batches = self._pack(micro_batches, every_token=False)
        for batch in batches:
            check_rows(loss, batch.loss)
        with self.backend.scope():
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            try:
                metrics, gain = self._pass(batches, micro_batches, loss)
            except LossNotFinite:  # on every rank: each has the same sums
                return {"loss/policy": math.nan, "loss/unclipped": math.nan, "skipped": 1.0}
            return self._step(metrics, gain, lr, loss.clip.when_clipped, limits, hold)

    def _pass(
        self, batches: list[PackedBatch], micro_batches: MicroBatches, loss: LossSettings
    ) -> tuple[dict[str, float], float]:
        """Compute the gradient of the step. Returns its statistics and the gain still to be applied.

        Raises LossNotFinite where a gate cannot be decided.
        """
        gate = self._gate(micro_batches, loss)
        if gate is not None:
            if not any(gate.gains.values()) and not loss.has_other_terms:  # the gradient is 0
                metrics = {
                    "loss/policy": gate.value,
                    "loss/unclipped": gate.loss,
                    **({"loss/clip_gate": 0.0} if gate.gains else {}),
                    "tokens/trained": 0.0,
                }
                return metrics, 0.0
            batches = [_with_gains(batch, gate) for batch in batches]
        results = step.run_training(self.chunks, self.layout, batches, self.head, loss)
        return loss_metrics(loss, self._reduce(results), gate)

    def _gate(self, micro_batches: MicroBatches, loss: LossSettings) -> Gate | None:
        """Return the gate of the step, the same on every rank; None if it acts within packs, later, or not at all."""
        if not loss.gate_needs_the_step or loss.clip.on == "total":
            return None
        mine: dict[str, PartSum] = {}
        if self.layout.speaks_for_replica:
            mine = on_policy_parts(s for batch in micro_batches for s in batch)
        everyones: list[Any] = [None] * self.layout.world
        dist.all_gather_object(everyones, mine, group=self.layout.control_group)
        return gate_of(loss, everyones)

    def keep_reference(self) -> None:
        """Copy the current weights to the host as the reference policy of a KL term."""
        self._reference = [
            [parameter.detach().to("cpu", copy=True) for parameter in chunk.parameters()]
            for chunk in self.chunks
        ]

    @contextmanager
    def reference_weights(self) -> Iterator[None]:
        """Give the policy the weights of ``keep_reference`` inside the context, for scoring; afterwards its own again,
        bit for bit. Raises RuntimeError when there are none."""
        if self._reference is None:
            raise RuntimeError("no reference weights are kept; set algorithm.loss.kl.coef")
        parameters = [p for chunk in self.chunks for p in chunk.parameters()]
        reference = [p for chunk in self._reference for p in chunk]
        own = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
        with torch.no_grad():
            for parameter, value in zip(parameters, reference, strict=True):
                parameter.copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, own, strict=True):
                    parameter.copy_(value)

    def score(
        self,
        micro_batches: MicroBatches,
        *,
        temperature: float | None = None,
        every_token: bool = True,
    ) -> dict[str, Score]:
        """Return log-probs and entropy of all replicas' sequences under the current weights, on rank 0 (an empty dict
        elsewhere). Sample ids must be unique. ``temperature``: that of rollouts by default. ``every_token``: if false,
        only trained tokens are scored, and their log-probs follow one another without gaps."""
        batches = self._pack(micro_batches, every_token=every_token)
        with self.backend.scope():
            head = self.head if temperature is None else replace(self.head, temperature=temperature)
            results = step.run_scoring(self.chunks, self.layout, batches, head)
        local: list[tuple[str, Tensor, float]] = []
        if self.layout.speaks_for_replica:
            for batch, result in zip(batches, results, strict=True):
                logprob, entropy = result["logprob"].cpu(), result["entropy"].double().cpu()
                for span in batch.spans:
                    part = slice(span.start, span.stop)
                    mean = float(entropy[part].mean()) if span.stop > span.start else 0.0
                    found = logprob[part].float()
                    padded = torch.cat([torch.zeros(1), found]) if every_token else found.clone()
                    local.append((span.sample_id, padded, mean))
        gathered: list[Any] | None = [None] * self.layout.world if self.layout.rank == 0 else None
        dist.gather_object(local, gathered, dst=0, group=self.layout.control_group)
        return {
            sample: Score(logprobs.numpy(), entropy)
            for part in gathered or []
            for sample, logprobs, entropy in part
        }

    def named_hf_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield this stage's weights as full Hugging Face tensors, on its TP0 rank of DP0, in publishing order.

        Every rank must exhaust the iterator. See ``weights.named_hf_tensors``.
        """
        # no scope: it would stay open in the consumer between two tensors
        yield from weights.named_hf_tensors(self.chunks, self.weight_map, self.layout)

    def named_hf_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the gradients of the last update, like ``named_hf_tensors``. See ``weights.named_hf_gradients``."""
        yield from weights.named_hf_gradients(self.chunks, self.weight_map, self.layout)

    def _pack(
        self,
        micro_batches: MicroBatches,
        *,
        every_token: bool,
    ) -> list[PackedBatch]:
        """Pack this replica's micro-batches, as many as the largest replica has; a multiple of PP when interleaved."""
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
        )

    def _reduce(self, results: list[dict[str, Tensor]]) -> dict[str, float]:
        """Return the statistics of the whole step on every rank; one rank of each replica's last stage contributes."""
        names = [*SUMS, *MAXIMA]
        mine = torch.zeros(len(names), dtype=torch.float64)
        if results and self.layout.speaks_for_replica:
            stacked = torch.stack([torch.stack([r[n] for n in names]) for r in results]).cpu()
            mine[: len(SUMS)] = stacked[:, : len(SUMS)].sum(0)
            mine[len(SUMS) :] = stacked[:, len(SUMS) :].amax(0)
        parts = [torch.empty_like(mine) for _ in range(self.layout.world)]
        # A gather, not a reduction: all ranks add the same numbers in the same order and take the same decision.
        dist.all_gather(parts, mine, group=self.layout.control_group)
        every = torch.stack(parts)
        sums, maxima = every[:, : len(SUMS)].sum(0), every[:, len(SUMS) :].amax(0)
        values = [*sums.tolist(), *maxima.tolist()]
        return dict(zip(names, values, strict=True))

    def _step(
        self,
        metrics: dict[str, float],
        gain: float,
        lr: float,
        when_clipped: WhenClipped,
        limits: Sequence[Limit],
        hold: bool,
    ) -> dict[str, float]:
        """Scale gradients by the gain, clip, step, unless something forbids it. Returns ``metrics`` with the gradient
        norm after the gain."""
        metrics["grad_norm"] = 0.0
        closed = gain == 0.0 and when_clipped == "skip_step"
        if not closed:
            if gain != 1.0:
                for chunk in self.chunks:
                    chunk.scale_gradients(gain)
            metrics["grad_norm"] = self._gradient_norm()
        if hold or not_finite(metrics) or broken(limits, metrics):
            metrics["skipped"] = 1.0
        elif not closed:
            set_rates(self.optimizer, lr, self.train.weight_decay)
            self.optimizer.step()
        return metrics

    def _gradient_norm(self) -> float:
        """Return the global gradient norm, before the optimizer has touched anything: Megatron's, which is infinite
        from about 2e19 on (fp32 squares). Not finite on every rank if it is on any."""
        self.optimizer.prepare_grads()  # no loss scaler, so it finds no infinities itself
        mine = torch.tensor([float(self.optimizer.get_grad_norm() or 0.0)], dtype=torch.float64)
        every = [torch.empty_like(mine) for _ in range(self.layout.world)]
        dist.all_gather(every, mine, group=self.layout.control_group)
        norms = torch.cat(every)
        return float(norms[0]) if norms.isfinite().all() else float(norms.sum())

    def load_initial(self, model: str | os.PathLike[str]) -> None:
        """Take the weights of ``model``, a folder of either kind, and begin the optimizer anew.

        Raises ConversionError, CheckpointError.
        """
        source = opened(Path(model))
        with self.backend.scope():
            if isinstance(source, StoredModel):
                # The ranks share the work; the controller waits for all, so one that finds damage ends the run.
                source.source.check_files(1, slice(self.layout.rank, None, self.layout.world))
                weights.load_stored(self.chunks, source, self.layout)
            else:
                weights.load_hf(self.chunks, self.weight_map, source, self.layout)
            self.optimizer.reload_model_params()  # its own fp32 copies
            clear_state(self.optimizer)


def opened(model: Path) -> HfCheckpoint | StoredModel:
    """Open the folder of a model. Raises ConversionError, CheckpointError."""
    if is_converted(model):
        return StoredModel(StoredCheckpoint(model), WeightMap(read_config(model)))
    return HfCheckpoint(model)


def _with_gains(batch: PackedBatch, gate: Gate) -> PackedBatch:
    """Fold the gain of each sequence's group into the pack."""
    groups = [group_of(span.sample_id) for span in batch.spans]
    gains = torch.tensor([gate.gains.get(group, 1.0) for group in groups], dtype=torch.float32)
    return replace(batch, loss=replace(batch.loss, gains=gains))
