"""The production script: its own size accepted, wrong ones refused, a heterogeneous job on separate networks."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from job import REPO, SCRIPT, Job, site_env
from kills import check_nothing_lost_or_repeated
from slurm_cluster import SlurmCluster
from tiny_run import write_run

from agpo_megatron.cluster.roles import expand_hosts

STEPS, PROMPTS, GROUP = 6, 4, 4


@pytest.fixture(scope="module")
def production() -> Iterator[SlurmCluster]:
    """24 nodes of 8 declared GPUs."""
    with SlurmCluster(nodes=24, gpus=8) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launch")


def test_slurm_accepts_the_script_at_production_size(production: SlurmCluster) -> None:
    accepted = subprocess.run(
        ["sbatch", "--test-only", str(SCRIPT)], env=production.env, capture_output=True, text=True
    )
    assert accepted.returncode == 0, accepted.stderr
    assert "using 1536 processors on nodes n[1-24]" in accepted.stderr
    refused = subprocess.run(
        ["sbatch", "--test-only", "--nodes=25", str(SCRIPT)],
        env=production.env,
        capture_output=True,
        text=True,
    )
    assert refused.returncode != 0


def test_the_dry_run_shows_96_ranks_and_12_servers_in_their_places(where: Path) -> None:
    shown = dry_run(where, "--set", "model.path=/m")
    lines = shown.splitlines()
    for i in range(12):
        controller = "controller, " if i == 0 else ""
        assert re.search(rf"^  trainer{i} +{controller}ranks {8 * i}-{8 * i + 7}$", shown, re.M)
    for i in range(12):
        assert re.search(rf"^  rollout{i} +server {i}$", shown, re.M)
    assert "96 trainer ranks (TP 8 x PP 4 x CP 1 x DP 3) on 12 node(s), 12 rollout server" in shown
    steps = [line for line in lines if line.startswith("srun ")]
    assert len(steps) == 1 + 12
    assert "--nodes=12 " in steps[0] and "trainer11" in steps[0]
    assert all("--nodes=1 " in step for step in steps[1:])
    assert "--nodelist=rollout11 " in steps[-1]


def test_a_mode_has_the_roles_it_needs(where: Path) -> None:
    evaluation = dry_run(where, "--mode", "eval", "--set", "model.path=/m")
    assert re.search(r"^  trainer0 +controller$", evaluation, re.M)
    assert "ranks 0" not in evaluation and re.search(r"^  rollout11 +server 11$", evaluation, re.M)
    cold_start = dry_run(
        where, "--mode=sft", "--set", "model.path=/m", "--set", "sft={base: b, path: p}"
    )
    assert re.search(r"^  trainer11 +ranks 88-95$", cold_start, re.M)
    assert "rollout0" not in cold_start


def dry_run(where: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["bash", str(SCRIPT), "--dry-run", *arguments],
        env={"PATH": "/usr/bin:/bin", **site_env(where)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stderr + result.stdout


def test_containers_are_asked_of_pyxis(where: Path) -> None:
    env = site_env(where)
    site = Path(env["AGPO_SITE_ENV"])
    python = site.read_text()
    images = "TRAIN_IMAGE=/i/train.sqsh\nROLLOUT_IMAGE=/i/rollout.sqsh\nMOUNTS=/shared:/shared\n"
    site.write_text(python + images)
    result = subprocess.run(
        ["bash", str(SCRIPT), "--dry-run", "--set", "model.path=/m"],
        env={"PATH": "/usr/bin:/bin", **env},
        capture_output=True,
        text=True,
    )
    steps = [line for line in result.stdout.splitlines() if line.startswith("srun ")]
    assert "--container-image=/i/train.sqsh" in steps[0]
    assert all("--container-image=/i/rollout.sqsh" in step for step in steps[1:])
    assert all("--container-mounts=/shared:/shared" in step for step in steps)


def test_our_host_lists_are_slurms(production: SlurmCluster) -> None:
    for text in ("n[1-3,7]", "gpu[08-10]", "r1n[1-2],r2n5,login", "a-b[001,010-011]"):
        assert expand_hosts(text) == production.control("show", "hostnames", text).split()


def test_an_allocation_that_is_not_what_the_config_asks_for_is_refused(
    production: SlurmCluster, where: Path
) -> None:
    config = write_run(where / "mismatch")
    job = Job.submit(production, config, sbatch=("--nodes=3",))
    job.wait_state("FAILED", seconds=300)
    assert "cluster.trainer_nodes 1 + cluster.rollout_nodes 1 = 2 nodes" in job.output
    assert "the allocation has 3 (n[1-3])" in job.output
    assert not job.folder.logs.exists()
    job.check_nothing_left()


def test_the_scripts_agree_with_their_configs() -> None:
    """#SBATCH lines cannot be computed: here they are held to what they repeat."""
    for name, nodes in (("agpo_70b", 24), ("agpo_8b", 1)):
        text = (REPO / "launch" / f"{name}.sh").read_text()
        assert f"#SBATCH --nodes={nodes}\n" in text
        assert "#SBATCH --signal=B:USR1@3600\n" in text
    assert "\nsignal_lead=3600 " in SCRIPT.read_text()


@pytest.mark.full  # the default tier has test_job.py
@pytest.mark.timeout(1800)
def test_a_heterogeneous_job_on_separate_networks_survives_the_loss_of_a_servers_node(
    where: Path,
) -> None:
    """Every node with an address, ports and a loopback of its own: nothing may be handed out as localhost."""
    folder = where / "het"
    config = write_run(
        folder,
        **{
            "train.steps": STEPS,
            "train.prompts_per_batch": PROMPTS,
            "rollout.group_size": GROUP,
            "rollout.servers": 2,
            "policy.tensor_parallel": 1,
            "policy.pipeline_parallel": 2,
            "cluster.trainer_nodes": 2,
            "cluster.rollout_nodes": 2,
            "cluster.heartbeat_timeout": 300.0,
        },
    )
    component = ("--ntasks-per-node=1", "--exclusive", "--mem=0", "--gpus-per-node=8", "--no-kill")
    with SlurmCluster(nodes=4, network=True) as cluster:
        job = Job.submit(
            cluster, config, sbatch=("--nodes=2", *component, ":", "--nodes=2", *component)
        )
        addresses = {f"{cluster.subnet}.{i}" for i in (3, 4)}
        job.wait_phase(0, "generate step 2")
        cluster.crash("n4")
        job.wait_state("COMPLETED")
        job.check_nothing_left()
    check_nothing_lost_or_repeated(job.folder.path, STEPS, PROMPTS, GROUP)
    published = re.findall(r"published \S+ to (\d) server", job.log(0))
    assert published[0] == "2" and "1" in published  # all, then those that were left
    assert set(re.findall(r"rollout server http://([\d.]+)", job.log(0))) == addresses
    assert "127.0" not in (job.start(0) / "preflight.txt").read_text()
