"""Cross-field checks and missing inputs: the arithmetic is in the message, and everything is reported at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agpo_megatron import cli
from agpo_megatron.config import Config, ConfigError, check_config, check_inputs, load_config

SHAPE = {
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 6,
    "intermediate_size": 96,
    "vocab_size": 101,
    "max_position_embeddings": 2048,
}
SMALL = ("data.max_prompt_tokens=64", "rollout.max_response_tokens=64")


def config_with(folder: Path, *overrides: str, shape: dict[str, int] | None = None) -> Config:
    model = folder / "model"
    model.mkdir(exist_ok=True)
    if shape is not None:
        (model / "config.json").write_text(json.dumps(shape))
    path = folder / "run.yaml"
    path.write_text(f"model: {{path: {model}}}\ndata: {{path: {folder}/train.jsonl}}\n")
    return load_config(path, [*SMALL, *overrides])


def problems(folder: Path, *overrides: str, shape: dict[str, int] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_config(config_with(folder, *overrides, shape=shape))
    return caught.value.problems


def test_a_sound_config_passes_without_a_warning(tmp_path: Path) -> None:
    assert check_config(config_with(tmp_path, shape=SHAPE)) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tensor_parallel=3"], "policy: tensor_parallel 3 does not divide num_attention_heads 8"),
        (["tensor_parallel=16"], "tensor_parallel 16 does not divide num_attention_heads 8"),
        (
            ["pipeline_parallel=4"],
            "policy: pipeline_parallel 4 does not divide num_hidden_layers 6",
        ),
        (
            ["pipeline_parallel=2", "virtual_pipeline=2"],
            "policy: pipeline_parallel 2 x virtual_pipeline 2 = 4 does not divide "
            "num_hidden_layers 6",
        ),
    ],
)
def test_a_layout_that_does_not_divide_the_model(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    found = problems(tmp_path, *(f"policy.{o}" for o in overrides), shape=SHAPE)
    assert message in "\n".join(found)


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4, 8])
def test_layouts_that_run_are_accepted(tmp_path: Path, tensor_parallel: int) -> None:
    # 4 and 8 replicate the 2 KV heads; the vocabulary of 101 is padded.
    override = f"policy.tensor_parallel={tensor_parallel}"
    assert check_config(config_with(tmp_path, override, shape=SHAPE)) == []


def test_kv_heads_must_split_or_replicate(tmp_path: Path) -> None:
    shape = SHAPE | {"num_attention_heads": 12, "num_key_value_heads": 6}
    found = problems(tmp_path, "policy.tensor_parallel=4", shape=shape)
    assert len(found) == 1
    assert "tensor_parallel 4 neither divides num_key_value_heads 6" in found[0]


def test_the_ffn_must_divide(tmp_path: Path) -> None:
    shape = SHAPE | {"intermediate_size": 98}
    assert problems(tmp_path, "policy.tensor_parallel=4", shape=shape) == [
        "policy: tensor_parallel 4 does not divide intermediate_size 98"
    ]


def test_the_shape_of_the_cold_start_base_is_used_before_the_model_exists(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(SHAPE))
    found = problems(tmp_path, f"sft={{base: {base}, path: x}}", "policy.tensor_parallel=3")
    assert found == ["policy: tensor_parallel 3 does not divide num_attention_heads 8"]


@pytest.mark.parametrize(
    ("experts", "policy", "message"),
    [
        (
            {},
            "{expert_parallel: 2, data_parallel: 2}",
            "2 needs a model with experts, and this one",
        ),
        (
            {"num_local_experts": 6},
            "{expert_parallel: 4, data_parallel: 4}",
            "expert_parallel 4 does not divide the number of experts 6",
        ),
        ({"num_experts": 8}, "{tensor_parallel: 2}", "with experts needs sequence_parallel"),
    ],
)
def test_experts_and_their_layout(
    tmp_path: Path, experts: dict[str, int], policy: str, message: str
) -> None:
    (found,) = problems(tmp_path, f"policy={policy}", shape={**SHAPE, **experts})
    assert message in found


def test_a_damaged_model_config_is_named(tmp_path: Path) -> None:
    config = config_with(tmp_path)
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: not a Hugging Face config\.json"):
        check_config(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policy.sequence_parallel=true", "tensor_parallel is 1"),
        ("policy.virtual_pipeline=2", "pipeline_parallel is 1"),
        ("policy.expert_parallel=2", "2 does not divide context_parallel 1 x data_parallel 1 = 1"),
        (
            "algorithm={preset: dapo, length_reward: {buffer: 65}}",
            "buffer 65 exceeds rollout.max_response_tokens 64",
        ),
        ("algorithm={preset: gspo, loss: {dual_clip: 3.0}}", "gspo has no such bound"),
        ("algorithm.loss.clip={on: total, scope: group}", "on total with scope group"),
        ("algorithm.loss={old_logprobs: rollout, correction: {kind: tis}}", "choose one"),
        ("algorithm.loss.policy=nll", "imitates whatever was sampled"),
        ("train={updates_per_batch: 3, steps: 6}", "does not divide prompts_per_batch 16"),
        ("train={updates_per_batch: 4, steps: 6}", "does not divide steps 6"),
        ("algorithm.loss.correction={kind: icepop, level: sequence}", "masks single tokens"),
        ("algorithm.loss.clip={kind: random, on: total}", "kind random is decided by the"),
        ("algorithm.loss.clip={kind: exp, tau: null, scope: group}", "exp with tau null is"),
        ("algorithm.loss.correction={kind: mis, low: 2.0}", "low 2 is not below high 2"),
        ("algorithm.loss.kl={importance: true, place: reward}", "set importance false"),
        ("reward.correct=-1", "correct -1 must be above wrong 0"),
        ("rollout.max_in_flight=7", "max_in_flight 7 is below group_size 8"),
        ("rollout={port: 65535, servers: 2}", "65536 is beyond 65535"),
        ("train={lr: 1e-5, min_lr: 1e-4}", "min_lr 0.0001 is above lr 1e-05"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, override: str, message: str) -> None:
    found = problems(tmp_path, override)
    assert len(found) == 1
    assert message in found[0]


CORRECTION = "algorithm.loss.correction"
NONE = f"{CORRECTION}.kind=none"


@pytest.mark.parametrize(
    ("overrides", "idle"),
    [
        ([], "loss.clip_low, loss.clip_high"),
        (
            ["algorithm.preset=cispo"],
            "loss.policy cispo (its gradient is that of ppo), loss.clip_low",
        ),
        (["algorithm.preset=sapo"], "are loss.policy sapo (its gradient is that of ppo)"),
        (
            ["algorithm.loss={dual_clip: 3.0, kl: {importance: true}}"],
            "dual_clip, loss.kl.importance",
        ),
        (["train.updates_per_batch=4"], ""),
        (["algorithm.loss.old_logprobs=rollout"], ""),
        (["train.max_staleness=2"], "however old the responses are: without effect are loss.clip_"),
        (["train.max_staleness=2", "train.updates_per_batch=2"], ""),
    ],
)
def test_check_says_what_a_ratio_of_one_leaves_without_effect(
    tmp_path: Path, overrides: list[str], idle: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: m}\ndata: {path: d}\n")
    sets = [word for text in overrides for word in ("--set", text)]
    assert cli.main(["check", str(path), *sets]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    assert (idle in notes[0]) if idle else notes == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train={max_staleness: 2, steps: 3}"], ""),
        (
            ["train={max_staleness: 2, steps: 4, updates_per_batch: 2}"],
            "max_staleness 2 is not below the 2 batches",
        ),
        (["rollout.fragment_tokens=64"], ""),
        (["rollout={fragment_tokens: 10, max_response_tokens: 10}"], ""),
        (["rollout={fragment_tokens: 30, max_response_tokens: 100}"], "makes up to 4 requests"),
        (["rollout.kv_on_publish=keep"], "keep has no effect with train.max_staleness 0"),
        (
            ["rollout.kv_on_publish=keep", "train.max_staleness=1", "cluster.device=cpu"],
            "",
        ),
        (["rollout.kv_on_publish=keep", "train.max_staleness=1"], "keep has never run on a GPU"),
        (
            ["rollout.kv_on_publish=keep", "algorithm.advantage.zero_variance=resample"],
            "keep has never run on a GPU",
        ),
    ],
)
def test_doubts_about_running_ahead(tmp_path: Path, overrides: list[str], words: str) -> None:
    found = [w for w in check_config(config_with(tmp_path, *overrides)) if "algorithm" not in w]
    assert len(found) == bool(words) and all(words in warning for warning in found)


def test_check_says_what_running_ahead_means(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: m}\ndata: {path: d}\neval: {every: 2, sets: [{path: e}]}\n")
    sets = ["train.max_staleness=3", "algorithm.preset=dapo"]
    assert cli.main(["check", str(path), *(w for text in sets for w in ("--set", text))]) == 0
    shown = capsys.readouterr().err
    assert "up to 4 batches old, one more than train.max_staleness" in shown
    assert "evaluations run beside training" in shown
    assert cli.main(["check", str(path)]) == 0
    shown = capsys.readouterr().err
    assert "batches old" not in shown and "beside training" not in shown


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.max_staleness=1"], ""),
        (["train.max_staleness=1", "algorithm.loss.old_logprobs=rollout"], ""),
        (["train.max_staleness=2", NONE], "kind none with train.max_staleness 2"),
        (["train={max_staleness: 1, updates_per_batch: 2}", NONE], "kind none with"),
        (["train.updates_per_batch=2", NONE], ""),
        (["train.max_staleness=1", f"{CORRECTION}={{kind: mis, level: sequence}}"], "explodes"),
        (["train.max_staleness=1", f"{CORRECTION}.level=sequence_mean"], ""),
        ([f"{CORRECTION}={{kind: mis, level: sequence}}"], ""),
    ],
)
def test_what_staleness_needs_of_a_correction(
    tmp_path: Path, overrides: list[str], words: str
) -> None:
    found = [w for w in check_config(config_with(tmp_path, *overrides)) if "staleness" in w]
    assert len(found) == bool(words) and words in "".join(found)


def test_fp8_on_a_cpu_is_refused_whatever_is_installed(tmp_path: Path) -> None:
    found = problems(tmp_path, "policy.fp8.recipe=mxfp8", "cluster.device=cpu")
    assert "recipe mxfp8 runs on a GPU only" in found[0]


def test_evaluations_fall_on_the_ends_of_batches(tmp_path: Path) -> None:
    found = problems(tmp_path, "train.updates_per_batch=4", "eval.every=6")
    assert any("eval: every 6 is not a multiple of train.updates_per_batch 4" in p for p in found)


def test_ranks_and_servers_must_fit_the_nodes_on_a_gpu(tmp_path: Path) -> None:
    layout = (
        "policy={tensor_parallel: 4, pipeline_parallel: 2, data_parallel: 2}",
        "cluster={device: cuda, trainer_nodes: 1, gpus_per_node: 8}",
        "rollout.servers=9",
        "algorithm.loss.correction.kind=tis",
    )
    found = problems(tmp_path, *layout)
    assert found == [
        "policy: tensor_parallel 4 x pipeline_parallel 2 x context_parallel 1 x data_parallel 2 = 16 ranks, more than "
        "cluster.trainer_nodes 1 x gpus_per_node 8 = 8",
        "rollout: servers 9 x tensor_parallel 1 = 9 GPUs, more than cluster.rollout_nodes 1 x gpus_per_node 8 = 8",
    ]
    enough = (layout[0], "cluster={device: cuda, trainer_nodes: 3}", "rollout.servers=8", layout[3])
    warnings = check_config(config_with(tmp_path, *enough))
    assert len(warnings) == 1
    assert "16 ranks, fewer than" in warnings[0]
    assert "8 stay idle" in warnings[0]


def test_every_contradiction_is_reported_at_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        "policy.tensor_parallel=3",
        "policy.pipeline_parallel=4",
        "rollout.max_in_flight=1",
        shape=SHAPE,
    )
    assert [text.split(":")[0] for text in found] == ["policy", "policy", "rollout"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.advantage.zero_variance=constant"], "removes again; choose one"),
        (
            ["algorithm={preset: agpo_v1, loss: {clip: {kind: max0}}}"],
            "closes on most steps",
        ),
        (
            ["algorithm={preset: agpo_v3, loss: {aggregation: seq_mean_token_mean}}"],
            "acts on rounding noise",
        ),
        (["algorithm={preset: agpo_v1, length_reward: {groups: all}}"], "hardly a group is left"),
        (["algorithm.advantage.zero_variance=resample"], "resample_factor runs out only"),
        (
            [
                "algorithm={preset: agpo_v3, loss: {aggregation: seq_mean_token_mean, clip: {scope: group}}}"
            ],
            "acts on rounding noise",
        ),
        (["algorithm={preset: agpo_v3, advantage: {estimator: batch_norm}}"], "have a signal too"),
        (
            ["algorithm={preset: agpo_v1, advantage: {estimator: reinforce_pp}}"],
            "reinforce_pp says of zero-variance groups anyway",
        ),
        (
            ["algorithm={preset: grpo, advantage: {estimator: batch_norm, length_projection: 1}}"],
            "length_projection within a group only",
        ),
        (
            ["algorithm={preset: agpo_v3, loss: {clip: {scope: token}}}"],
            "training on mistakes only",
        ),
        (["algorithm.preset=agpo_v3_authors"], "depends on train.micro_batch_tokens"),
        (["algorithm.loss.mask.criterion=sample"], "exactly at the mean"),
        (
            ["algorithm={preset: agpo_v3, loss: {entropy: {coef: 0.01}}}"],
            "KL and entropy terms still train",
        ),
        (["algorithm={preset: grpo, loss: {kl: {coef: 0.1, estimator: k1}}}"], "k1 estimate"),
        (["algorithm={preset: grpo, loss: {kl: {coef: 0.1, place: reward}}}"], "not k3"),
        (["algorithm={preset: dapo, loss: {mask: {truncated: true}}}"], "baseline of the others"),
        (["train.micro_batch_tokens=127"], "64 + rollout.max_response_tokens 64 = 128"),
        (["train={steps: 5, warmup_steps: 5}"], "none of the 5 steps"),
        (["data.max_prompt_tokens=2000"], "= 2064 exceeds the model's max_position_embeddings"),
    ],
)
def test_doubtful_choices_are_warned_about(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    warnings = check_config(config_with(tmp_path, *overrides, shape=SHAPE))
    assert any(message in warning for warning in warnings)


def usable_inputs(folder: Path) -> Path:
    model = folder / "model"
    model.mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (model / name).write_text("{}")
    row = {"prompt": "1+1", "answer": "2", "response": "2"}
    for name in ("train", "held_out", "sft"):
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    return model


def input_problems(config: Config, command: str = "train") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_inputs(config, command)
    return caught.value.problems


@pytest.mark.parametrize("command", ["sft", "train", "replay", "eval"])
def test_complete_inputs_pass(tmp_path: Path, command: str) -> None:
    model = usable_inputs(tmp_path)
    sft = f"sft={{base: {model}, path: {tmp_path}/sft.jsonl}}"
    check_inputs(
        config_with(tmp_path, sft, f"eval.sets=[{{path: {tmp_path}/held_out.jsonl}}]"), command
    )


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model/tokenizer.json", "model has no tokenizer (tokenizer.json or tokenizer.model)"),
        ("model/model.safetensors", "model has no weights (*.safetensors)"),
        ("model/config.json", "model has no config.json"),
        ("train.jsonl", "data.path: no data file"),
        ("held_out.jsonl", "eval.sets[0].path: no data file"),
    ],
)
def test_a_missing_input_is_named_with_its_key(tmp_path: Path, missing: str, message: str) -> None:
    usable_inputs(tmp_path)
    (tmp_path / missing).unlink()
    found = input_problems(
        config_with(tmp_path, f"eval.sets=[{{path: {tmp_path}/held_out.jsonl}}]")
    )
    assert len(found) == 1
    assert message in found[0]
    assert found[0].endswith("correct the path")


def test_a_converted_checkpoint_is_a_model_but_not_for_servers_alone(tmp_path: Path) -> None:
    model = usable_inputs(tmp_path)
    (model / "model.safetensors").rename(model / "complete.json")
    sets = f"eval.sets=[{{path: {tmp_path}/held_out.jsonl}}]"
    sft = f"sft={{base: {model}, path: {tmp_path}/sft.jsonl}}"
    for command in ("train", "replay", "sft"):
        check_inputs(config_with(tmp_path, sft, sets), command)
    (found,) = input_problems(config_with(tmp_path, sets), "eval")
    assert "an evaluation has no trainer to publish from; convert it" in found
    (model / "config.json").unlink()  # as what a training run saves
    (found,) = input_problems(config_with(tmp_path, sets))
    assert found.startswith("model.path: ") and "is a checkpoint of a training run" in found


def test_a_missing_file_of_a_list_of_sources_is_named_with_its_place(tmp_path: Path) -> None:
    usable_inputs(tmp_path)
    sources = f"[{{path: {tmp_path}/train.jsonl}}, {{path: {tmp_path}/none.jsonl}}]"
    (found,) = input_problems(config_with(tmp_path, f"data={{path: '', sources: {sources}}}"))
    assert found.startswith("data.sources[1].path: no data file")


def test_the_fix_is_the_command_that_makes_the_file(tmp_path: Path) -> None:
    config = config_with(tmp_path, "prepare.recipe=tiny_sums", "model.path=/nowhere/model")
    found = input_problems(config)
    assert found[0].startswith("model.path: no checkpoint folder /nowhere/model")
    assert all(text.endswith("run `agpo-megatron prepare CONFIG` first") for text in found)
    usable_inputs(tmp_path)
    after_sft = config_with(tmp_path, "sft={base: b, path: p}", "model.path=/nowhere/model")
    assert input_problems(after_sft)[0].endswith("run `agpo-megatron sft CONFIG` first")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no problem (the file is empty)"),
        ("\n\n", "holds no problem (the file is empty)"),
        ("\n[1, 2]\n", "train.jsonl:2: not a JSON object"),
        ("{'prompt': 1}\n", "train.jsonl:1: not a JSON object"),
        ('{"question": "1+1", "answer": "2"}\n', "has no field 'prompt' (it has 'question', "),
    ],
)
def test_unusable_data_is_named_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    usable_inputs(tmp_path)
    (tmp_path / "train.jsonl").write_text(content)
    found = input_problems(config_with(tmp_path))
    assert len(found) == 1
    assert message in found[0]


def test_sft_and_eval_need_their_sections(tmp_path: Path) -> None:
    usable_inputs(tmp_path)
    config = config_with(tmp_path)
    assert "no sft section" in input_problems(config, "sft")[0]
    assert input_problems(config, "eval") == [
        "eval.sets: is not set; list what to evaluate, each with a path"
    ]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["policy.fp8.recipe=blockwise"], "policy.fp8.recipe blockwise and servers in bfloat16"),
        ([], "kind none with servers in bfloat16"),
        (["policy.dtype=fp32", "policy.fp8.recipe=tensorwise"], "with policy.fp8.recipe tens"),
        (["rollout.dtype=float32"], ""),
        (["algorithm.loss.correction.kind=tis"], ""),
        (["algorithm.loss.old_logprobs=rollout"], ""),
    ],
)
def test_servers_and_trainers_of_different_precision(
    tmp_path: Path, overrides: list[str], words: str
) -> None:
    """On a GPU their log-probs differ; without a correction ``policy/ratio_mean`` is 1 and hides it."""
    cuda = ("cluster.device=cuda", "cluster.gpus_per_node=1", "cluster.rollout_nodes=1")
    found = check_config(config_with(tmp_path, *cuda, *overrides))
    about = [w for w in found if "algorithm.loss.correction" in w]
    assert len(about) == bool(words) and words in "".join(about)
    assert check_config(config_with(tmp_path, *[o for o in overrides if "fp8" not in o])) == []
