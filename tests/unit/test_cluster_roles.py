"""Slurm's environment to roles: pure, so every site's shape can be tried here."""

from __future__ import annotations

from typing import Any

import pytest

from agpo_megatron.cluster.roles import (
    LaunchError,
    NodeRoles,
    Plan,
    cluster_plan,
    expand_hosts,
    machine_plan,
    slurm_plan,
)
from agpo_megatron.config import Config


def config(
    trainers: int = 2, rollouts: int = 1, gpus: int = 8, backend: str = "auto", **sizes: Any
) -> Config:
    policy = {k: v for k, v in sizes.items() if k != "servers" and k != "server_tp"}
    return Config.model_validate(
        {
            "model": {"path": "m"},
            "data": {"path": "d"},
            "policy": policy,
            "rollout": {
                "servers": sizes.get("servers", 1),
                "tensor_parallel": sizes.get("server_tp", 1),
            },
            "cluster": {
                "trainer_nodes": trainers,
                "rollout_nodes": rollouts,
                "gpus_per_node": gpus,
                "publish_backend": backend,
            },
        }
    )


SEVENTY = config(
    12, 12, tensor_parallel=8, pipeline_parallel=4, data_parallel=3, servers=12, server_tp=8
)


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("n1", ["n1"]),
        ("n[1-3,7]", ["n1", "n2", "n3", "n7"]),
        ("gpu[08-10]", ["gpu08", "gpu09", "gpu10"]),
        ("r1n[1-2],r2n5,login", ["r1n1", "r1n2", "r2n5", "login"]),
        ("r[1-2]n[1-2]-ib", ["r1n1-ib", "r1n2-ib", "r2n1-ib", "r2n2-ib"]),
        ("a-b[001,010-011]", ["a-b001", "a-b010", "a-b011"]),
    ],
)
def test_host_lists_expand_as_scontrol_does(nodelist: str, hosts: list[str]) -> None:
    assert expand_hosts(nodelist) == hosts


@pytest.mark.parametrize("nodelist", ["", "n[1-", "n[a-b]"])
def test_what_is_no_host_list_is_refused(nodelist: str) -> None:
    with pytest.raises(LaunchError, match="not a Slurm host list"):
        expand_hosts(nodelist)


def test_the_production_job_has_its_96_ranks_and_12_servers_in_place() -> None:
    plan = slurm_plan({"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n[01-24]"}, SEVENTY)
    assert plan.world_size == 96
    assert [n.host for n in plan.nodes] == [f"n{i:02d}" for i in range(1, 25)]
    assert [rank for node in plan.nodes for rank in node.ranks] == list(range(96))
    assert all(len(node.ranks) == 8 and not node.servers for node in plan.nodes[:12])
    assert [node.servers for node in plan.nodes[12:]] == [(i,) for i in range(12)]
    assert [node.host for node in plan.nodes if node.controller] == ["n01"] == [plan.master]
    assert plan.trainer_hosts == [f"n{i:02d}" for i in range(1, 13)]
    assert plan.rollout_hosts == [f"n{i:02d}" for i in range(13, 25)]
    assert Plan.from_dict(plan.as_dict()) == plan


def test_components_of_a_heterogeneous_job_are_trainers_and_servers() -> None:
    environment = {
        "SLURM_JOB_ID": "5",
        "SLURM_HET_SIZE": "2",
        "SLURM_JOB_NODELIST": "a[1-2]",
        "SLURM_JOB_NODELIST_HET_GROUP_0": "a[1-2]",
        "SLURM_JOB_NODELIST_HET_GROUP_1": "b9",
    }
    plan = slurm_plan(environment, config(tensor_parallel=2))
    assert plan.nodes == (
        NodeRoles("a1", ranks=(0,), controller=True),
        NodeRoles("a2", ranks=(1,)),
        NodeRoles("b9", servers=(0,)),
    )
    environment["SLURM_JOB_NODELIST_HET_GROUP_1"] = "b[8-9]"
    with pytest.raises(LaunchError, match=r"components of 2 and 2 nodes.*trainer_nodes 2.*1"):
        slurm_plan(environment, config(tensor_parallel=2))


def test_the_wrong_number_of_nodes_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(LaunchError) as refusal:
        slurm_plan({"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n[1-23]"}, SEVENTY)
    text = str(refusal.value)
    assert "trainer_nodes 12 + cluster.rollout_nodes 12 = 24 nodes" in text
    assert "the allocation has 23 (n[1-23])" in text
    assert "sbatch --nodes=24" in text


def test_a_cold_start_and_an_evaluation_need_fewer_nodes() -> None:
    """The trainers' alone, or the controller's and the servers'; all that training has are accepted too."""
    for nodelist in ("n[01-12]", "n[01-24]"):
        job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": nodelist}
        plan = slurm_plan(job, SEVENTY, "sft")
        assert [rank for node in plan.nodes for rank in node.ranks] == list(range(96))
        assert plan.rollout_hosts == [] and plan.trainer_hosts == expand_hosts("n[01-12]")
    for nodelist, servers in (("n[01-13]", "n[02-13]"), ("n[01-24]", "n[13-24]")):
        job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": nodelist}
        plan = slurm_plan(job, SEVENTY, "eval")
        assert plan.trainer_hosts == ["n01"] and plan.rollout_hosts == expand_hosts(servers)
        assert [node.servers for node in plan.nodes] == [(), *((i,) for i in range(12))]
    shared = config(2, 0, servers=4)
    plan = slurm_plan({"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n[1-2]"}, shared, "eval")
    assert [node.servers for node in plan.nodes] == [(0, 1), (2, 3)]
    with pytest.raises(LaunchError) as refusal:
        slurm_plan({"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n[1-11]"}, SEVENTY, "sft")
    assert "= 24 nodes, of which sft needs 12, but the allocation has 11" in str(refusal.value)
    assert "sbatch --nodes=12 --gpus-per-node=8 launch/agpo_70b.sh --mode sft CONFIG" in str(
        refusal.value
    )


def test_outside_a_job_there_is_no_plan_and_no_localhost() -> None:
    with pytest.raises(LaunchError, match="no Slurm job"):
        slurm_plan({"SLURM_JOB_NODELIST": "n1"}, SEVENTY)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (config(2, 1, data_parallel=3), r"3 ranks .*cluster.trainer_nodes 2 \(3 = 2 x 1 \+ 1\)"),
        (config(1, 2, servers=3), r"3 servers .*cluster.rollout_nodes 2"),
        (config(1, 1, gpus=4, data_parallel=8), r"a trainer node would need 8 devices.*4"),
        (config(1, 1, gpus=4, servers=1, server_tp=8), r"a rollout node would need 8 devices"),
        (config(1, 0, gpus=8, data_parallel=4, servers=5), r"a trainer node would need 9 devices"),
        (config(1, 0, gpus=1, backend="gloo", data_parallel=4), r"a trainer node would need 4 dev"),
        (config(1, 0, gpus=1, backend="gloo", server_tp=2), r"a trainer node would need 2 devices"),
    ],
)
def test_what_does_not_divide_or_fit_is_refused(given: Config, message: str) -> None:
    trainers = [f"t{i}" for i in range(given.cluster.trainer_nodes)]
    rollouts = [f"r{i}" for i in range(given.cluster.rollout_nodes)]
    with pytest.raises(LaunchError, match=message):
        cluster_plan(given, trainers, rollouts)


def test_without_rollout_nodes_the_servers_share_the_trainers() -> None:
    plan = slurm_plan(
        {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n[1-2]"},
        config(2, 0, data_parallel=8, servers=4, server_tp=2),
    )
    assert plan.nodes == (
        NodeRoles("n1", ranks=(0, 1, 2, 3), servers=(0, 1), controller=True),
        NodeRoles("n2", ranks=(4, 5, 6, 7), servers=(2, 3)),
    )
    assert plan.rollout_hosts == []


def test_with_gloo_servers_share_the_gpus_of_ranks() -> None:
    given = config(1, 0, gpus=2, backend="gloo", tensor_parallel=2, servers=2)
    (node,) = cluster_plan(given, ["n"], []).nodes
    assert (node.ranks, node.servers) == ((0, 1), (0, 1))


def test_one_machine_takes_everything_whatever_the_node_counts() -> None:
    plan = machine_plan(SEVENTY, "here", "train")
    assert (len(plan.nodes), len(plan.nodes[0].ranks), len(plan.nodes[0].servers)) == (1, 96, 12)
    assert machine_plan(SEVENTY, "here", "replay").server_count == 0
    assert machine_plan(SEVENTY, "here", "eval").nodes[0].ranks == ()
