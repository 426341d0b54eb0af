"""In which order the ranks of the 70B run, 12 trainer nodes and 12 server nodes of 8 GPUs, create their groups.

All ranks are simulated: what each asks torch for is recorded, from its own start to its last update group. An NCCL
communicator comes into being when all its members ask for it, and a rank that asks waits: so the order must be one that
ends. gloo groups connect at once and obey the same rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import pytest
from simulated_ranks import Members, simulated_rank

from agpo_megatron.config import load_config

pytestmark = pytest.mark.processes

CONFIG = load_config(Path(__file__).parents[2] / "configs" / "agpo_70b.yaml")
POLICY = CONFIG.policy.model_copy(
    update={"fp8": CONFIG.policy.fp8.model_copy(update={"recipe": "none"})}
)
WORLD = POLICY.world_size
Queues = Mapping[Hashable, Sequence[Hashable]]


def who_waits_for_ever(queues: Queues) -> dict[Hashable, Hashable]:
    """Let every rank create its groups in its own order, each group once all its members have come to it. Returns the
    ranks that cannot go on, with the group they wait in."""
    members = Counter(group for queue in queues.values() for group in set(queue))
    at = dict.fromkeys(queues, 0)
    while True:
        heads = {r: queue[at[r]] for r, queue in queues.items() if at[r] < len(queue)}
        arrived = Counter(heads.values())
        complete = {group for group, n in arrived.items() if n == members[group]}
        if not complete:
            return heads
        for rank, group in heads.items():
            at[rank] += group in complete


@pytest.fixture(scope="module")
def asked() -> dict[int, list[tuple[str, Members]]]:
    """What each of the 96 ranks asks for, and which of them are sources of a stage."""
    everyone: dict[int, list[tuple[str, Members]]] = {}
    for rank in range(WORLD):
        everyone[rank] = []
        with simulated_rank(POLICY, rank, everyone[rank]) as layout:
            if layout.publishes:
                SOURCES[layout.pp_rank] = rank
    return everyone


SOURCES: dict[int, int] = {}


def own_groups(rank: int, groups: Sequence[tuple[str, Members]]) -> list[Hashable]:
    """Those that ``rank`` is a member of, numbered: the same ranks may form several groups."""
    everyone = tuple(range(WORLD))
    return [
        (number, backend, ranks or everyone)
        for number, (backend, ranks) in enumerate(groups)
        if rank in (ranks or everyone)
    ]


def test_every_rank_asks_for_the_same_groups_in_the_same_order(
    asked: dict[int, list[tuple[str, Members]]],
) -> None:
    """torch's rule for ``new_group``, members or not."""
    assert all(groups == asked[0] for groups in asked.values())
    assert ("gloo", None) in asked[0], "control messages must not travel over NCCL"


def publishing() -> dict[Hashable, list[Hashable]]:
    """Update groups of all servers' ranks, as sync/groups.py opens them: stage by stage on each server, while every
    source offers its own at once."""
    rollout = CONFIG.rollout
    stages = [("update", stage) for stage in range(POLICY.pipeline_parallel)]
    queues: dict[Hashable, list[Hashable]] = {
        ("server", server, rank): list(stages)
        for server in range(rollout.servers)
        for rank in range(rollout.tensor_parallel)
    }
    for stage, rank in SOURCES.items():
        queues[rank] = [("update", stage)]
    return queues


def test_no_rank_of_the_job_waits_for_a_group_that_another_creates_later(
    asked: dict[int, list[tuple[str, Members]]],
) -> None:
    queues: dict[Hashable, list[Hashable]] = {r: own_groups(r, g) for r, g in asked.items()}
    assert len(SOURCES) == POLICY.pipeline_parallel
    updates = publishing()
    assert len(updates) == 96 + 4
    for rank, queue in updates.items():
        queues.setdefault(rank, []).extend(queue)
    assert len(queues) == 24 * 8
    assert who_waits_for_ever(queues) == {}


def test_tensor_parallel_neighbours_share_a_node(
    asked: dict[int, list[tuple[str, Members]]],
) -> None:
    per_node = WORLD // CONFIG.cluster.trainer_nodes
    with simulated_rank(POLICY, 77) as layout:
        import torch.distributed as dist

        ranks = dist.get_process_group_ranks(layout.tp_group)
    assert 77 in ranks and len({rank // per_node for rank in ranks}) == 1


def test_the_state_machine_sees_a_circle() -> None:
    """Two ranks that create the same two groups the other way round."""
    assert who_waits_for_ever({0: ["a", "b"], 1: ["a", "b"]}) == {}
    assert who_waits_for_ever({0: ["a", "b"], 1: ["b", "a"]}) == {0: "a", 1: "b"}


def test_the_state_machine_sees_a_server_that_joins_in_another_order(
    asked: dict[int, list[tuple[str, Members]]],
) -> None:
    queues = publishing()
    queues[("server", 3, 0)].reverse()
    assert who_waits_for_ever(queues)
