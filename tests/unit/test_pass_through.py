"""Flags and fields that are handed on: the project's own are refused, others are asked of the real packages."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from test_rollout_server_command import config as server_config
from tiny_run import write_run

from agpo_megatron.cli import main
from agpo_megatron.cluster.pass_through import check_pass_through_here
from agpo_megatron.cluster.preflight import gather_facts
from agpo_megatron.cluster.roles import NodeRoles
from agpo_megatron.config import ConfigError, load_config
from agpo_megatron.config.checks import check_config
from agpo_megatron.config.pass_through import (
    OWNED_MEGATRON,
    OWNED_SERVER_ARGS,
    SERVER_DEFAULTS,
)
from agpo_megatron.config.schema import Fp8Config, PolicyConfig
from agpo_megatron.rollout.server import server_command, words


def refused(tmp_path: Path, *overrides: str) -> list[str]:
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: m}\ndata: {path: d, max_prompt_tokens: 64}\n")
    with pytest.raises(ConfigError) as error:
        check_config(load_config(path, overrides))
    return error.value.problems


def test_what_the_project_sets_is_refused_with_its_key(tmp_path: Path) -> None:
    assert refused(
        tmp_path,
        "rollout.server_args={port: 1, tp_size: 2, weight_version: x}",
        "policy.megatron={num_layers: 3, tensor_model_parallel_size: 2, calculate_per_token_loss: false}",
    ) == [
        "rollout.server_args.port: use rollout.port",
        "rollout.server_args.tp_size: use rollout.tensor_parallel",
        "rollout.server_args.weight_version: set by the project because it says which weights a server holds",
        "policy.megatron.num_layers: set by the project because the checkpoint decides it (model.path)",
        "policy.megatron.tensor_model_parallel_size: use policy.tensor_parallel",
        "policy.megatron.calculate_per_token_loss: set by the project because losses are sums, which no layout may "
        "change",
    ]
    on_a_cpu = refused(tmp_path, "rollout.server_args.attention_backend=fa3", "cluster.device=cpu")
    assert "attention_backend: set by the project because the published wheel" in on_a_cpu[0]
    on_a_gpu = refused(
        tmp_path, "rollout.server_args={attention_backend: fa3, host: x}", "cluster.device=cuda"
    )
    assert [problem for problem in on_a_gpu if "attention_backend" in problem] == []


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("mem_fraction_static=1.5", "must be a number between 0 and 1, not 1.5"),
        ("mem_fraction_static=true", "must be a number between 0 and 1, not True"),
        ("max_total_tokens=100", "at least 256 tokens, not 100"),
        ("max_total_tokens=1e4", "a whole number of at least 256 tokens, not 10000.0"),
        ("max_total_tokens=300", "cannot hold one sample of data.max_prompt_tokens 64"),
    ],
)
def test_memory_of_servers_is_checked_here(tmp_path: Path, argument: str, words: str) -> None:
    assert words in refused(tmp_path, f"rollout.server_args.{argument}")[0]


def test_given_flags_reach_the_command_line_and_win_over_the_project_s_default() -> None:
    args: dict[str, Any] = {"mem_fraction_static": 0.5, "chunked_prefill_size": 512}
    args |= {"disable_cuda_graph": True, "enable_metrics": False, "revision_date": None}
    launch = server_command(server_config("cuda", server_args=args), "m", port=1)
    line = " ".join(launch.argv)
    assert "--mem-fraction-static 0.5" in line and line.count("mem-fraction") == 1
    assert "--chunked-prefill-size 512" in line and "--disable-cuda-graph" in line
    assert "--enable-metrics" not in line and "--revision" not in line
    default = server_command(server_config("cuda"), "m", port=1).argv
    assert default[default.index("--mem-fraction-static") + 1] == "0.8"
    on_a_cpu = server_command(
        server_config(server_args={"max_total_tokens": 700}), "m", port=1
    ).argv
    assert on_a_cpu[on_a_cpu.index("--max-total-tokens") + 1] == "700"
    assert words("cuda-graph-bs", [1, 2]) == ["--cuda-graph-bs", "1", "2"]
    assert words("x", {"a": 1}) == ["--x", '{"a": 1}']


def test_every_flag_that_the_project_sets_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "complete.json").write_text("{}")
    for device, dtype in (("cpu", "fp32"), ("cuda", "bf16")):
        argv = server_command(server_config(device, dtype), str(tmp_path), port=1).argv
        flags = {w.removeprefix("--").replace("-", "_") for w in argv if w.startswith("--")}
        assert flags <= {*OWNED_SERVER_ARGS, *SERVER_DEFAULTS}, flags


@pytest.mark.processes
def test_every_field_that_the_project_sets_is_its_own_and_exists() -> None:
    from agpo_megatron.conversion.shape import ModelShape
    from agpo_megatron.parity.models import MIXTRAL
    from agpo_megatron.policy import backend

    backend.activate("cpu")
    from megatron.core.transformer.transformer_config import TransformerConfig

    from agpo_megatron.policy.model import own_fields

    policy = PolicyConfig(recompute="full")
    fields = own_fields(ModelShape.from_hf(MIXTRAL), policy, backend.current())
    free = {"recompute_method", "recompute_num_layers"}  # of policy.recompute: full
    assert fields.keys() - free <= OWNED_MEGATRON.keys()
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert OWNED_MEGATRON.keys() <= known, OWNED_MEGATRON.keys() - known
    on_a_gpu = dataclasses.replace(backend.current(), transformer_engine=True)
    fp8 = PolicyConfig(fp8=Fp8Config(recipe="blockwise"))
    assert own_fields(ModelShape.from_hf(MIXTRAL), fp8, on_a_gpu).keys() <= OWNED_MEGATRON.keys()


@pytest.mark.processes
def test_given_fields_reach_megatron() -> None:
    from agpo_megatron.conversion.shape import ModelShape
    from agpo_megatron.parity.models import MIXTRAL
    from agpo_megatron.policy import backend

    backend.activate("cpu")
    from agpo_megatron.policy.model import transformer_config

    given = {
        "fp32_residual_connection": True,
        "attention_backend": "flash",
        "recompute_num_layers": 2,
    }
    policy = PolicyConfig(recompute="full", megatron=given)
    built = transformer_config(ModelShape.from_hf(MIXTRAL), policy)
    assert built.fp32_residual_connection is True
    assert built.attention_backend.name == "flash"
    assert built.recompute_num_layers == 2
    wrong = policy.model_copy(update={"megatron": {"fp32_residual_connexion": True}})
    with pytest.raises(ValueError, match="nearest: fp32_residual_connection"):
        transformer_config(ModelShape.from_hf(MIXTRAL), wrong)


@pytest.mark.processes
def test_the_preflight_asks_sglang_on_the_node_of_a_server(tmp_path: Path) -> None:
    args = {
        "chunked_prefill_sze": 1,
        "model": "x",
        "schedule_policy": "fastest",
        "schedule_conservativeness": 1.5,
        "disable_cuda_graph": True,
        "disable_radix_cache": False,
        "max_total_tokens": 4096,
    }
    config = load_config(write_run(tmp_path, **{"rollout.server_args": args}))
    node = NodeRoles("n1", servers=(0,))
    problems = gather_facts(node, config, "train", "127.0.0.1", "", 1).problems
    assert problems[0] == (
        "rollout.server_args.chunked_prefill_sze: SGLang has no flag --chunked_prefill_sze; nearest: "
        "chunked_prefill_size"
    )
    assert problems[1] == "rollout.server_args.model: use model.path"  # an alias
    assert "schedule_policy: argument --schedule-policy: invalid choice: 'fastest'" in problems[2]
    assert len(problems) == 3


@pytest.mark.full
@pytest.mark.processes
def test_check_asks_megatron(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    field = "policy.megatron.fp32_residual_connection"
    assert main(["check", str(write_run(tmp_path)), "--set", f"{field}=1"]) == 2
    assert f"{field}: must be a valid boolean, not 1" in capsys.readouterr().err


def test_check_says_where_a_value_comes_from_and_what_cannot_be_asked_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROLLOUT_PYTHON", "/bin/false")
    config = write_run(tmp_path, **{"rollout.server_args": {"enable_metrics": True}})
    assert main(["check", str(config), "--set", "rollout.server_args.log_level=error"]) == 0
    shown = capsys.readouterr()
    assert "    enable_metrics: true  # file\n    log_level: error  # --set\n" in shown.out
    assert "note: not checked here, but by the preflight of the run: SGLang" in shown.err
    assert "/bin/false" in shown.err and "ROLLOUT_PYTHON" in shown.err


def test_nothing_is_asked_where_nothing_is_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROLLOUT_PYTHON", "/bin/false")
    monkeypatch.setenv("TRAIN_PYTHON", "/bin/false")
    path = write_run(tmp_path, **{"rollout.server_args": {"max_total_tokens": 4096}})
    assert list(check_pass_through_here(load_config(path))) == []
