"""Endings that Slurm itself brings about, on the production script: SIGTERM, a lost trainer node, a killed rank, the
time limit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from job import TRAINER, Job
from slurm_cluster import SlurmCluster, wait_for
from tiny_run import write_run

from agpo_megatron.cluster.start_folder import StartFolder
from agpo_megatron.observe.metrics import read_metrics

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with SlurmCluster(nodes=5) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def job(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Two trainer nodes with a rank each, one node with a server, two spare; USR1 comes 2 to 3 minutes into a start."""
    settings = {
        "train.steps": 5000,
        "train.prompts_per_batch": 4,
        "rollout.group_size": 4,
        "run.checkpoint_every": 1000,
        "cluster.trainer_nodes": 2,
        "cluster.rollout_nodes": 1,
        "cluster.heartbeat_timeout": 300.0,
        "guards.reward_drop": None,  # a random model forgets what it was right about
    }
    config = write_run(tmp_path_factory.mktemp("job"), **settings)
    return Job.submit(cluster, config, sbatch=("--nodes=3", "--time=62"))


def next_start(job: Job, restart: int) -> None:
    wait_for(lambda: (job.start(restart) / "plan.json").exists(), "the requeued start", 400)


def hosts(job: Job, restart: int) -> list[str]:
    """Of that start: two trainer nodes, of which the first has the controller, and a server's."""
    return [node.host for node in StartFolder(job.start(restart)).plan().nodes]


def saved_step(job: Job, restart: int) -> int:
    """Of the checkpoint that was the last thing this start did."""
    return int(job.phases(restart)[-1].removeprefix("save step "))


@pytest.mark.timeout(1800)
class TestOneRun:
    """The tests build on one another: each finds the job as the one before left it."""

    def test_the_loss_of_a_later_trainer_node_requeues_and_replays(self, job: Job) -> None:
        job.wait_phase(0, "update step 3")
        lost = hosts(job, 0)[1]
        job.cluster.crash(lost)
        next_start(job, 1)
        assert lost not in hosts(job, 1)
        job.wait_phase(1, "generate step 4")
        replayed = [p for p in job.phases(1) if p.startswith("replay")]
        assert replayed[:2] == ["replay step 1", "replay step 2"]

    def test_a_killed_rank_ends_the_start_which_names_it_and_requeues(self, job: Job) -> None:
        job.kill_at(1, "update step 6", TRAINER, RANK="1")
        next_start(job, 2)
        assert f"trainer rank 1 on {hosts(job, 1)[1]} was killed by signal 9" in job.output
        job.wait_phase(2, "generate step 7")
        replayed = [p for p in job.phases(2) if p.startswith("replay")]
        assert replayed == [f"replay step {s}" for s in range(1, 7)]

    def test_the_loss_of_the_first_node_requeues_elsewhere(self, job: Job) -> None:
        lost = hosts(job, 2)[0]
        job.cluster.crash(lost)
        next_start(job, 3)
        assert lost not in hosts(job, 3)
        job.wait_phase(3, "generate step 8")
        replayed = [p for p in job.phases(3) if p.startswith("replay")]
        assert replayed[:6] == [f"replay step {s}" for s in range(1, 7)]

    def test_sigterm_saves_and_requeues(self, job: Job) -> None:
        job.cluster.command("scancel", "--batch", "--signal=TERM", job.id)
        next_start(job, 4)
        job.wait_phase(4, f"generate step {saved_step(job, 3) + 1}")
        assert not [p for p in job.phases(4) if p.startswith("replay")]

    def test_the_time_limit_ahead_saves_and_requeues(self, job: Job) -> None:
        next_start(job, 5)
        assert job.output.count("USR1, asking for a checkpoint") == 1
        job.wait_phase(5, f"generate step {saved_step(job, 4) + 1}")
        assert not [p for p in job.phases(5) if p.startswith("replay")]

    def test_scancel_ends_it_for_good_and_no_step_was_lost(self, job: Job) -> None:
        job.cluster.command("scancel", job.id)
        job.wait_state("CANCELLED", seconds=120)
        job.check_nothing_left()
        assert not (job.start(6) / "plan.json").exists()
        steps = [metrics["step"] for metrics in read_metrics(Path(job.folder.path))]
        assert steps == list(range(1, len(steps) + 1))
