"""Keys of lists: read, refused with their place, saved and read again, checked against each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from agpo_megatron.config import ConfigError
from agpo_megatron.config.checks import check_config
from agpo_megatron.config.keys import schema_keys
from agpo_megatron.config.loading import load_config, resolve_config
from agpo_megatron.config.record import resolved_yaml

BASE = "model: {path: m}\n"


def loaded(tmp_path: Path, text: str, *overrides: str) -> object:
    path = tmp_path / "run.yaml"
    path.write_text(BASE + text)
    return load_config(path, overrides)


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_config(loaded(tmp_path, text, *overrides))  # type: ignore[arg-type]
    return "\n".join(caught.value.problems)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {sources: [{path: a, wieght: 2}]}", "unknown key; nearest valid key: data.sources[].weight"),
        ("data: {sources: [{weight: 2.0}]}", "data.sources.0.path: is required"),
        ("data: {sources: [{path: a, weight: -1.0}]}", "data.sources.0.weight: must be greater than 0"),
        ("eval: {sets: [{path: a, n: none}]}", "eval.sets.0.n: must be a valid integer"),
        ("reward: {function: [{nmae: math}]}", "unknown key; nearest valid key: reward.function[].name"),
        ("data: {path: a, sources: [{path: b}]}", "path a and sources are both set"),
        ("data: {path: a, system: be brief}", "are parts of a chat template; set chat_template true"),
        ("data: {sources: [{path: x/a}, {path: y/a}]}", "data.sources: 'a' is the name of several"),
        ("data: {path: a}\neval: {sets: [{path: b, n: 4}]}", "n 4 samples of b at temperature 0 would be 4 times"),
        ("data: {path: a}\nreward: {correct: 0.0}", "correct 0 must be above wrong 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(tmp_path, text)


def test_lists_are_saved_and_overridden(tmp_path: Path) -> None:
    text = (
        'data: {sources: [{path: "{run_dir}/a", weight: 0.25}], template_options: {deep: {x: [1, null]}}}\n'
        "eval: {sets: [{path: b, n: 2, temperature: 0.6, reward: [{name: math, options: {extract: tag}}]}]}\n"
        'reward: {function: "my file.py:score"}\n'
    )
    path = tmp_path / "run.yaml"
    path.write_text(BASE + text)
    config, origin = resolve_config(path, ["eval.sets=[{path: c}]"], "runs/x")
    assert config.data.sources[0].path == "runs/x/a"
    assert (config.eval.sets[0].path, origin["eval.sets"]) == ("c", "--set")
    saved = tmp_path / "saved.yaml"
    saved.write_text(resolved_yaml(config, origin))
    assert load_config(saved) == config
    full, _ = resolve_config(path)
    saved.write_text(resolved_yaml(full))
    assert load_config(saved) == full


def test_keys_of_lists_are_listed_once() -> None:
    names = [key.name for key in schema_keys()]
    assert len(names) == len(set(names))
    assert {"data.sources[].weight", "eval.sets[].n", "reward.function[].options"} <= set(names)
    assert not any(name.startswith("data.sources[].reward[]") for name in names)
