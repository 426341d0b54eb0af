"""A cold start under Slurm: on the trainers' nodes alone, stopped, requeued and finished by the production script."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from job import Job
from slurm_cluster import SlurmCluster, wait_for
from tiny_run import write_run

from agpo_megatron.cluster.start_folder import StartFolder
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.observe.metrics import read_metrics

pytestmark = pytest.mark.full
STEPS = 400


@pytest.mark.timeout(1800)
def test_a_cold_start_needs_no_rollout_nodes_and_obeys_a_stop_request(tmp_path: Path) -> None:
    model = tmp_path / "cold_start"
    settings = {
        "sft.base": str(tmp_path / "model"),
        "sft.path": str(tmp_path / "sft.jsonl"),
        "sft.steps": STEPS,
        "sft.batch_size": 16,
        "run.checkpoint_every": 1000,
        "model.path": str(model),
        "cluster.trainer_nodes": 2,
        "cluster.rollout_nodes": 1,
        "cluster.heartbeat_timeout": 300.0,
    }
    config = write_run(tmp_path, **settings)
    with SlurmCluster(nodes=2) as cluster:
        job = Job.submit(cluster, config, "--mode", "sft", sbatch=("--nodes=2",))
        job = replace(job, folder=RunFolder(job.folder.path / "sft"))
        job.wait_phase(0, "update step 5")
        cluster.command("scancel", "--batch", "--signal=USR1", job.id)
        wait_for(lambda: (job.start(1) / "plan.json").exists(), "the requeued start", 300)
        saved = int(job.phases(0)[-1].removeprefix("save step "))
        assert 5 <= saved < STEPS
        job.wait_state("COMPLETED")
        job.check_nothing_left()
    assert [node.host for node in StartFolder(job.start(1)).plan().nodes] == ["n1", "n2"]
    assert f"update step {saved + 1}" in job.phases(1)
    assert not [phase for phase in job.phases(1) if phase.startswith("replay")]
    assert [row["step"] for row in read_metrics(job.folder.path)] == list(range(1, STEPS + 1))
    assert job.folder.curves.exists() and (model / "config.json").exists()
