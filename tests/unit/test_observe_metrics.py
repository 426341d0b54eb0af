"""metrics.jsonl and the TensorBoard files beside it: durable, resumed, never twice."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agpo_megatron.observe.metrics import METRIC_KEYS, MetricsWriter, metrics_path, read_metrics

ISSUED = """step, reward/mean, reward/accuracy, reward/length, reward/error_frac, response/tokens_mean,
response/tokens_correct_mean, response/truncated_frac, group/zero_variance_frac, group/all_correct_frac,
group/all_wrong_frac, group/cov_length_advantage, mask/kept_tokens, mask/kept_groups, loss/policy, loss/unclipped,
loss/clip_gate, loss/kl, policy/entropy, policy/ratio_mean, policy/clip_frac, grad_norm, lr,
rollout/logprob_abs_diff_mean, rollout/logprob_abs_diff_max, rollout/staleness_mean, tokens/trained, tokens/skipped,
time/rollout, time/reward, time/score, time/update, time/publish, time/step, throughput/tokens_per_s,
idle/trainer_frac, idle/servers_frac, idle/publish_frac, rollout/slots_used_frac, rollout/fragments, rollout/resumed,
rollout/tokens_lost, rollout/length_bias, window/ready_groups, window/open_groups,
sampling/discarded_groups, loss/entropy_coef, correction/mean, correction/dropped_frac,
policy/old_logprob_abs_diff_mean, policy/old_logprob_abs_diff_max, rollout/ess_token, rollout/ess_sequence,
rollout/logprob_abs_diff_age0, rollout/logprob_abs_diff_age1, rollout/logprob_abs_diff_age2,
rollout/logprob_abs_diff_age4, rollout/logprob_abs_diff_age8, rollout/staleness_max,
rollout/logprob_far_frac, guard/fired, guard/skipped_steps, busy/trainer_frac,
busy/rewards_frac, throughput/trainer_tokens_per_s, throughput/servers_tokens_per_s, throughput/mfu,
memory/controller_gb, memory/trainer_gb, memory/trainer_device_gb, memory/servers_gb, loss/gate_level"""


def board(run_dir: Path) -> EventAccumulator:
    files = list((run_dir / "tensorboard").iterdir())
    assert len(files) == 1
    return EventAccumulator(str(files[0])).Reload()


def test_the_keys_are_those_users_were_promised() -> None:
    assert list(METRIC_KEYS) == ISSUED.replace("\n", " ").split(", ")


def test_each_step_is_one_line_with_keys_in_the_fixed_order(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    assert writer.write({"lr": 0.5, "step": 1, "reward/mean": 0.25})
    assert writer.write({"step": 2, "tokens/trained": 128})
    assert metrics_path(tmp_path).read_text().splitlines() == [
        '{"step": 1, "reward/mean": 0.25, "lr": 0.5}',
        '{"step": 2, "tokens/trained": 128}',
    ]
    writer.close()


def test_a_number_that_is_none_stays_readable(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write({"step": 1, "grad_norm": math.inf, "loss/policy": math.nan})
    line = metrics_path(tmp_path).read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1,
        "loss/policy": None,
        "grad_norm": None,
    }
    assert math.isnan(read_metrics(tmp_path)[0]["grad_norm"])


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"step": 1, "loss/polcy": 0.1}, "unknown metric keys.*loss/polcy"),
        ({"lr": 0.1}, "integer step"),
        ({"step": 1.0}, "integer step"),
        ({"step": 1, "lr": "fast"}, "metric lr must be a number"),
        ({"step": 1, "lr": True}, "metric lr must be a number"),
    ],
)
def test_wrong_metrics_are_refused_and_leave_no_line(
    tmp_path: Path, metrics: dict[str, float], message: str
) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    with pytest.raises(ValueError, match=message):
        writer.write(metrics)
    assert metrics_path(tmp_path).read_bytes() == b""


def test_a_continued_run_writes_no_step_twice(tmp_path: Path) -> None:
    first = MetricsWriter(tmp_path)
    first.write({"step": 1, "lr": 0.1})
    first.write({"step": 2, "lr": 0.2})
    first.close()
    again = MetricsWriter(tmp_path)
    assert [again.has(step) for step in (1, 2, 3)] == [True, True, False]
    assert not again.write({"step": 2, "lr": 9.0})
    assert again.write({"step": 3, "lr": 0.3})
    assert not again.write({"step": 3, "lr": 9.0})
    again.close()
    assert [(row["step"], row["lr"]) for row in read_metrics(tmp_path)] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
    ]


def test_tensorboard_holds_exactly_the_recorded_numbers_after_a_resume(tmp_path: Path) -> None:
    first = MetricsWriter(tmp_path)
    first.write({"step": 1, "lr": 0.125, "reward/mean": 0.5})
    # killed here: no close, and the event of step 2 never reached its file
    with metrics_path(tmp_path).open("a") as file:
        file.write('{"step": 2, "lr": 0.25}\n')
    again = MetricsWriter(tmp_path)
    again.write({"step": 3, "lr": 0.5})
    events = board(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("lr")] == [(1, 0.125), (2, 0.25), (3, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.5)]
    assert "step" not in events.Tags()["scalars"]
    again.close()
    first.close()


@pytest.mark.parametrize("torn", [b'{"step": 2, "lr"', b'{"step": 2, "lr": 0.2}'])
def test_a_torn_last_line_is_cut(tmp_path: Path, torn: bytes) -> None:
    metrics_path(tmp_path).write_bytes(b'{"step": 1, "lr": 0.1}\n' + torn)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    writer = MetricsWriter(tmp_path, tensorboard=False)
    assert not writer.has(2)
    assert writer.write({"step": 2, "lr": 0.5})
    assert [row["lr"] for row in read_metrics(tmp_path)] == [0.1, 0.5]


@pytest.mark.parametrize("damage", [b"{", b"[]", b"{}", b"3"])
def test_a_damaged_line_is_a_refusal_that_names_it(tmp_path: Path, damage: bytes) -> None:
    content = b'{"step": 1}\n' + damage + b'\n{"step": 3}\n'
    metrics_path(tmp_path).write_bytes(content)
    for open_it in (read_metrics, MetricsWriter):
        with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a line of metrics"):
            open_it(tmp_path)
    assert metrics_path(tmp_path).read_bytes() == content


def test_no_file_means_no_steps(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "nothing") == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(mount)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a disk of its own needs the right to mount")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


def test_a_full_disk_ends_with_one_message_and_whole_lines(small_disk: Path) -> None:
    writer = MetricsWriter(small_disk, tensorboard=False)
    recorded = 0
    with pytest.raises(
        OSError, match=r"(?s)cannot write .*metrics\.jsonl: No space left.*free space"
    ):
        for step in range(1, 1000):
            writer.write(dict.fromkeys(METRIC_KEYS, 0.123456789) | {"step": step})
            recorded = step
    assert recorded > 3
    assert metrics_path(small_disk).read_bytes().endswith(b"}\n")
    assert [row["step"] for row in read_metrics(small_disk)] == list(range(1, recorded + 1))
    assert not writer.has(recorded + 1)
    writer.close()
