"""Memory of a trainer rank, in bytes, computed from the shape of the model and the layout, without megatron or a GPU.

Parameters are exact (a test compares them with Megatron's own, built for each rank of each configuration). Activations
are the tensors that backward needs, as the layers of Transformer Engine keep them with flash attention: no dropout, no
copies that an allocator adds. Nothing here has been compared with a GPU yet; tests/gpu, stage b, does that.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

from agpo_megatron.config.schema import PolicyConfig
from agpo_megatron.conversion.cutting import padded_vocabulary
from agpo_megatron.conversion.shape import ModelShape


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the rank of a pipeline stage that holds most. ``fp8``: quantised copies of the weights, by row and by
    column, kept for all micro-batches of a step. ``head``: logits of a chunk of rows."""

    weights: int
    gradients: int
    optimizer: int
    fp8: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        return sum(astuple(self))

    def __str__(self) -> str:
        """One line in GB (10^9 bytes), as the configurations quote it."""
        parts = [f"{name} {value / 1e9:.1f}" for name, value in vars(self).items() if value]
        return f"{' + '.join(parts)} = {self.total / 1e9:.1f} GB"


def layer_weights(shape: ModelShape, policy: PolicyConfig) -> dict[str, tuple[int, int]]:
    """Matrices of one layer on one tensor-parallel rank, (rows, columns) by Megatron's names; of one expert where the
    layer has experts. Rows are outputs."""
    tp = policy.tensor_parallel
    groups = max(shape.kv_heads // tp, 1)  # a rank that has less than one group gets a copy
    queries = shape.heads // tp * shape.head_dim
    ffn = (shape.experts.ffn if shape.experts else shape.ffn) // tp
    return {
        "linear_qkv": (queries + 2 * groups * shape.head_dim, shape.hidden),
        "linear_proj": (shape.hidden, queries),
        "linear_fc1": (2 * ffn, shape.hidden),
        "linear_fc2": (shape.hidden, ffn),
    }


def layer_parameters(shape: ModelShape, policy: PolicyConfig) -> tuple[int, int]:
    """Parameters of one layer on one rank: those of its own, and those of the experts that it holds."""
    sizes = {name: math.prod(size) for name, size in layer_weights(shape, policy).items()}
    ffn = sizes["linear_fc1"] + sizes["linear_fc2"]
    own = sizes["linear_qkv"] + sizes["linear_proj"] + 2 * shape.hidden
    if shape.qkv_bias:
        own += layer_weights(shape, policy)["linear_qkv"][0]
    if shape.qk_norm:
        own += 2 * shape.head_dim
    if shape.experts is None:
        return own + ffn, 0
    router = shape.experts.count * shape.hidden
    return own + router, shape.experts.count // policy.expert_parallel * ffn


def _matrices(shape: ModelShape, policy: PolicyConfig) -> int:
    """Elements of the matrices of one layer on one rank, all its experts included."""
    sizes = {name: math.prod(size) for name, size in layer_weights(shape, policy).items()}
    copies = shape.experts.count // policy.expert_parallel if shape.experts else 1
    attention = sizes["linear_qkv"] + sizes["linear_proj"]
    return attention + copies * (sizes["linear_fc1"] + sizes["linear_fc2"])


def stage_parameters(shape: ModelShape, policy: PolicyConfig, stage: int) -> tuple[int, int]:
    """Parameters of a rank of pipeline stage ``stage``: those of its own, and those of the experts that it holds."""
    layers = shape.layers // policy.pipeline_parallel
    own, experts = (layers * n for n in layer_parameters(shape, policy))
    table = padded_vocabulary(shape.vocab_size, policy.tensor_parallel) // policy.tensor_parallel
    first, last = stage == 0, stage == policy.pipeline_parallel - 1
    if first:
        own += table * shape.hidden
    if last:
        own += shape.hidden  # the norm after the layers
        if not (shape.tied and first):
            own += table * shape.hidden
    return own, experts


def layer_activations(shape: ModelShape, policy: PolicyConfig) -> tuple[float, float]:
    """Bytes for each token of a pack: what one layer keeps for its backward without recomputation, and its input alone,
    which is all that full recomputation keeps. Experts count as often as a token visits one."""
    item = 2 if policy.dtype == "bf16" else 4
    tp = policy.tensor_parallel
    along = tp if policy.sequence_parallel else 1  # what lies between tensor-parallel regions
    heads = shape.heads * shape.head_dim
    kv = 2 * max(shape.kv_heads, tp) * shape.head_dim
    ffn = shape.experts.ffn * shape.experts.per_token if shape.experts else shape.ffn
    # Inputs of two norms and of the two matmuls behind them; q, k, v; the attention's output and its log-sum-exp; both
    # halves of the gated unit, and their product.
    between = 4 * shape.hidden * item / along
    within = (heads + kv + heads + 3 * ffn) * item / tp + 4 * shape.heads / tp
    cp = policy.context_parallel
    return (between + within) / cp, shape.hidden * item / along / cp


def rank_memory(shape: ModelShape, policy: PolicyConfig, tokens: int) -> RankMemory:
    """The fullest rank of the layout, with micro-batches of ``tokens`` tokens.

    1F1B keeps as many micro-batches in flight on a stage as there are stages from it to the last (an interleaved
    schedule keeps somewhat more on the first, which is not counted).
    """
    stages = range(policy.pipeline_parallel)
    return max((_stage_memory(shape, policy, tokens, s) for s in stages), key=lambda m: m.total)


def _stage_memory(shape: ModelShape, policy: PolicyConfig, tokens: int, stage: int) -> RankMemory:
    own, experts = stage_parameters(shape, policy, stage)
    layers = shape.layers // policy.pipeline_parallel
    item = 2 if policy.dtype == "bf16" else 4
    # fp32 weights are their own master copy.
    state = 12 if policy.dtype == "bf16" else 8
    replicas = policy.data_parallel * policy.context_parallel
    shards = (replicas, replicas // policy.expert_parallel)
    if not policy.distributed_optimizer:
        shards = (1, 1)
    fp8 = 2 * layers * _matrices(shape, policy) if policy.fp8.recipe != "none" else 0
    whole, entry = layer_activations(shape, policy)
    flying = policy.pipeline_parallel - stage
    kept = tokens * layers * flying * (entry if policy.recompute == "full" else whole)
    if policy.recompute == "full":
        kept += tokens * whole  # the layer that is being recomputed
    head = 0
    if stage == policy.pipeline_parallel - 1:
        columns = padded_vocabulary(shape.vocab_size, policy.tensor_parallel)
        head = policy.logprob_chunk * columns // policy.tensor_parallel * 4
    return RankMemory(
        weights=item * (own + experts),
        gradients=4 * (own + experts),
        optimizer=state * own // shards[0] + state * experts // shards[1],
        fp8=fp8,
        activations=round(kept),
        head=head,
    )
