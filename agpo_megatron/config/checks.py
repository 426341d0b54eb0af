"""Checks across keys, with the arithmetic in the message. They need neither torch nor megatron nor a GPU.

``check_config`` looks at the configuration (and at the model's config.json where it exists already);
``check_inputs`` at the files a command is about to read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agpo_megatron.algorithm.checks import check_algorithm, without_effect

from .errors import ConfigError
from .pass_through import check_pass_through
from .run_folder import CHECKPOINT_MARKER, is_converted
from .schema import Config, PolicyConfig
from .task import DataConfig, SourceConfig

FEW_TOKENS = 64
"""A fragment of fewer costs more in requests than it can save."""


@dataclass
class _Findings:
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def divides(self, name: str, size: int, what: str, count: int) -> None:
        if count % size:
            self.errors.append(f"policy: {name} {size} does not divide {what} {count}")


def check_config(config: Config) -> list[str]:
    """Raise ConfigError with every contradiction between keys; return the warnings."""
    found = _Findings()
    _check_layout(config.policy, found)
    _check_model_layout(config, found)
    _check_precision(config, found)
    _check_cluster(config, found)
    errors, warnings = check_algorithm(
        config.algorithm,
        max_response_tokens=config.rollout.max_response_tokens,
        max_staleness=config.train.max_staleness,
    )
    found.errors += errors
    found.warnings += warnings
    _check_task(config, found)
    _check_rollout(config, found)
    found.errors += check_pass_through(config)
    _check_train(config, found)
    _check_running_ahead(config, found)
    if found.errors:
        raise ConfigError(found.errors)
    return found.warnings


def _check_layout(policy: PolicyConfig, found: _Findings) -> None:
    if policy.sequence_parallel and policy.tensor_parallel == 1:
        found.errors.append(
            "policy: sequence_parallel shards activations over the tensor parallel ranks, but tensor_parallel is 1; "
            "set tensor_parallel > 1 or sequence_parallel false"
        )
    if policy.virtual_pipeline > 1 and policy.pipeline_parallel == 1:
        found.errors.append(
            f"policy: virtual_pipeline {policy.virtual_pipeline} interleaves the chunks of several stages, but "
            "pipeline_parallel is 1; set pipeline_parallel > 1 or virtual_pipeline 1"
        )
    sharing = policy.context_parallel * policy.data_parallel
    if sharing % policy.expert_parallel:
        found.errors.append(
            f"policy: expert_parallel {policy.expert_parallel} does not divide context_parallel "
            f"{policy.context_parallel} x data_parallel {policy.data_parallel} = {sharing}, the ranks that share the "
            "experts out"
        )


def _check_model_layout(config: Config, found: _Findings) -> None:
    shape = _model_shape(config, found)
    policy, tp = config.policy, config.policy.tensor_parallel
    heads, groups = shape.get("num_attention_heads", 0), shape.get("num_key_value_heads", 0)
    if heads % tp:
        found.divides("tensor_parallel", tp, "num_attention_heads", heads)
    elif groups and groups % tp and tp % groups:
        found.errors.append(
            f"policy: tensor_parallel {tp} neither divides num_key_value_heads {groups} (split) nor is a multiple "
            "of it (replicated)"
        )
    if width := shape.get("intermediate_size"):
        found.divides("tensor_parallel", tp, "intermediate_size", width)
    if shape:
        _check_experts(shape.get("num_experts") or shape.get("num_local_experts", 0), policy, found)
    if layers := shape.get("num_hidden_layers"):
        pp, vpp = policy.pipeline_parallel, policy.virtual_pipeline
        if layers % (pp * vpp):
            product = f"pipeline_parallel {pp}" + (f" x virtual_pipeline {vpp}" if vpp > 1 else "")
            equals = f" = {pp * vpp}" if vpp > 1 else ""
            found.errors.append(
                f"policy: {product}{equals} does not divide num_hidden_layers {layers}"
            )
    if window := shape.get("max_position_embeddings"):
        longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
        if longest > window:
            found.warnings.append(
                f"data.max_prompt_tokens {config.data.max_prompt_tokens} + rollout.max_response_tokens "
                f"{config.rollout.max_response_tokens} = {longest} exceeds the model's max_position_embeddings {window}"
            )


def _check_experts(experts: int, policy: PolicyConfig, found: _Findings) -> None:
    if policy.expert_parallel > 1 and not experts:
        found.errors.append(
            f"policy: expert_parallel {policy.expert_parallel} needs a model with experts, and this one is dense; set "
            "expert_parallel 1"
        )
    elif experts:
        found.divides("expert_parallel", policy.expert_parallel, "the number of experts", experts)
        if policy.tensor_parallel > 1 and not policy.sequence_parallel:
            found.errors.append(
                f"policy: tensor_parallel {policy.tensor_parallel} of a model with experts needs sequence_parallel, "
                "without which megatron-core refuses to train it; set sequence_parallel true"
            )


def _model_shape(config: Config, found: _Findings) -> dict[str, int]:
    """The integers of the model's config.json; empty while there is no such file yet (``prepare`` may write it)."""
    folders = [config.model.path] + ([config.sft.base] if config.sft else [])
    for folder in folders:
        path = Path(folder) / "config.json"
        if path.is_file():
            try:
                values = json.loads(path.read_text(encoding="utf-8"))
                return {k: v for k, v in values.items() if type(v) is int}
            except (OSError, ValueError, AttributeError) as error:
                found.errors.append(
                    f"{path}: not a Hugging Face config.json ({error}); restore the checkpoint"
                )
                return {}
    return {}


def _check_precision(config: Config, found: _Findings) -> None:
    recipe = config.policy.fp8.recipe
    precision: str = config.rollout.dtype
    if precision == "auto":
        precision = {"fp32": "float32", "bf16": "bfloat16"}[config.policy.dtype]
    corrected = config.algorithm.loss.correction.kind != "none"
    against_rollout = config.algorithm.loss.old_logprobs == "rollout"
    if config.cluster.device == "cuda" and not (corrected or against_rollout):
        what = [f"policy.fp8.recipe {recipe}"] if recipe != "none" else []
        what += ["servers in bfloat16"] if precision == "bfloat16" else []
        if what:
            found.warnings.append(
                f"algorithm.loss.correction: kind none with {' and '.join(what)}: their log-probs are not those of the "
                "policy that trains, and nothing makes up for it; set kind tis"
            )
    if recipe == "none":
        return
    # Without Transformer Engine megatron-core ignores fp8 silently and trains in the base precision. Whether it is
    # there is asked where the trainers run (cluster/preflight.py, policy/model.py): a login node need not have it.
    if config.cluster.device == "cpu":
        found.errors.append(
            f"policy.fp8: recipe {recipe} runs on a GPU only, but cluster.device is cpu; set recipe none"
        )
    if config.policy.layers == "local":
        found.errors.append(
            f"policy.fp8: recipe {recipe} needs Transformer Engine, but policy.layers is local; set one to auto or none"
        )


def _check_cluster(config: Config, found: _Findings) -> None:
    cluster, policy = config.cluster, config.policy
    if cluster.device != "cuda":
        return
    world = policy.world_size
    layout = (
        f"tensor_parallel {policy.tensor_parallel} x pipeline_parallel {policy.pipeline_parallel} x context_parallel "
        f"{policy.context_parallel} x data_parallel {policy.data_parallel} = {world} ranks"
    )
    servers = config.rollout.servers * config.rollout.tensor_parallel
    fleet = f"servers {config.rollout.servers} x tensor_parallel {config.rollout.tensor_parallel} = {servers} GPUs"
    demands = [
        ("policy", world, layout, cluster.trainer_nodes, "trainer_nodes"),
        ("rollout", servers, fleet, cluster.rollout_nodes, "rollout_nodes"),
    ]
    if cluster.rollout_nodes == 0 and cluster.publish_backend == "gloo":
        # Servers may share the GPUs of ranks, which have one each.
        demands = [("policy", max(world, config.rollout.tensor_parallel), layout, *demands[0][3:])]
    elif cluster.rollout_nodes == 0:
        both = f"{layout}, and {fleet}"
        demands = [("policy", world + servers, both, cluster.trainer_nodes, "trainer_nodes")]
    for room, need, what, nodes, key in demands:
        have = nodes * cluster.gpus_per_node
        there = f"cluster.{key} {nodes} x gpus_per_node {cluster.gpus_per_node} = {have}"
        if need > have:
            found.errors.append(f"{room}: {what}, more than {there}")
        elif need < have:
            found.warnings.append(f"{room}: {what}, fewer than {there}: {have - need} stay idle")


def _check_task(config: Config, found: _Findings) -> None:
    data, reward = config.data, config.reward
    if data.path and data.sources:
        found.errors.append(
            f"data: path {data.path} and sources are both set; list the path under sources, or remove them"
        )
    if not data.chat_template and (data.system or data.tools_key or data.template_options):
        found.errors.append(
            "data: system, tools_key and template_options are parts of a chat template; set chat_template true"
        )
    if reward.correct <= reward.wrong:
        found.errors.append(
            f"reward: correct {reward.correct:g} must be above wrong {reward.wrong:g}"
        )
    for held_out in config.eval.sets:
        if held_out.n > 1 and not held_out.temperature:
            found.errors.append(
                f"eval.sets: n {held_out.n} samples of {held_out.shown} at temperature 0 would be {held_out.n} times "
                "the same; set temperature above 0, or n 1"
            )
    for kind, sources in (("data.sources", data.each()), ("eval.sets", config.eval.sets)):
        names = [source.shown for source in sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            found.errors.append(
                f"{kind}: {twice[0]!r} is the name of several; give each a name of its own"
            )


def _check_rollout(config: Config, found: _Findings) -> None:
    rollout = config.rollout
    if rollout.max_in_flight < rollout.group_size:
        found.errors.append(
            f"rollout: max_in_flight {rollout.max_in_flight} is below group_size {rollout.group_size}, but the samples "
            "of a group run together on one server; raise max_in_flight"
        )
    if rollout.port and rollout.port + rollout.servers - 1 > 65535:
        found.errors.append(
            f"rollout: port {rollout.port} + servers {rollout.servers} - 1 = "
            f"{rollout.port + rollout.servers - 1} is beyond 65535"
        )


def _check_train(config: Config, found: _Findings) -> None:
    train = config.train
    if train.min_lr > train.lr:
        found.errors.append(f"train: min_lr {train.min_lr:g} is above lr {train.lr:g}")
    if train.steps and train.warmup_steps >= train.steps:
        found.warnings.append(
            f"train: warmup_steps {train.warmup_steps} leaves none of the {train.steps} steps at lr {train.lr:g}"
        )
    updates = train.updates_per_batch
    for name, count in (("prompts_per_batch", train.prompts_per_batch), ("steps", train.steps)):
        if count % updates:
            found.errors.append(
                f"train: updates_per_batch {updates} does not divide {name} {count}: every update takes whole groups "
                "and every batch is trained on to its end"
            )
    if config.eval.every % updates:
        found.errors.append(
            f"eval: every {config.eval.every} is not a multiple of train.updates_per_batch {updates}, after which the "
            "servers get new weights"
        )
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if train.micro_batch_tokens < longest:
        found.warnings.append(
            f"train: micro_batch_tokens {train.micro_batch_tokens} is below data.max_prompt_tokens "
            f"{config.data.max_prompt_tokens} + rollout.max_response_tokens {config.rollout.max_response_tokens} = "
            f"{longest}; sequences beyond the budget become micro-batches of their own"
        )


def _check_running_ahead(config: Config, found: _Findings) -> None:
    train, rollout = config.train, config.rollout
    batches = train.steps // train.updates_per_batch
    if batches and train.max_staleness >= batches:
        found.warnings.append(
            f"train: max_staleness {train.max_staleness} is not below the {batches} batches of the run (steps / "
            "updates_per_batch): all of it may be generated with the weights that it starts from"
        )
    if rollout.fragment_tokens < min(FEW_TOKENS, rollout.max_response_tokens):
        requests = -(-rollout.max_response_tokens // rollout.fragment_tokens)
        found.warnings.append(
            f"rollout: fragment_tokens {rollout.fragment_tokens} makes up to {requests} requests of a response of "
            f"max_response_tokens {rollout.max_response_tokens}, each scheduled and prefilled anew; use {FEW_TOKENS} "
            "or more unless this is a test"
        )
    if rollout.kv_on_publish == "keep" and not _runs_ahead(config):
        found.warnings.append(
            "rollout: kv_on_publish keep has no effect with train.max_staleness 0: no response runs at a publish"
        )
    elif rollout.kv_on_publish == "keep" and config.cluster.device != "cpu":
        found.warnings.append(
            "rollout: kv_on_publish keep has never run on a GPU, where it may leave a forward pass in flight beside "
            "the transfer (docs/async.md); use recompute"
        )


def _runs_ahead(config: Config) -> bool:
    return config.train.max_staleness > 0 or config.algorithm.advantage.zero_variance == "resample"


def notes(config: Config) -> list[str]:
    """Name what a sound configuration means beyond its keys, for ``check``."""
    train, found = config.train, []
    if note := without_effect(config.algorithm.loss, train.updates_per_batch):
        found.append(note)
    if config.algorithm.advantage.zero_variance == "resample":
        found.append(
            f"advantage.zero_variance resample begins groups beyond the batch: responses may be up to "
            f"{train.max_staleness + 1} batches old, one more than train.max_staleness"
        )
    if train.max_staleness and config.eval.every and config.eval.sets:
        found.append(
            "with train.max_staleness above 0 evaluations run beside training: their scores are of the weights from "
            "one step to another, which they state (`weights`)"
        )
    return found


def check_inputs(config: Config, command: str = "train") -> None:
    """Raise ConfigError with every file that ``command`` (sft, train, replay, eval) needs and cannot use.

    Looks at the checkpoint, its tokenizer and the first problem of each data file; reading everything is data/'s part.
    """
    prepare = config.prepare.recipe != "none"
    fix = "run `agpo-megatron prepare CONFIG` first" if prepare else "correct the path"
    problems: list[str] = []
    data = config.data
    if command == "sft":
        if config.sft is None:
            raise ConfigError(
                "sft: the configuration has no sft section; add one or skip this step"
            )
        problems += _checkpoint_problems("sft.base", config.sft.base, fix)
        problems += _jsonl_problems("sft.path", config.sft.path, ("prompt", "response"), fix)
    else:
        fix_model = "run `agpo-megatron sft CONFIG` first" if config.sft else fix
        problems += _checkpoint_problems("model.path", config.model.path, fix_model)
        if command == "eval" and is_converted(config.model.path):
            problems.append(
                f"model.path: {config.model.path} holds Megatron's files, which servers cannot load, and an evaluation "
                "has no trainer to publish from; convert it (tools/convert_hf_checkpoint.py to-hf) and pass --model"
            )
        if command == "train":
            if not data.each():
                problems.append(
                    "data.path: is not set; give a file, a folder or a dataset, or data.sources"
                )
            for key, source in data.by_key().items():
                problems += _source_problems(key, source, data, fix)
        if command == "eval" and not config.eval.sets:
            problems.append("eval.sets: is not set; list what to evaluate, each with a path")
        for key, held_out in config.eval.by_key().items():
            problems += _source_problems(key, held_out, data, fix)
    if problems:
        raise ConfigError(problems)


def _checkpoint_problems(key: str, folder: str, fix: str) -> Iterator[str]:
    path = Path(folder)
    if not path.is_dir():
        yield f"{key}: no checkpoint folder {folder}; {fix}"
        return
    if is_converted(folder) and not (path / "config.json").is_file():
        yield (
            f"{key}: {folder} is a checkpoint of a training run, without config and tokenizer; the run's command goes "
            "on from it; to begin another run convert it (tools/convert_hf_checkpoint.py to-hf --like)"
        )
        return
    for what, patterns in (
        ("config.json", ["config.json"]),
        ("weights (*.safetensors) or those of to-megatron", ["*.safetensors", CHECKPOINT_MARKER]),
        ("tokenizer (tokenizer.json or tokenizer.model)", ["tokenizer.json", "tokenizer.model"]),
    ):
        if not any(next(path.glob(pattern), None) for pattern in patterns):
            yield f"{key}: {folder} has no {what}; {fix}"


def _source_problems(key: str, source: SourceConfig, data: DataConfig, fix: str) -> Iterator[str]:
    """Yield the problems of a file; folders and datasets are read by data/."""
    if Path(source.path).suffix == ".jsonl":
        own = data.of(source)
        fields = tuple(k.split(".")[0] for k in (own.prompt_key, own.answer_key) if k)
        yield from _jsonl_problems(key, source.path, fields, fix)
    elif Path(source.path).suffix in (".parquet", ".arrow") and not Path(source.path).is_file():
        yield f"{key}: no data file {source.path}; {fix}"


def _jsonl_problems(key: str, path: str, fields: tuple[str, ...], fix: str) -> Iterator[str]:
    if not path:
        yield f"{key}: is not set; give a JSONL file"
        return
    if not Path(path).is_file():
        yield f"{key}: no data file {path}; {fix}"
        return
    try:
        with Path(path).open(encoding="utf-8") as file:
            number, line = next(((n, t) for n, t in enumerate(file, 1) if t.strip()), (0, ""))
    except (OSError, UnicodeDecodeError) as error:
        yield f"{key}: {path} cannot be read as UTF-8 text: {error}"
        return
    if not line:
        yield f"{key}: {path} holds no problem (the file is empty); {fix}"
        return
    row = _json_object(line)
    if row is None:
        yield f"{key}: {path}:{number}: not a JSON object; the file must hold one per line"
        return
    missing = [name for name in fields if name not in row]
    if missing:
        yield (
            f"{key}: {path}:{number}: has no field {', '.join(map(repr, missing))} (it has "
            f"{', '.join(map(repr, row))}); set data.prompt_key and data.answer_key, or correct the file"
        )


def _json_object(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
