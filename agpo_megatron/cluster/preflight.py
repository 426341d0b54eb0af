"""The checks of every node before rank 0 loads a byte, and the one table of their results.

Each node writes its facts into the start folder (so a node that does not see the folder is missing there), then calls
every other node over TCP (so an address nobody can reach is found, and clocks are compared), then the master judges.
"""

from __future__ import annotations

import json
import resource
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from agpo_megatron.cluster.environments import (
    VARIABLES,
    Kind,
    infiniband_problem,
    inspect,
    interpreter,
)
from agpo_megatron.cluster.pass_through import pass_through_problems
from agpo_megatron.cluster.processes import free_port
from agpo_megatron.cluster.roles import (
    MODES_WITH_SERVERS,
    MODES_WITH_TRAINERS,
    NodeRoles,
    Plan,
    gpus_needed,
)
from agpo_megatron.cluster.supervisor import MAX_SKEW
from agpo_megatron.config import Config, ConfigError
from agpo_megatron.config.checks import check_inputs
from agpo_megatron.observe.writers import missing_packages
from agpo_megatron.rollout.server import device_of, refuse_port_in_use
from agpo_megatron.rollout.slots import slots_beside

CALL_SECONDS = 10.0
NEEDED: dict[Kind, str] = {"trainer": "megatron-core", "rollout": "sglang"}
SAME_EVERYWHERE = ("agpo_megatron", "nccl")
"""Trainers and servers, otherwise of different environments, meet in NCCL groups when weights are published. ``nccl``:
the version that torch has loaded, which a package of another version may be installed beside."""
TE = "transformer_engine.pytorch"
OTHER_DESCRIPTORS = 512
"""Open files of the controller beside connections: its own, reward workers' pipes, calls of a publish."""


@dataclass(frozen=True)
class NodeFacts:
    """``ports``: role -> port chosen on this node. ``versions``: of the packages in each environment of the node.
    ``gpu_memory``: MiB of each. ``problems``: cause and fix each."""

    address: str
    interface: str
    hello_port: int
    ports: dict[str, int]
    versions: dict[Kind, dict[str, str]]
    gpu_memory: list[int]
    problems: list[str]


@dataclass(frozen=True)
class Calls:
    """The result of one node's calls to the others. ``skew``: seconds that their clocks are ahead."""

    skew: dict[str, float] = field(default_factory=dict)
    unreachable: dict[str, str] = field(default_factory=dict)


def gather_facts(
    roles: NodeRoles, config: Config, mode: str, address: str, interface: str, hello_port: int
) -> NodeFacts:
    """Everything this node can say about itself; chooses its ports."""
    problems: list[str] = []
    ports: dict[str, int] = {}
    names = ["controller", "master"] if roles.controller else []
    first = config.rollout.port
    taken = {hello_port, config.observe.prometheus_port, *range(first, first + len(roles.servers))}
    for name in names:
        ports[name] = free_port(address, {*taken, *ports.values()})
    for local, server in enumerate(roles.servers):
        port = first + local if first else free_port(address, {*taken, *ports.values()})
        try:
            refuse_port_in_use(address, port)
        except OSError as error:
            problems.append(str(error.strerror))
        ports[f"rollout server {server}"] = port
    versions: dict[Kind, dict[str, str]] = {}
    for kind in kinds_of(roles):
        found, wrong = _environment(kind, config, needed=bool(roles.ranks or kind == "rollout"))
        versions[kind] = found
        problems += wrong
        if roles.ranks or kind == "rollout":
            problems += _handed_on(kind, config)
    if device_of(config) == "cuda" and (problem := infiniband_problem()):
        problems.append(problem)
    if roles.controller:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        problems += descriptor_problems(config, mode, hard)
        problems += _observe_problems(config, mode)
    try:
        check_inputs(config, mode)
        _read_weights(Path(config.model.path))
    except (ConfigError, OSError) as error:
        problems.append(str(error))
    memory = gpu_memory() if config.cluster.device != "cpu" else []
    needed = gpus_needed(config, len(roles.ranks), len(roles.servers))
    if config.cluster.device == "cuda" and len(memory) < needed:
        problems.append(
            f"{len(memory)} GPUs are visible, its roles need {needed}; ask Slurm for them (--gpus-per-node)"
        )
    return NodeFacts(address, interface, hello_port, ports, versions, memory, problems)


def _observe_problems(config: Config, mode: str) -> list[str]:
    """List what stands in the way of ``observe`` on the controller's node."""
    problems, port = missing_packages(config.observe.writers), config.observe.prometheus_port
    if port and mode in MODES_WITH_TRAINERS:
        try:
            refuse_port_in_use("", port, "observe.prometheus_port")
        except OSError as error:
            problems.append(str(error.strerror))
    return problems


def descriptor_problems(config: Config, mode: str, hard: int) -> list[str]:
    """Compare the controller's connections at most with ``hard``, to which it raises its limit of open files.

    A request has a connection, and is one sample's once its group's first fragment is there; a rank has one for its
    heartbeat and one for commands.
    """
    rollout = config.rollout
    servers = rollout.servers if mode in MODES_WITH_SERVERS else 0
    ranks = config.policy.world_size if mode in MODES_WITH_TRAINERS else 0
    beside = slots_beside(rollout.max_in_flight)
    needed = servers * (rollout.max_in_flight + beside) + 2 * ranks + OTHER_DESCRIPTORS
    if hard == resource.RLIM_INFINITY or needed <= hard:
        return []
    return [
        f"the controller may open {hard} files (hard limit), but needs up to rollout.servers {servers} x "
        f"(max_in_flight {rollout.max_in_flight} + {beside} for evaluations) + 2 x {ranks} ranks + "
        f"{OTHER_DESCRIPTORS} = {needed}; raise the hard limit (`ulimit -Hn`, or LimitNOFILE of slurmd), or lower "
        "rollout.max_in_flight"
    ]


def kinds_of(roles: NodeRoles) -> list[Kind]:
    """The environments that the roles of a node run in; the controller's is the trainers'."""
    kinds: list[Kind] = ["trainer"] if roles.ranks or roles.controller else []
    return [*kinds, "rollout"] if roles.servers else kinds


def _environment(kind: Kind, config: Config, needed: bool) -> tuple[dict[str, str], list[str]]:
    """Versions in an environment, and what is wrong with it. ``needed``: its own package, by processes of this node."""
    on_gpu = device_of(config) == "cuda"
    imports: tuple[str, ...] = ("torch",) if on_gpu and needed else ()
    with_te = on_gpu and needed and kind == "trainer" and config.policy.layers == "auto"
    if with_te:
        imports += (TE,)
    try:
        found = inspect(kind, imports)
    except RuntimeError as error:
        return {}, [str(error)]
    problems = []
    where = f"the {kind} environment ({interpreter(kind)})"
    fix = f"set {VARIABLES[kind]} to one that has (launch/install.sh --gpu, launch/images/)"
    if needed and NEEDED[kind] not in found.versions:
        problems.append(f"{where} has no {NEEDED[kind]}; {fix}")
    for module, why in found.broken.items():
        also = " or set policy.layers to local (slower, no FP8)" if module == TE else ""
        problems.append(f"{where} cannot import {module} ({why}); {fix}{also}")
    recipe = config.policy.fp8.recipe
    if kind == "trainer" and needed and recipe != "none" and not with_te:
        problems.append(
            f"policy.fp8.recipe {recipe} needs Transformer Engine on a GPU; set it to none, or policy.layers to auto"
        )
    return found.versions, problems


def _handed_on(kind: Kind, config: Config) -> list[str]:
    """List what the package of ``kind`` would not take of ``rollout.server_args`` or ``policy.megatron``."""
    try:
        return pass_through_problems(kind, config)
    except ConfigError as error:
        return [str(error)]


def _read_weights(folder: Path) -> None:
    """A byte of every weight file: a file that is listed may still not be readable here."""
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.distcp")):
        with path.open("rb") as file:
            file.read(1)


def gpu_memory() -> list[int]:
    """MiB of every visible GPU, by nvidia-smi. Not yet executed on a GPU."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) for line in answer.stdout.split()]


class Hello:
    """Answers every connection with this node's clock, until closed."""

    def __init__(self, address: str) -> None:
        self._socket = socket.create_server((address, 0), backlog=256)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._answer, name="hello", daemon=True).start()

    def _answer(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            with connection:
                connection.sendall(json.dumps({"clock": time.time()}).encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread, which close alone would not
        self._socket.close()


def call_others(host: str, facts: Mapping[str, NodeFacts]) -> Calls:
    """Connect to the Hello of every other node."""
    calls = Calls()
    for other, its in facts.items():
        if other == host:
            continue
        before = time.time()
        try:
            with socket.create_connection(
                (its.address, its.hello_port), CALL_SECONDS
            ) as connection:
                answer = json.loads(connection.makefile().read())
            # Halfway through the call, as far as one can tell.
            calls.skew[other] = answer["clock"] - (before + time.time()) / 2
        except (OSError, ValueError) as error:
            calls.unreachable[other] = f"{its.address}:{its.hello_port}: {error}"
    return calls


@dataclass(frozen=True)
class NodeReport:
    """``failure``: the first problem, with node and fix; "" when the run may start."""

    table: str
    failure: str


def judge(plan: Plan, facts: Mapping[str, NodeFacts], calls: Mapping[str, Calls]) -> NodeReport:
    """One line per node and check; the first failure in the order of the plan."""
    failures: list[str] = []
    rows = [("node", "address", "roles", "gpus", "versions", "network", "clock", "inputs, ports")]
    for node in plan.nodes:
        own, heard = facts[node.host], calls[node.host]
        versions = _version_problems(node, plan, facts)
        network = [f"cannot reach {other} ({why})" for other, why in heard.unreachable.items()]
        skew = max((abs(s) for s in heard.skew.values()), default=0.0)
        clock = [
            f"its clock differs from that of {other} by {s:.1f} s; synchronise them (chrony)"
            for other, s in heard.skew.items()
            if abs(s) > MAX_SKEW
        ]
        gpus = _gpu_problems(node, plan, facts)
        for found in (own.problems, gpus, versions, network, clock):
            failures += [f"{node.host}: {problem}" for problem in found]
        rows.append(
            (
                node.host,
                f"{own.address} ({own.interface})" if own.interface else own.address,
                describe(node),
                _mark(gpus, str(len(own.gpu_memory))),
                _mark(versions, "same"),
                _mark(network, f"{len(heard.skew)} reached"),
                _mark(clock, f"{skew:.2f} s"),
                _mark(own.problems, "ok"),
            )
        )
    return NodeReport(_aligned(rows), failures[0] if failures else "")


def describe(node: NodeRoles) -> str:
    """``controller, ranks 0-7`` and the like."""
    parts = ["controller"] if node.controller else []
    for what, numbers in (("rank", node.ranks), ("server", node.servers)):
        if len(numbers) == 1:
            parts.append(f"{what} {numbers[0]}")
        elif numbers:
            parts.append(f"{what}s {numbers[0]}-{numbers[-1]}")
    return ", ".join(parts)


def _version_problems(node: NodeRoles, plan: Plan, facts: Mapping[str, NodeFacts]) -> list[str]:
    """Compare each of its environments with that of the first node that has one, and, in what must be the same
    everywhere, against the trainers' on the master."""
    problems = []
    masters = facts[plan.master].versions.get("trainer", {})
    for kind, own in facts[node.host].versions.items():
        first = next(n.host for n in plan.nodes if kind in facts[n.host].versions)
        theirs = facts[first].versions[kind]
        compared = [(first, kind, theirs, sorted(theirs.keys() | own.keys()))]
        compared += [(plan.master, "trainer", masters, list(SAME_EVERYWHERE))]
        for host, its, others, names in compared:
            for name in names:
                if own.get(name) != others.get(name):
                    problems.append(
                        f"{name} is {own.get(name)} in its {kind} environment, {others.get(name)} in the {its} "
                        f"environment of {host}; give both the same"
                    )
    return list(dict.fromkeys(problems))


def _gpu_problems(node: NodeRoles, plan: Plan, facts: Mapping[str, NodeFacts]) -> list[str]:
    alike = next(n for n in plan.nodes if bool(n.ranks) == bool(node.ranks))
    smallest = min(facts[node.host].gpu_memory, default=0)
    there = min(facts[alike.host].gpu_memory, default=0)
    if smallest >= 0.98 * there:
        return []
    return [f"its smallest GPU has {smallest} MiB, those of {alike.host} {there}; exclude the node"]


def _mark(problems: Sequence[str], good: str) -> str:
    return "FAILED" if problems else good


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines) + "\n"
