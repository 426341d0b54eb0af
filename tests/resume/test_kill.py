"""``kill -9`` of each role at each phase of a real run, then the same command: nothing lost, nothing repeated."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from kills import (
    SERVER,
    STEPS,
    batches,
    check_dynamic_sampling,
    check_nothing_lost_or_repeated,
    kill_and_continue,
)
from own_task import write_task
from transformers import AutoModelForCausalLM

from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.journal import JournalReader
from agpo_megatron.observe.metrics import read_metrics

POLICIES = ("ppo", "gspo", "cispo", "gmpo", "sapo")


@pytest.mark.full  # the default tier kills a run that generates ahead: test_kill_stale.py
def test_controller_trainer_and_server_killed_in_one_run(tmp_path: Path) -> None:
    """Batches of two updates, the first killed between them; a checkpoint after each."""
    kill_and_continue(
        tmp_path,
        [
            [("controller", "update step 2"), ("trainer rank 1", "update step 3")],
            [(SERVER, "generate step 5")],
        ],
        partial(check_nothing_lost_or_repeated, updates=2),
        **{"train.steps": 6, "train.updates_per_batch": 2, "run.checkpoint_every": 1},
    )


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("role", ["trainer rank 1", "supervisor"])
def test_a_role_killed_at_every_phase(tmp_path: Path, role: str) -> None:
    phases = ["generate step 1", "update step 2", "publish weights 3", "save step 4"]
    kill_and_continue(tmp_path, [[(role, phase)] for phase in phases])


@pytest.mark.full
@pytest.mark.parametrize(
    "phases",
    [
        ["generate step 1", "update step 2", "publish weights 3"],
        ["publish weights 0", "save step 2", "save step 4"],
    ],
)
def test_a_controller_killed_at_every_phase(tmp_path: Path, phases: list[str]) -> None:
    kill_and_continue(tmp_path, [[("controller", phase) for phase in phases]])


@pytest.mark.full
@pytest.mark.parametrize(
    "phases", [["generate step 2", "update step 4"], ["publish weights 2", "save step 4"]]
)
def test_a_server_killed_at_every_phase(tmp_path: Path, phases: list[str]) -> None:
    kill_and_continue(tmp_path, [[(SERVER, phase) for phase in phases]])


@pytest.mark.full
def test_two_sources_with_rewards_of_their_own_killed_while_they_generate_and_evaluate(
    tmp_path: Path,
) -> None:
    kill_and_continue(
        tmp_path,
        [[("trainer rank 1", "update step 2")], [("controller", "evaluate step 2")]],
        **{**write_task(tmp_path / "task"), "algorithm.preset": "grpo"},
    )
    reader = JournalReader(RunFolder(tmp_path / "run").journal)
    groups = [j.group for segment in reader.segments() for j in reader.groups(segment)]
    assert {g.prompt.source for g in groups} == {"sums", "doubles"}
    assert any(0 < s.raw_reward < 0.5 and s.reward_parts for g in groups for s in g.samples)


@pytest.mark.full
def test_dynamic_sampling_with_scores_killed_while_it_scores(tmp_path: Path) -> None:
    """Groups are replaced, and the step is decided only after old and reference log-probs are known: neither is lost
    by a kill in between, and the reference stays the initial policy."""
    loss = {"kl": {"coef": 0.05}, "correction": {"kind": "tis", "level": "sequence_mean"}}
    kill_and_continue(
        tmp_path,
        [
            [
                ("controller", "score step 1 with policy weights"),
                ("trainer rank 1", "score step 3 with reference weights"),
            ],
        ],
        check_dynamic_sampling,
        **{
            "algorithm.preset": "dapo",
            "algorithm.advantage": {"resample_factor": 2},
            "algorithm.loss": loss,
        },
    )
    reader = JournalReader(RunFolder(tmp_path / "run").journal)
    record = batches(reader)[-1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for s in reader.sequences(record, [0, 1, 2]):
        tokens = torch.tensor(s.tokens, dtype=torch.int64)[None]
        with torch.no_grad():
            table = model(tokens).logits[0, len(s.prompt_tokens) - 1 : -1].log_softmax(-1)
        expected = table.gather(1, tokens[0, len(s.prompt_tokens) :, None])[:, 0]
        ref, old = s.columns["ref_logprobs"], s.columns["old_logprobs"]
        torch.testing.assert_close(torch.tensor(ref), expected, atol=1e-3, rtol=0)
        assert (ref != old).any() and len(s.columns["correction"]) == len(expected)
    ratios = [row["policy/ratio_mean"] for row in read_metrics(tmp_path / "run")]
    assert ratios == pytest.approx([1.0] * STEPS, abs=1e-5), "scored and trained log-probs agree"


@pytest.mark.full
@pytest.mark.parametrize("policy", POLICIES)
def test_several_updates_of_a_batch_killed_between_them(tmp_path: Path, policy: str) -> None:
    """The batch and the log-probs that its ratios start from are durable before its first update. Steps 1 to 4 are
    those of the first batch; a checkpoint after each, so that a start begins in the middle of a batch too."""
    kill_and_continue(
        tmp_path,
        [[("controller", "update step 2"), ("trainer rank 1", "update step 7")]],
        partial(check_nothing_lost_or_repeated, updates=4),
        **{
            "algorithm.preset": "agpo_v1",
            "algorithm.loss": {"policy": policy, "clip_low": 0.02, "clip_high": 0.02},
            "train.steps": STEPS * 2,
            "train.updates_per_batch": 4,
            "run.checkpoint_every": 1,
        },
    )
    rows = read_metrics(tmp_path / "run")
    assert all(abs(row["policy/ratio_mean"] - 1) < 1e-5 for row in rows[::4])
    later = [row for row in rows if row["step"] % 4 != 1]
    assert all(row["policy/old_logprob_abs_diff_max"] > 0.02 for row in later), "beyond the bounds"
    clipped = [row["policy/clip_frac"] > 0 for row in later]
    match policy:
        case "sapo":
            assert not any(clipped), "it has no clip"
        case (
            "gspo"
        ):  # the clip is one-sided: an update may find its few sequences all on the other side
            assert any(clipped)
        case _:
            assert all(clipped)
