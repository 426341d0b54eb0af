"""Derives the roles of every node from Slurm's environment (or one machine) and the config. Pure.

An allocation is cut in two: trainer nodes first, rollout nodes after them (or component 0 and component 1 of a
heterogeneous job). Modes without servers (a cold start, a replay) need the trainer nodes alone. The controller runs
beside trainer rank 0, whose node is also torch.distributed's master. With ``cluster.rollout_nodes: 0`` the servers
share the trainers' nodes and take the devices behind the ranks'.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from agpo_megatron.config.schema import Config

MODES_WITH_SERVERS = ("train", "eval")
HOSTS = r"(?:[\w.-]|\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\])+"
"""Between the commas of a host list outside brackets: ``gpu[01-03,7]-ib``."""
MODES_WITH_TRAINERS = ("train", "sft", "replay")


class LaunchError(ValueError):
    """The nodes at hand are not those that the config asks for."""


@dataclass(frozen=True)
class NodeRoles:
    """Roles of one node. ``ranks``: global trainer ranks, by local rank. ``servers``: numbers of rollout servers.

    Devices of the node: one per rank, then ``tensor_parallel`` per server, both in order.
    """

    host: str
    ranks: tuple[int, ...] = ()
    servers: tuple[int, ...] = ()
    controller: bool = False


@dataclass(frozen=True)
class Plan:
    """All nodes of one start. ``master``: host of the controller and of trainer rank 0."""

    mode: str
    nodes: tuple[NodeRoles, ...]
    world_size: int

    @property
    def master(self) -> str:
        return next(node.host for node in self.nodes if node.controller)

    @property
    def trainer_hosts(self) -> list[str]:
        """The master and every other node with ranks: one Slurm step."""
        return [node.host for node in self.nodes if node.ranks or node.controller]

    @property
    def rollout_hosts(self) -> list[str]:
        """Nodes with nothing but servers: a Slurm step each, so that losing one ends no other."""
        return [node.host for node in self.nodes if not node.ranks and not node.controller]

    @property
    def server_count(self) -> int:
        return sum(len(node.servers) for node in self.nodes)

    def on(self, host: str) -> NodeRoles:
        """Find the roles of ``host``. Raises LaunchError when it has no part in the plan."""
        for node in self.nodes:
            if node.host == host:
                return node
        raise LaunchError(
            f"{host} has no role in this run, whose nodes are {', '.join(n.host for n in self.nodes)}"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Plan:
        nodes = tuple(
            NodeRoles(n["host"], tuple(n["ranks"]), tuple(n["servers"]), n["controller"])
            for n in values["nodes"]
        )
        return Plan(values["mode"], nodes, values["world_size"])


def slurm_plan(environment: Mapping[str, str], config: Config, mode: str = "train") -> Plan:
    """Plan a job from its Slurm variables, those of a heterogeneous job included.

    Raises LaunchError, with the arithmetic, outside a job and when the allocation is not what the config asks for.
    """
    trainers, rollouts = config.cluster.trainer_nodes, config.cluster.rollout_nodes
    if "SLURM_JOB_ID" not in environment:
        raise LaunchError(
            "this is no Slurm job (SLURM_JOB_ID is not set); submit with\n  "
            + submit_line(config, mode)
        )
    if components := int(environment.get("SLURM_HET_SIZE", "0")):
        groups = [
            expand_hosts(environment[f"SLURM_JOB_NODELIST_HET_GROUP_{i}"])
            for i in range(components)
        ]
        have = [len(group) for group in groups]
        if have != [trainers, rollouts]:
            raise LaunchError(
                f"the heterogeneous job has components of {' and '.join(map(str, have))} nodes, but the config asks "
                f"for cluster.trainer_nodes {trainers} and cluster.rollout_nodes {rollouts}, in this order"
            )
        return cluster_plan(config, groups[0], groups[1], mode)
    hosts = expand_hosts(environment["SLURM_JOB_NODELIST"])
    needed = nodes_needed(config, mode)
    if len(hosts) == sum(needed):  # a cold start needs no rollout nodes
        return cluster_plan(config, hosts[: needed[0]], hosts[needed[0] :], mode)
    if len(hosts) != trainers + rollouts:
        raise LaunchError(
            f"cluster.trainer_nodes {trainers} + cluster.rollout_nodes {rollouts} = {trainers + rollouts} nodes"
            + (
                f", of which {mode} needs {sum(needed)}"
                if sum(needed) < trainers + rollouts
                else ""
            )
            + f", but the allocation has {len(hosts)} ({environment['SLURM_JOB_NODELIST']}); submit with\n  "
            + submit_line(config, mode)
        )
    return cluster_plan(config, hosts[:trainers], hosts[trainers:], mode)


def nodes_needed(config: Config, mode: str) -> tuple[int, int]:
    """Count the nodes of trainers and of servers that ``mode`` needs: without servers, or with the controller alone,
    fewer than the config asks for."""
    trainers, rollouts = config.cluster.trainer_nodes, config.cluster.rollout_nodes
    if mode not in MODES_WITH_SERVERS:
        return trainers, 0
    return (trainers if mode in MODES_WITH_TRAINERS or not rollouts else 1), rollouts


def submit_line(config: Config, mode: str = "train") -> str:
    gpus = f" --gpus-per-node={config.cluster.gpus_per_node}"
    which = "" if mode == "train" else f"--mode {mode} "
    return (
        f"sbatch --nodes={sum(nodes_needed(config, mode))}{gpus} launch/agpo_70b.sh {which}CONFIG"
    )


def cluster_plan(
    config: Config, trainer_hosts: Sequence[str], rollout_hosts: Sequence[str], mode: str = "train"
) -> Plan:
    """Deal ranks and servers evenly over their hosts. Raises LaunchError when they do not divide or do not fit."""
    cluster, rollout = config.cluster, config.rollout
    world = config.policy.world_size
    per_trainer = per_server = 0
    if mode in MODES_WITH_TRAINERS:
        per_trainer = share("policy", "ranks", world, "trainer_nodes", len(trainer_hosts))
    if mode in MODES_WITH_SERVERS:
        key, where = "rollout_nodes", rollout_hosts
        if not rollout_hosts:
            key, where = "trainer_nodes", trainer_hosts
        per_server = share("rollout", "servers", rollout.servers, key, len(where))
    loads = {
        "a trainer node": gpus_needed(config, per_trainer, 0 if rollout_hosts else per_server),
        "a rollout node": gpus_needed(config, 0, per_server if rollout_hosts else 0),
    }
    for node, devices in loads.items():
        if devices > cluster.gpus_per_node:
            raise LaunchError(
                f"{node} would need {devices} devices, but cluster.gpus_per_node is "
                f"{cluster.gpus_per_node}; give it more nodes, or smaller parallel sizes"
            )
    nodes = []
    for index, host in enumerate(trainer_hosts):
        ranks = _numbers(index, per_trainer)
        servers = () if rollout_hosts else _numbers(index, per_server)
        if ranks or servers or index == 0:
            nodes.append(NodeRoles(host, ranks, servers, controller=index == 0))
    if mode in MODES_WITH_SERVERS:
        nodes += [
            NodeRoles(host, servers=_numbers(index, per_server))
            for index, host in enumerate(rollout_hosts)
        ]
    return Plan(mode, tuple(nodes), world)


def machine_plan(config: Config, host: str, mode: str) -> Plan:
    """Plan everything on one machine, whatever the config's node counts are."""
    ranks = tuple(range(config.policy.world_size)) if mode in MODES_WITH_TRAINERS else ()
    servers = tuple(range(config.rollout.servers)) if mode in MODES_WITH_SERVERS else ()
    return Plan(mode, (NodeRoles(host, ranks, servers, True),), config.policy.world_size)


def gpus_needed(config: Config, ranks: int, servers: int) -> int:
    """Count the GPUs of a node with so many roles: one for each rank, ``rollout.tensor_parallel`` for each server.

    A server may share those of ranks where ``cluster.publish_backend`` is gloo."""
    size = config.rollout.tensor_parallel
    if config.cluster.publish_backend == "gloo" and ranks and servers:
        return max(ranks, size)
    return ranks + servers * size


def share(section: str, what: str, count: int, key: str, nodes: int) -> int:
    """Deal ``count`` things evenly over ``nodes``. Raises LaunchError when that leaves a rest."""
    if count % nodes:
        raise LaunchError(
            f"{section}: {count} {what} cannot be dealt evenly over cluster.{key} {nodes} "
            f"({count} = {nodes} x {count // nodes} + {count % nodes})"
        )
    return count // nodes


def _numbers(index: int, per_node: int) -> tuple[int, ...]:
    return tuple(range(index * per_node, (index + 1) * per_node))


def expand_hosts(nodelist: str) -> list[str]:
    """Expand Slurm's compressed host list: ``gpu[01-03,7],login`` is gpu01 gpu02 gpu03 gpu7 login.

    Written here because a container has no ``scontrol show hostnames``. Raises LaunchError on what is no host list.
    """
    if not re.fullmatch(f"{HOSTS}(,{HOSTS})*", nodelist):
        raise LaunchError(f"not a Slurm host list: {nodelist!r}")
    return [host for part in re.findall(HOSTS, nodelist) for host in _expand(part)]


def _expand(part: str) -> Iterator[str]:
    match = re.fullmatch(r"([^\[\]]*)\[([\d,-]+)\](.*)", part)
    if match is None:
        yield part
        return
    prefix, ranges, rest = match.groups()
    for numbers in ranges.split(","):
        first, _, last = numbers.partition("-")
        for number in range(int(first), int(last or first) + 1):
            for tail in _expand(rest):
                yield f"{prefix}{number:0{len(first)}d}{tail}"
