"""Reading a configuration: YAML, overrides, run folder, presets, provenance, and every message of a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agpo_megatron.algorithm.presets import PRESETS, preset_keys
from agpo_megatron.config import Config, ConfigError, check_config, load_config, resolve_config
from agpo_megatron.config.loading import leaves
from agpo_megatron.config.record import package_versions, resolved_yaml
from agpo_megatron.config.yaml_core import parse_yaml, yaml_line

MINIMAL = 'model: {path: "{run_dir}/model"}\ndata: {path: train.jsonl}\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(written(folder, text), overrides)
    return str(caught.value).replace(str(folder) + "/", "")


def test_values_come_from_run_dir_set_file_preset_and_default_in_that_order(tmp_path: Path) -> None:
    text = MINIMAL + (
        "run: {dir: runs/file}\n"
        "train: {steps: 7, lr: 2.0e-5}\n"
        "algorithm: {preset: grpo, loss: {clip_low: 0.1}}\n"
    )
    config, origin = resolve_config(
        written(tmp_path, text), ["train.steps=9", "run.dir=runs/set"], "runs/here"
    )
    expected = {
        "run.dir": ("runs/here", "--run-dir"),
        "model.path": ("runs/here/model", "file"),
        "train.steps": (9, "--set"),
        "train.lr": (2e-5, "file"),
        "algorithm.preset": ("grpo", "file"),
        "algorithm.loss.clip_low": (0.1, "file"),
        "algorithm.loss.clip_high": (0.2, "preset grpo"),
        "algorithm.length_reward.kind": ("none", "preset grpo"),
        "algorithm.length_reward.groups": ("mixed", "default"),
        "rollout.group_size": (8, "default"),
        "sft": (None, "default"),
    }
    values = leaves(config)
    assert {key: (values[key], origin[key]) for key in expected} == expected
    assert set(origin) == set(values)


def test_the_last_set_wins_and_replaces_what_was_below(tmp_path: Path) -> None:
    text = MINIMAL + "sft: {base: b, path: p, steps: 5}\n"
    path = written(tmp_path, text)
    assert load_config(path, ["seed=3", "seed=4"]).seed == 4
    assert load_config(path, ["sft=null"]).sft is None
    replaced, origin = resolve_config(path, ["sft={base: c, path: q}"])
    assert replaced.sft is not None
    assert (replaced.sft.base, replaced.sft.steps) == ("c", 300)
    assert (origin["sft.base"], origin["sft.steps"]) == ("--set", "default")


def test_an_empty_override_is_empty_text(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL + "journal: {keep: all}\n")
    assert load_config(path, ["data.suffix="]).data.suffix == ""


@pytest.mark.parametrize(
    ("preset", "length", "zero_variance", "mask", "clip", "low", "high"),
    [
        ("agpo", "agpo", "zero", True, False, 0.2, 0.28),
        ("agpo_v1", "agpo", "constant", False, False, 0.2, 0.2),
        ("agpo_v3", "none", "zero", True, True, 0.2, 0.28),
        ("grpo", "none", "zero", False, False, 0.2, 0.2),
    ],
)
def test_presets_set_the_switches_of_the_paper_versions(
    tmp_path: Path,
    preset: str,
    length: str,
    zero_variance: str,
    mask: bool,
    clip: bool,
    low: float,
    high: float,
) -> None:
    path = written(tmp_path, MINIMAL)
    algorithm = load_config(path, [f"algorithm.preset={preset}"]).algorithm
    loss = algorithm.loss
    assert algorithm.length_reward.kind == length
    assert algorithm.advantage.zero_variance == zero_variance
    assert (loss.mask.zero_variance, loss.clip.kind == "max0") == (mask, clip)
    assert (loss.clip_low, loss.clip_high, loss.aggregation) == (low, high, "token_mean")


def test_agpo_is_the_preset_of_a_config_that_names_none(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL)
    named = load_config(path, ["algorithm.preset=agpo"]).algorithm
    assert load_config(path).algorithm == named
    direct = Config.model_validate({"model": {"path": "m"}, "data": {"path": "d"}})
    assert direct.algorithm == named


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_loads_sets_the_same_keys_and_passes_the_checks(
    tmp_path: Path, preset: str
) -> None:
    path = written(tmp_path, MINIMAL)
    config, origin = resolve_config(path, [f"algorithm.preset={preset}"])
    check_config(config)
    flat = leaves(config)
    assert preset_keys(preset).keys() == preset_keys("agpo").keys()
    for key, value in preset_keys(preset).items():
        assert flat[key] == value
        assert origin[key] == f"preset {preset}"


KIND = "algorithm.loss.correction.kind"


@pytest.mark.parametrize(
    ("sets", "kind", "from_what"),
    [
        ([], "none", "default"),
        (["train.max_staleness=0"], "none", "default"),
        (["train.max_staleness=1"], "tis", "staleness"),
        (["algorithm.preset=dapo"], "tis", "staleness"),
        (["algorithm.advantage.zero_variance=resample"], "tis", "staleness"),
        (["train.max_staleness=1", f"{KIND}=none"], "none", "--set"),
        (["train.max_staleness=1", f"{KIND}=icepop"], "icepop", "--set"),
        (["train.max_staleness=1", "algorithm={preset: grpo}"], "tis", "staleness"),
        (["train.max_staleness=1", "algorithm.loss.old_logprobs=rollout"], "none", "default"),
    ],
)
def test_what_is_stale_is_corrected_unless_told_otherwise(
    tmp_path: Path, sets: list[str], kind: str, from_what: str
) -> None:
    config, origin = resolve_config(written(tmp_path, MINIMAL), sets)
    assert (config.algorithm.loss.correction.kind, origin[KIND]) == (kind, from_what)
    assert (config.algorithm.loss.correction.level, config.algorithm.loss.correction.high) == (
        "token",
        2.0,
    )
    again, _ = resolve_config(written(tmp_path, resolved_yaml(config, origin)))
    assert again == config


@pytest.mark.parametrize("text", ["train.max_staleness='1'", "algorithm=3", f"{KIND[:-5]}=null"])
def test_a_wrong_value_beside_staleness_is_refused_as_it_is(tmp_path: Path, text: str) -> None:
    sets = ["train.max_staleness=1", text]
    assert text.partition("=")[0] in refusal(tmp_path, MINIMAL, *sets)


def test_presets_differ(tmp_path: Path) -> None:
    switches = [preset_keys(name) for name in PRESETS]
    assert all(a != b for i, a in enumerate(switches) for b in switches[:i])


def test_a_written_switch_wins_over_the_preset_and_leaves_the_rest(tmp_path: Path) -> None:
    text = MINIMAL + "algorithm: {preset: agpo_v3, loss: {mask: {zero_variance: false}}}\n"
    config, origin = resolve_config(written(tmp_path, text))
    assert config.algorithm.loss.mask.zero_variance is False
    assert config.algorithm.loss.clip.kind == "max0"
    assert origin["algorithm.loss.mask.zero_variance"] == "file"
    assert origin["algorithm.loss.clip.kind"] == "preset agpo_v3"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2E+3", -2000.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("010", 10),
        ("1:30", "1:30"),
        ("yes", "yes"),
        ("2024-01-01", "2024-01-01"),
        ("true", True),
        ("~", None),
        ("'1e-4'", "1e-4"),
    ],
)
def test_scalars_mean_what_they_look_like(text: str, value: object) -> None:
    parsed, _ = parse_yaml(f"key: {text}", "x")
    assert parsed == {"key": value}
    assert type(parsed["key"]) is type(value)


def test_the_learning_rate_may_be_written_1e_4(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL + "train: {lr: 1e-4}\n")
    assert load_config(path).train.lr == 1e-4
    assert load_config(path, ["train.lr=3e-5"]).train.lr == 3e-5


def test_an_unknown_key_is_refused_with_place_key_and_nearest(tmp_path: Path) -> None:
    text = MINIMAL + "train:\n  steps: 3\n  lrr: 0.1\n"
    assert refusal(tmp_path, text) == (
        "run.yaml:5: train.lrr: unknown key; nearest valid key: train.lr"
    )
    assert refusal(tmp_path, MINIMAL, "policy.tensor_paralel=2") == (
        "--set policy.tensor_paralel=2: policy.tensor_paralel: unknown key; "
        "nearest valid key: policy.tensor_parallel"
    )


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("sed", "seed"),
        ("polcy", "policy"),
        ("train.group_size", "rollout.group_size"),
        ("rollout.groupsize", "rollout.group_size"),
        ("algorithm.loss.clip.kinds", "algorithm.loss.clip.kind"),
        ("algorithm.clip_low", "algorithm.loss.clip_low"),
        ("policy.fp8.recipee", "policy.fp8.recipe"),
        ("sft.warmup", "sft.warmup_steps"),
        ("train.warmup", "train.warmup_steps"),
        ("train.batch_size", "sft.batch_size"),
        ("policy.tensor_parallel_size", "policy.tensor_parallel"),
        ("train.max_steps", "train.steps"),
    ],
)
def test_the_nearest_key_is_the_one_meant(tmp_path: Path, wrong: str, near: str) -> None:
    assert refusal(tmp_path, MINIMAL, f"{wrong}=1").endswith(f"nearest valid key: {near}")


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    text = MINIMAL + 'train: {steps: 0.5, lr: "fast"}\npolicy: {dtype: fp8, sequence_parallel: 1}\n'
    assert refusal(tmp_path, text, "seed=-1").splitlines() == [
        "5 problems in the configuration:",
        "  - --set seed=-1: seed: must be greater than or equal to 0, not -1",
        "  - run.yaml:3: train.steps: must be a valid integer, not 0.5",
        "  - run.yaml:3: train.lr: must be a valid number, not 'fast'",
        "  - run.yaml:4: policy.sequence_parallel: must be a valid boolean, not 1",
        "  - run.yaml:4: policy.dtype: must be 'fp32' or 'bf16', not 'fp8'",
    ]


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("seed: 1\n", [], "model: the section is missing; it needs model.path"),
        (MINIMAL, ["sft.base=b"], "--set sft.base=b: sft.path: is required"),
        ("model: {path: m}\ndata: {path: 5}\n", [], "quotes: '5'"),
        (MINIMAL + "train:\n", [], "run.yaml:3: train: is an empty section; give it keys or"),
        (MINIMAL + "train: 5\n", [], "run.yaml:3: train: is a section of keys, not 5"),
        (MINIMAL + "seed: 1\nseed: 2\n", [], "run.yaml:4: seed is written twice (first in line 3)"),
        (MINIMAL + "train: {lr: .nan}\n", [], "run.yaml:3: train.lr: must be"),
        (MINIMAL + "algorithm: {loss: {clip: {min: .inf}}}\n", [], "must be a finite number"),
        (
            MINIMAL + "algorithm: {preset: agpo_v2}\n",
            [],
            "must be 'agpo', 'agpo_v1', 'agpo_v3', 'agpo_v3_a",
        ),
        (MINIMAL + "7: x\n", [], "run.yaml:3: keys must be text, not '7'"),
        (MINIMAL + "seed: [1\n", [], "run.yaml:4: not valid YAML: "),
        ("- seed\n", [], "must hold `section:` mappings, not a list"),
        (MINIMAL + 'run: {dir: "{run_dir}/x"}\n', [], "run.dir: must be a folder's path without"),
        (MINIMAL, ["train.steps"], "--set train.steps: must have the form a.b=c"),
        (MINIMAL, ["train..steps=1"], "must have the form a.b=c"),
        (MINIMAL, ["seed.x=1"], "seed.x"),
        (MINIMAL + "seed: 1\n", ["seed.x=1"], "seed is a value, not a section; use --set seed="),
        (MINIMAL, ["train.steps=[1"], "--set train.steps=[1:1: not valid YAML"),
    ],
)
def test_a_refusal_names_place_and_fix(
    tmp_path: Path, text: str, overrides: list[str], message: str
) -> None:
    assert message in refusal(tmp_path, text, *overrides)


def test_a_missing_file_lists_the_configs_there_are(tmp_path: Path) -> None:
    written(tmp_path, MINIMAL)
    with pytest.raises(ConfigError, match=r"tiny\.yaml: no such configuration file.*run\.yaml"):
        load_config(tmp_path / "tiny.yaml")
    with pytest.raises(ConfigError, match="cannot be read as a UTF-8 text file"):
        load_config(tmp_path)


def test_a_config_cannot_be_changed_after_loading(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]


def test_the_saved_config_reads_back_equal_and_says_what_set_each_value(tmp_path: Path) -> None:
    text = MINIMAL + (
        'seed: 5\ntrain: {lr: 1e-4}\nsft: {base: b, path: "p: #1"}\n'
        "algorithm: {preset: agpo_v1}\nrollout: {server_args: {max_total_tokens: 4096, lora_paths: [a, b]}}\n"
        'eval: {sets: [{path: "1e5", n: 4, temperature: 0.6}, {path: "ü: #", reward: [{name: math, weight: 0.5}]}]}\n'
        "reward: {function: [{name: numeric, options: {extract: box}}]}\n"
    )
    prefix = 'data.prefix="Q: 1+1\\nA: \\\\boxed{2} ünicode"'
    config, origin = resolve_config(written(tmp_path, text), [prefix], "runs/x")
    saved = resolved_yaml(config, origin)
    again, _ = resolve_config(written(tmp_path, saved))
    assert again == config
    assert again.data.prefix == "Q: 1+1\nA: \\boxed{2} ünicode"
    lines = saved.splitlines()
    assert "seed: 5  # file" in lines
    assert "  dir: runs/x  # --run-dir" in lines
    assert "  lr: 0.0001  # file" in lines
    assert "    kind: agpo  # preset agpo_v1" in lines
    assert "  group_size: 8" in lines


@given(
    st.one_of(
        st.text(),
        st.integers(),
        st.booleans(),
        st.floats(allow_nan=False),
        st.lists(st.text(), max_size=3),
    )
)
def test_any_value_survives_being_written(value: Any) -> None:
    line = yaml_line("key", value)
    assert "\n" not in line
    assert parse_yaml(line, "x")[0] == {"key": value}


def test_package_versions_name_the_engines() -> None:
    versions = package_versions()
    assert versions["megatron-core"] == "0.19.2"
    assert versions["sglang"] == "0.5.23"
    assert "python" in versions
