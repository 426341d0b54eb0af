"""One node of a start: meets the others, passes the preflight with them, then runs and supervises its roles."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from agpo_megatron.cluster.address import interface_of, own_address
from agpo_megatron.cluster.environments import gpu_variables, interpreter
from agpo_megatron.cluster.leftovers import end_leftovers
from agpo_megatron.cluster.preflight import (
    Calls,
    Hello,
    NodeFacts,
    call_others,
    gather_facts,
    judge,
)
from agpo_megatron.cluster.processes import Role, python_module
from agpo_megatron.cluster.roles import NodeRoles, Plan, machine_plan
from agpo_megatron.cluster.start_folder import Outcome, StartFolder
from agpo_megatron.cluster.status import write_report
from agpo_megatron.cluster.supervisor import Interrupted, Supervisor, first_culprit
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.config.schema import Config
from agpo_megatron.rollout.server import device_of, server_command

MACHINE = "localhost"


class PreflightFailed(RuntimeError):
    """A node is not fit for the run; the message names it, the cause and the fix."""


def run_locally(config: Config, folder: RunFolder, mode: str, extra: Sequence[str] = ()) -> int:
    """Start and supervise a whole run on this machine; returns the exit code for the shell."""
    plan = machine_plan(config, MACHINE, mode)
    start = StartFolder.create(folder, time.strftime("%Y%m%d-%H%M%S"), plan, config)
    try:
        outcome = run_node(start, MACHINE, extra)
    except Interrupted as signal_name:
        sys.stderr.write(f"stopped by {signal_name}; the same command continues the run\n")
        return 130
    except PreflightFailed as failure:
        sys.stderr.write(f"agpo-megatron: {failure}\n")
        return 2
    if outcome == "stopped":
        sys.stderr.write("stopped after a checkpoint; the same command continues the run\n")
        return 130
    if outcome == "failed" and (culprit := first_culprit(start)):
        sys.stderr.write(culprit.message() + "\n")
        write_report(folder, start, culprit.message())
    return 0 if outcome == "finished" else 1


def run_node(start: StartFolder, host: str, extra: Sequence[str] = ()) -> Outcome:
    """Run the roles that the plan gives to ``host``, to the end of the start. Raises PreflightFailed."""
    plan, config = start.plan(), start.config()
    make_room(start, plan, host, config)
    facts = preflight(start, plan, host, config)
    roles = node_roles(plan.on(host), plan, config, start, facts, extra)
    supervisor = Supervisor(
        start,
        host,
        several=host != MACHINE,
        other_servers=plan.server_count - len(plan.on(host).servers),
    )
    return supervisor.supervise(roles)


def make_room(start: StartFolder, plan: Plan, host: str, config: Config) -> None:
    """End what earlier starts of the run have left on this node, and say so. Raises PreflightFailed if it does not end.

    The master holds the run folder's lock, so no other start goes on: the others wait until it has come here.
    """
    if plan.master == host:
        start.write_node(host, "begun", {})
    start.wait_nodes([plan.master], "begun", time.monotonic() + config.rollout.start_timeout)
    ended, alive = end_leftovers(RunFolder(start.path.parents[1]), start.label)
    where = "" if host == MACHINE else f" on {host}"
    for leftover in ended:
        sys.stderr.write(f"agpo-megatron: ended what was left{where}: {leftover}\n")
    if alive:
        failure = f"{host}: killed, but does not end: {', '.join(map(str, alive))}; reboot the node, or leave it out"
        start.end("failed", f"preflight: {failure}")
        raise PreflightFailed(f"preflight: {failure}")


def preflight(start: StartFolder, plan: Plan, host: str, config: Config) -> dict[str, NodeFacts]:
    """Return the facts of every node once all are as they must be. Raises PreflightFailed, on every node alike."""
    deadline = time.monotonic() + config.rollout.start_timeout
    hosts = [node.host for node in plan.nodes]
    if host == MACHINE:
        address, interface = "127.0.0.1", ""
    else:
        others = [other for other in hosts if other != host]
        address = own_address(host, others, os.environ.get("AGPO_INTERFACE", ""))
        interface = interface_of(address)
    with Hello(address) as hello:
        own = gather_facts(plan.on(host), config, plan.mode, address, interface, hello.port)
        start.write_node(host, "facts", asdict(own))
        found = start.wait_nodes(hosts, "facts", deadline)
        facts = {name: NodeFacts(**values) for name, values in found.items()}
        start.write_node(host, "calls", asdict(call_others(host, facts)))
        calls = start.wait_nodes(hosts, "calls", deadline)  # others may still be calling this one
    verdict = judge(plan, facts, {name: Calls(**values) for name, values in calls.items()})
    if plan.master == host:
        start.preflight.write_text(verdict.table)
        if host != MACHINE:
            sys.stdout.write(verdict.table)
            sys.stdout.flush()
    if verdict.failure:
        start.end("failed", f"preflight: {verdict.failure}")
        raise PreflightFailed(f"preflight: {verdict.failure}")
    return facts


def node_roles(
    here: NodeRoles,
    plan: Plan,
    config: Config,
    start: StartFolder,
    facts: Mapping[str, NodeFacts],
    extra: Sequence[str],
) -> list[Role]:
    """Build commands and environments of the roles of one node."""
    master = facts[plan.master]
    own = facts[here.host]
    shared = {
        "AGPO_CONTROLLER_URL": f"http://{master.address}:{master.ports['controller']}",
        "AGPO_TOKEN": start.token_file.read_text(),
        "AGPO_START": str(start.path),
        "AGPO_ADDRESS": own.address,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if own.interface:
        shared["GLOO_SOCKET_IFNAME"] = own.interface
        shared["NCCL_SOCKET_IFNAME"] = os.environ.get("NCCL_SOCKET_IFNAME", own.interface)
    on_gpu = device_of(config) == "cuda"
    urls, roles = server_urls(plan, facts), []
    for local, index in enumerate(here.servers):
        name = f"rollout server {index}"
        launch = server_command(
            config,
            config.model.path,
            host=own.address,
            port=own.ports[name],
            index=index,
            python=interpreter("rollout"),
        )
        env = {**shared, **launch.env, **server_devices(here, local, config)}
        env |= gpu_variables("rollout") if on_gpu else {}
        roles.append(Role(name, launch.argv, env, start.log(name)))
    for local, rank in enumerate(here.ranks):
        name = f"trainer rank {rank}"
        env = {
            **shared,
            "RANK": str(rank),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(plan.world_size),
            "MASTER_ADDR": master.address,
            "MASTER_PORT": str(master.ports["master"]),
            **(gpu_variables("trainer") if on_gpu else {}),
        }
        arguments = ["-m", "agpo_megatron.trainer", str(start.config_file), plan.mode]
        argv = [interpreter("trainer"), *arguments]
        roles.append(Role(name, argv, env, start.log(name)))
    if here.controller:
        argv = python_module("agpo_megatron.controller", str(start.config_file), plan.mode, *extra)
        env = {**shared, "AGPO_SERVERS": json.dumps(urls)}
        roles.append(Role("controller", argv, env, None))
    return roles


def server_urls(plan: Plan, facts: Mapping[str, NodeFacts]) -> list[str]:
    """List the servers' URLs by server number."""
    urls = {
        server: f"http://{facts[node.host].address}:{facts[node.host].ports[f'rollout server {server}']}"
        for node in plan.nodes
        for server in node.servers
    }
    return [urls[server] for server in sorted(urls)]


def server_devices(here: NodeRoles, local: int, config: Config) -> dict[str, str]:
    """Choose the GPUs of the node's server number ``local``: those behind the ranks', ``tensor_parallel`` each. Where
    there are none behind and ``cluster.publish_backend`` is gloo, they are shared from the first on.

    Not yet executed on a GPU.
    """
    if device_of(config) == "cpu":
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = (
        visible.split(",") if visible else [str(i) for i in range(config.cluster.gpus_per_node)]
    )
    size = config.rollout.tensor_parallel
    first = len(here.ranks) + local * size
    if config.cluster.publish_backend == "gloo":
        chosen = [devices[i % len(devices)] for i in range(first, first + size)]
    else:
        chosen = devices[first : first + size]
    return {"CUDA_VISIBLE_DEVICES": ",".join(chosen)}
