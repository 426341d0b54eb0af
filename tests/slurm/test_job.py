"""The production script on a real Slurm: one run, disturbed three times. Lost nodes: test_endings.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from job import CONTROLLER, TRAINER, Job
from kills import check_nothing_lost_or_repeated, finish
from slurm_cluster import SlurmCluster, wait_for
from tiny_run import write_run

from agpo_megatron.cluster.start_folder import StartFolder, latest_start
from agpo_megatron.observe.metrics import read_metrics

STEPS, PROMPTS, GROUP = 16, 4, 4
SGLANG = "sglang.launch_server"


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with SlurmCluster(nodes=3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def job(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Two trainer nodes with a rank each (TP 2 across them), one node with a server."""
    settings = {
        "train.steps": STEPS,
        "train.prompts_per_batch": PROMPTS,
        "rollout.group_size": GROUP,
        "run.checkpoint_every": 1000,
        "cluster.trainer_nodes": 2,
        "cluster.rollout_nodes": 1,
        "cluster.heartbeat_timeout": 300.0,  # machines that run tests may be busy
    }
    config = write_run(tmp_path_factory.mktemp("job"), **settings)
    return Job.submit(cluster, config, sbatch=("--nodes=3",))


@pytest.mark.timeout(1800)
class TestOneRun:
    """The tests build on one another: each finds the job as the one before left it."""

    def test_a_server_killed_in_mid_generation_comes_back(self, job: Job) -> None:
        job.wait_phase(0, "generate step 2")
        job.kill_at(0, "generate step 4", SGLANG)
        job.wait_phase(0, "update step 4")
        assert job.log(0).count("-> dead") == 1
        exits = StartFolder(job.start(0)).exits()
        assert [(e["role"], e["code"], e["restarted"]) for e in exits] == [
            ("rollout server 0", -9, True)
        ]

    def test_a_killed_controller_is_replaced_and_trainers_go_on(self, job: Job) -> None:
        trainers = {p.pid for p in job.cluster.roles(TRAINER)}
        job.kill_at(0, "update step 7", CONTROLLER)
        job.wait_phase(0, "update step 9")
        assert {p.pid for p in job.cluster.roles(TRAINER)} == trainers
        # Its last update reached the trainers or did not: at most that one is trained again from the journal.
        assert [p for p in job.phases(0) if p.startswith("replay")] in ([], ["replay step 7"])

    def test_usr1_saves_and_requeues_and_the_next_start_ends_the_run(self, job: Job) -> None:
        job.cluster.command("scancel", "--batch", "--signal=USR1", job.id)
        wait_for(lambda: (job.start(1) / "plan.json").exists(), "the requeued start", 300)
        stopped_after = int(job.phases(0)[-1].removeprefix("save step "))
        job.wait_phase(1, f"generate step {stopped_after + 1}")
        assert not [p for p in job.phases(1) if p.startswith("replay")]
        assert latest_start(job.folder) == StartFolder(job.start(1).resolve())
        job.wait_state("COMPLETED")
        job.check_nothing_left()

    def test_no_step_and_no_sample_is_lost_or_counted_twice(self, job: Job, tmp_path: Path) -> None:
        run_dir = job.folder.path
        check_nothing_lost_or_repeated(run_dir, STEPS, PROMPTS, GROUP)
        # Undisturbed, on one machine, from the journal: the same metrics and the same weights, bit for bit.
        replayed = tmp_path / "replayed"
        outcome = finish(run_dir / "config.yaml", replayed, "--replay", str(run_dir))
        assert outcome.exit_code == 0, outcome.output
        keys = ("loss/policy", "grad_norm", "policy/entropy", "tokens/trained", "lr")
        for ours, theirs in zip(read_metrics(run_dir), read_metrics(replayed), strict=True):
            assert {k: ours.get(k) for k in keys} == {k: theirs.get(k) for k in keys}
        assert exported(run_dir) == exported(replayed) != b""


def exported(run_dir: Path) -> bytes:
    return b"".join(p.read_bytes() for p in sorted((run_dir / "hf").glob("*.safetensors")))
