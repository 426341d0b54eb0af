"""``agpo-megatron parity``: the contract on the layout of a user's config, scaled down to a model and a number of ranks
for this machine. It runs on the CPU and shows that the layout is correct, not how fast it is."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agpo_megatron.config.schema import Config, PolicyConfig
from agpo_megatron.conversion.shape import ModelShape
from agpo_megatron.conversion.tables import architecture_of
from agpo_megatron.parity import models
from agpo_megatron.parity.batch import Split
from agpo_megatron.parity.comparison import BF16, EXPERTS, FP32, Deviation
from agpo_megatron.parity.contract import Contract
from agpo_megatron.parity.reference import Objective

AXES = ("data_parallel", "tensor_parallel", "pipeline_parallel", "context_parallel")
SPLITS: tuple[Split, ...] = ("one", "packed", "big")


@dataclass(frozen=True)
class Finding:
    """The result for one division of the batch in one precision. ``tensors``: gradient of each, worst first."""

    dtype: str
    how: Split
    deviations: list[Deviation]
    tensors: list[Deviation]

    @property
    def passes(self) -> bool:
        return all(d.passes for d in [*self.deviations, *self.tensors])


def scaled_layout(policy: PolicyConfig, ranks: int, *, experts: bool) -> PolicyConfig:
    """Scale the layout of ``policy`` to at most ``ranks`` ranks: axes are divided, the largest first, and stay above 1
    as long as possible; the last to become 1 is context parallelism."""
    sizes = {axis: getattr(policy, axis) for axis in AXES}
    while math.prod(sizes.values()) > ranks:
        wide = [a for a in AXES if sizes[a] > 2] or [a for a in AXES if sizes[a] > 1]
        axis = max(wide, key=lambda a: sizes[a])
        sizes[axis] //= _least_factor(sizes[axis])
    sharing = sizes["data_parallel"] * sizes["context_parallel"]
    return policy.model_copy(
        update={
            **sizes,
            "virtual_pipeline": min(policy.virtual_pipeline, 2)
            if sizes["pipeline_parallel"] > 1
            else 1,
            "expert_parallel": math.gcd(min(policy.expert_parallel, 4), sharing) if experts else 1,
            "sequence_parallel": policy.sequence_parallel and sizes["tensor_parallel"] > 1,
            "logprob_chunk": 32,
        }
    )


def scaled_model(hf_config: dict[str, Any] | None, policy: PolicyConfig) -> dict[str, Any]:
    """Return a tiny model config with the architecture and features of ``hf_config`` (None: a Llama), of sizes that the
    scaled ``policy`` divides. Raises ConversionError for an architecture without a table."""
    source = hf_config or models.LLAMA
    shape = ModelShape.from_hf(source)
    heads = max(4, policy.tensor_parallel)
    stages = policy.pipeline_parallel * policy.virtual_pipeline
    tiny = {
        **models.LLAMA,
        "architectures": source["architectures"],
        "model_type": architecture_of(source).model_type,
        "rms_norm_eps": shape.rms_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": shape.rope_scaling,
        "tie_word_embeddings": shape.tied,
        "num_hidden_layers": stages * -(-4 // stages),
        "hidden_size": 8 * heads,
        "head_dim": 8 if shape.head_dim * shape.heads == shape.hidden else 16,
        "intermediate_size": 16 * heads,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2 if shape.kv_heads < shape.heads else heads,
    }
    if shape.experts:
        count = max(4, policy.expert_parallel)
        tiny |= {
            "num_experts": count,
            "num_local_experts": count,
            "num_experts_per_tok": min(2, shape.experts.per_token),
            "norm_topk_prob": shape.experts.renormalised,
            "moe_intermediate_size": 12 * heads,
        }
    return tiny


def check(config: Config, ranks: int) -> Iterator[str]:
    """Yield the lines of the report; the last is "pass" or begins with "FAIL"."""
    path = Path(config.model.path) / "config.json"
    source = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    experts = source is not None and architecture_of(source).has_experts
    policy = scaled_layout(config.policy, ranks, experts=experts)
    tiny = scaled_model(source, policy)
    yield (
        f"model    {tiny['architectures'][0]}, {tiny['num_hidden_layers']} layers, hidden {tiny['hidden_size']}"
        + ("" if source else f" ({config.model.path} is not there yet)")
    )
    yield f"layout   {_layout_of(config.policy)} scaled to {_layout_of(policy)} = {policy.world_size} ranks"
    objective = objective_of(config)
    yield (
        f"loss     {objective.kind}, {objective.aggregation}, adaptive {objective.adaptive} of each {objective.scope}, "
        f"temperature {objective.temperature:g}"
    )
    worst: list[tuple[Finding, Deviation]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Contract(Path(folder), policy.world_size) as contract,
    ):
        for finding in findings(contract, tiny, policy, objective, experts=experts):
            yield from table(finding)
            bad = [d for d in [*finding.tensors, *finding.deviations] if not d.passes]
            worst += [(finding, d) for d in bad]
    if worst:
        finding, d = max(worst, key=lambda w: w[1].error / w[1].limit)
        where = f" of {d.worst}" if d.worst else ""
        yield f"FAIL: {d.quantity}{where} is off by {d.error:.1e} ({finding.dtype}, {finding.how})"
    else:
        yield "pass"


def findings(
    contract: Contract,
    model: dict[str, Any],
    policy: PolicyConfig,
    objective: Objective,
    *,
    experts: bool,
) -> Iterator[Finding]:
    """Check in fp32, for each division of the batch; then once in bf16 if that is the config's precision."""
    exact = policy.model_copy(update={"dtype": "fp32"})
    folder = contract.model("scaled", model)
    for how in SPLITS:
        limits = EXPERTS if experts else FP32
        step = contract.step(folder, exact, objective, how)
        yield Finding("fp32", how, step.deviations(limits), step.tensors(limits))
    if policy.dtype == "bf16" and not experts:  # rounding would choose other experts
        plain = replace(objective, kl=0.0)  # ratio 1, without a reference
        step = contract.step(folder, policy, plain, "packed", on_policy=True)
        yield Finding("bf16", "packed", step.deviations(BF16), step.tensors(BF16))


def objective_of(config: Config) -> Objective:
    """Return the loss of ``config`` as far as the reference defines it; the gate is open, to have a gradient."""
    loss = config.algorithm.loss
    adaptive = loss.clip.kind if loss.clip.kind in ("max0", "exp") else "none"
    return Objective(
        kind=loss.policy,
        aggregation=loss.aggregation,
        adaptive=adaptive,  # type: ignore[arg-type]
        scope="group" if loss.clip.scope == "group" else "batch",
        minimum=-1e3,
        tau=loss.clip.tau or 1.0,
        clip=(loss.clip_low, loss.clip_high),
        kl=loss.kl.coef if loss.kl.place == "loss" else 0.0,
        entropy=loss.entropy.coef,
        temperature=config.rollout.temperature,
        norm_length=loss.norm_length or config.rollout.max_response_tokens,
    )


def table(finding: Finding) -> Iterator[str]:
    yield ""
    yield f"{finding.dtype}, micro-batches: {finding.how}"
    for d in [*finding.deviations, *finding.tensors]:
        name = d.quantity if d not in finding.tensors else f"gradient {d.worst}"
        verdict = "pass" if d.passes else "FAIL"
        yield f"  {verdict}  {d.error:8.1e} <= {d.limit:7.0e}  {name}"


def _layout_of(policy: PolicyConfig) -> str:
    sizes = {
        "TP": policy.tensor_parallel,
        "PP": policy.pipeline_parallel,
        "VPP": policy.virtual_pipeline,
        "CP": policy.context_parallel,
        "EP": policy.expert_parallel,
        "DP": policy.data_parallel,
    }
    return " ".join(f"{axis}{n}" for axis, n in sizes.items() if n > 1) or "1 rank"


def _least_factor(n: int) -> int:
    return next(f for f in range(2, n + 1) if n % f == 0)
