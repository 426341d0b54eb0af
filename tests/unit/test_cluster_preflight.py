"""Preflight and addresses: real sockets, real files; every failure names node, cause and fix."""

from __future__ import annotations

import importlib.util
import resource
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import write_run

from agpo_megatron.cluster import address, processes
from agpo_megatron.cluster.address import own_address
from agpo_megatron.cluster.preflight import (
    Calls,
    Hello,
    NodeFacts,
    call_others,
    descriptor_problems,
    gather_facts,
    judge,
)
from agpo_megatron.cluster.roles import LaunchError, NodeRoles, Plan
from agpo_megatron.cluster.start_folder import StartFolder
from agpo_megatron.config import load_config
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.wait import WaitExpired

pytestmark = pytest.mark.processes

PLAN = Plan(
    "train",
    (NodeRoles("a", (0,), controller=True), NodeRoles("b", (1,)), NodeRoles("c", (), (0,))),
    2,
)
TRAIN = {"agpo_megatron": "0.1.0", "torch": "2.13.0", "nccl": "2.30.7"}
VERSIONS = {"trainer": TRAIN, "rollout": {**TRAIN, "torch": "2.14.1"}}
GOOD = NodeFacts("10.0.0.1", "eth0", 1, {}, VERSIONS, [81559] * 8, [])
HEARD = Calls({"x": 0.01}, {})


def verdict(calls: dict[str, Calls] | None = None, **facts: NodeFacts) -> str:
    everyone = {"a": GOOD, "b": GOOD, "c": GOOD} | facts
    return judge(PLAN, everyone, {"a": HEARD, "b": HEARD, "c": HEARD} | (calls or {})).failure


def test_nodes_that_are_alike_pass_and_the_table_names_them() -> None:
    result = judge(PLAN, {"a": GOOD, "b": GOOD, "c": GOOD}, dict.fromkeys("abc", HEARD))
    assert result.failure == ""
    lines = result.table.splitlines()
    assert [line.split()[0] for line in lines] == ["node", "a", "b", "c"]
    assert "controller, rank 0" in lines[1] and "server 0" in lines[3]
    assert "10.0.0.1 (eth0)" in lines[2] and "FAILED" not in result.table


def test_the_first_failure_names_node_and_fix() -> None:
    other = replace(GOOD, versions={"trainer": {**TRAIN, "torch": "2.12.0"}})
    assert verdict(b=other) == (
        "b: torch is 2.12.0 in its trainer environment, 2.13.0 in the trainer environment of a; give both the same"
    )
    servers = replace(GOOD, versions={"rollout": {**TRAIN, "torch": "2.14.1"}})
    assert verdict(a=replace(GOOD, versions={"trainer": TRAIN}), c=servers) == ""
    ours = replace(GOOD, versions={"rollout": {**TRAIN, "agpo_megatron": "0.0.9"}})
    assert "c: agpo_megatron is 0.0.9" in verdict(
        a=replace(GOOD, versions={"trainer": TRAIN}), c=ours
    )
    small = replace(GOOD, gpu_memory=[81559] * 7 + [40960])
    assert verdict(b=small) == (
        "b: its smallest GPU has 40960 MiB, those of a 81559; exclude the node"
    )
    assert verdict({"b": Calls({"a": -7.5}, {})}).startswith("b: its clock differs")
    assert verdict({"c": Calls({}, {"a": "10.0.0.1:1: refused"})}).startswith("c: cannot reach a")
    assert verdict(a=replace(GOOD, problems=["x"]), b=small) == "a: x"


def test_facts_of_a_real_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(write_run(tmp_path, **{"observe.prometheus_port": 17602}))
    roles = NodeRoles("here", (0, 1), (0,), controller=True)
    # 17601 is this node's own for the preflight, and nothing is given to two: they are bound a minute later.
    draws = iter([17601, 17602, 17603, 17603, 17604, 17604, 17603, 17605, *range(17606, 17700)])
    monkeypatch.setattr(processes.random, "randrange", lambda *_: next(draws))
    facts = gather_facts(roles, config, "train", "127.0.0.1", "lo", 17601)
    monkeypatch.undo()
    assert facts.problems == []
    assert set(facts.ports) == {"controller", "master", "rollout server 0"}
    assert len(set(facts.ports.values())) == 3
    assert not {17601, 17602} & set(facts.ports.values())
    assert {"torch", "sglang", "megatron-core"} <= set(facts.versions["trainer"])
    assert facts.versions["rollout"] == facts.versions["trainer"]
    for weights in (tmp_path / "model").glob("*.safetensors"):
        weights.unlink()
    (tmp_path / "train.jsonl").unlink()
    broken = gather_facts(roles, config, "train", "127.0.0.1", "lo", 1)
    assert "has no weights" in broken.problems[0] and "data.path" in broken.problems[0]


def test_the_hard_limit_of_open_files_covers_the_controllers_connections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"rollout.servers": 12, "rollout.max_in_flight": 100, "policy.data_parallel": 48}
    config = load_config(write_run(tmp_path, **changes))
    # 12 servers x (100 + an eighth of it, 13) requests, 2 x 96 ranks, 512 for the rest.
    assert descriptor_problems(config, "train", 2060) == []
    assert descriptor_problems(config, "train", resource.RLIM_INFINITY) == []
    (problem,) = descriptor_problems(config, "train", 2059)
    assert problem == (
        "the controller may open 2059 files (hard limit), but needs up to rollout.servers 12 x (max_in_flight 100 + 13 "
        "for evaluations) + 2 x 96 ranks + 512 = 2060; raise the hard limit (`ulimit -Hn`, or LimitNOFILE of slurmd), "
        "or lower rollout.max_in_flight"
    )
    assert descriptor_problems(config, "eval", 1868) == []
    assert descriptor_problems(config, "replay", 704) == []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 1000))
    controller = NodeRoles("here", controller=True)
    here = gather_facts(controller, config, "train", "127.0.0.1", "lo", 1)
    assert [p for p in here.problems if "may open 1000 files" in p]
    there = gather_facts(NodeRoles("there", servers=(0,)), config, "train", "127.0.0.1", "lo", 1)
    assert there.problems == []


def test_nodes_call_each_other() -> None:
    with Hello("127.0.0.1") as alive:
        facts = {
            "a": replace(GOOD, address="127.0.0.1", hello_port=alive.port),
            "b": replace(GOOD, address="127.0.0.1", hello_port=alive.port),
        }
        calls = call_others("a", facts)
        assert calls.unreachable == {} and abs(calls.skew["b"]) < 1.0
    assert "127.0.0.1" in call_others("a", facts).unreachable["b"]


def test_a_node_that_reports_nothing_is_named(tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path))
    start = StartFolder.create(RunFolder(tmp_path / "run"), "1-0", PLAN, config)
    threading.Timer(0.3, start.write_node, ("a", "facts", {"n": 1})).start()
    with pytest.raises(WaitExpired, match="nothing from b, c"):
        start.wait_nodes(["a", "b", "c"], "facts", time.monotonic() + 1.0)
    assert start.wait_nodes(["a"], "facts", time.monotonic() + 1.0) == {"a": {"n": 1}}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"a": "10.1.0.1", "b": "10.1.0.2"}, "10.1.0.1"),
        ({"a": "127.0.1.1", "b": "10.1.0.2"}, "source towards 10.1.0.2"),  # Debian's /etc/hosts
        ({"a": "127.0.1.1", "b": "127.0.1.2"}, "127.0.1.1"),  # one machine plays all nodes
    ],
)
def test_the_address_others_reach(
    names: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(address, "resolve", names.__getitem__)
    monkeypatch.setattr(address, "source_towards", lambda peer: f"source towards {peer}")
    assert own_address("a", ["b"]) == expected


def test_there_is_no_fallback_to_localhost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "resolve", lambda name: "127.0.0.1")
    with pytest.raises(LaunchError, match="correct /etc/hosts"):
        own_address("a", ["b"])
    with pytest.raises(LaunchError, match="no IPv4 address on interface nosuch0"):
        own_address("a", ["b"], "nosuch0")


def test_what_observe_asks_for_must_be_there_on_the_controllers_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        observe = {"prometheus_port": port, "writers": ["tensorboard", "wandb"]}
        config = load_config(write_run(tmp_path, observe=observe))
        found = importlib.util.find_spec
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name, *a: None if name == "wandb" else found(name)
        )
        here = gather_facts(NodeRoles("a", controller=True), config, "train", "127.0.0.1", "", 1)
        elsewhere = gather_facts(NodeRoles("b", servers=(0,)), config, "train", "127.0.0.1", "", 1)
    assert here.problems == [
        "observe.writers: wandb is not installed here; pip install wandb, or leave it out",
        f"observe.prometheus_port {port} on this node is in use; stop what listens there, or set "
        "observe.prometheus_port to a free one (0: none)",
    ]
    assert elsewhere.problems == []
