"""What a person sees: progress, curves, summary."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from agpo_megatron.observe.curves import draw_curves
from agpo_megatron.observe.progress import Progress, bottleneck, plain_line, sparkline
from agpo_megatron.observe.summary import read_summary, render_summary, write_summary

pytestmark = pytest.mark.processes

STEP = {
    "step": 7,
    "reward/accuracy": 0.625,
    "response/tokens_mean": 41.25,
    "response/tokens_correct_mean": 33.5,
    "loss/policy": 0.0,
    "loss/unclipped": -0.2,
    "loss/clip_gate": 0.0,
    "policy/entropy": 0.5,
    "rollout/logprob_abs_diff_mean": 1e-6,
    "rollout/logprob_abs_diff_max": 1e-5,
    "throughput/tokens_per_s": 812.4,
    "time/step": 3.25,
}
BEFORE = {"accuracy": 0.4, "tokens_mean": 100.0, "tokens_correct_mean": 80.0}
AFTER = {"accuracy": 0.9, "tokens_mean": 50.0, "tokens_correct_mean": 60.0}


def screen(terminal: bool) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=terminal, width=100, legacy_windows=False), stream


def test_without_a_terminal_a_step_is_one_plain_line() -> None:
    console, stream = screen(terminal=False)
    with Progress(60, "tiny_cpu", console) as progress:
        progress.phase("rollout")
        progress.step(STEP)
        nobody_right = {"reward/accuracy": 0.0, "response/tokens_correct_mean": math.nan}
        progress.step({"step": 8, "loss/clip_gate": 1.0, **nobody_right})
        progress.step({"step": 9, "loss/policy": 0.5})
    assert stream.getvalue().splitlines() == [
        "tiny_cpu: 60 steps",
        "step  7/60  accuracy 0.625  tokens 41.2 (correct 33.5)  loss +0.0000 gate closed  812 tok/s  3.2 s",
        "step  8/60  accuracy 0.000  tokens - (correct -)  loss - gate open  - tok/s  - s",
        "step  9/60  loss +0.5000  - tok/s  - s",
    ]
    assert plain_line(STEP, 60) == stream.getvalue().splitlines()[1]


def test_a_long_run_prints_about_a_hundred_lines_and_always_the_last_step() -> None:
    console, stream = screen(terminal=False)
    with Progress(401, "long", console) as progress:
        for step in range(1, 402):
            progress.step({"step": step})
    lines = stream.getvalue().splitlines()[1:]
    assert len(lines) == 101
    assert lines[0].startswith("step   4/401") and lines[-1].startswith("step 401/401")


def test_on_a_terminal_the_display_shows_numbers_phase_and_time_left() -> None:
    console, stream = screen(terminal=True)
    progress = Progress(9, "tiny_cpu", console)
    progress.phase("publish step 7")
    progress.step(STEP)
    shown = stream.getvalue()
    progress.close()
    progress.close()
    for text in ("tiny_cpu", "62.5%", "33.5", "closed", "812", "publish step 7", "0:00:06 left"):
        assert text in shown
    assert "done" in stream.getvalue()


def test_the_line_names_the_bottleneck_of_the_batch() -> None:
    waits = {"step": 1, "time/rollout": 6.0, "time/score": 1.0, "time/update": 2.0}
    waits |= {"time/publish": 0.5, "time/step": 10.0}
    trains = {"step": 2, "time/update": 8.0, "time/step": 10.0}
    assert bottleneck([waits]) == "generation 60%"
    assert bottleneck([waits, trains]) == "training 55%"
    assert bottleneck([{"time/publish": 3.0, "time/update": 1.0, "time/step": 4.0}]) == (
        "publishing 75%"
    )
    assert bottleneck([{"step": 1, "time/update": math.nan, "time/step": 1.0}]) == ""
    console, stream = screen(terminal=False)
    with Progress(4, "m", console, updates=2) as progress:
        for row in (waits, trains, waits | {"step": 3}):
            progress.step(row)
    ends = [line.rpartition("tok/s")[2] for line in stream.getvalue().splitlines()[1:]]
    assert ends == [
        "  10.0 s (generation 60%)",
        "  10.0 s (training 55%)",
        "  10.0 s (generation 60%)",
    ]
    console, stream = screen(terminal=True)
    with Progress(4, "m", console) as progress:
        progress.step(waits)
    assert "generation 60%" in stream.getvalue()


def test_a_trend_is_scaled_to_its_own_range() -> None:
    assert sparkline([0.0, 0.5, math.nan, 1.0]) == "▁▅ █"
    assert sparkline([2.0, 2.0]) == "▄▄"
    assert sparkline([math.nan]) == ""


def test_the_picture_shows_what_was_recorded(tmp_path: Path) -> None:
    rows = [
        STEP | {"step": step, "reward/accuracy": step / 40, "loss/clip_gate": float(step % 2)}
        for step in range(1, 31)
    ]
    both = {"before": BEFORE, "after": AFTER}
    pictures = {}
    for name, metrics, summary in (
        ("whole", rows, both),
        ("no_summary", rows, None),
        ("all_open", [row | {"loss/clip_gate": 1.0} for row in rows], None),
        (
            "no_clip",
            [{k: v for k, v in row.items() if k != "loss/clip_gate"} for row in rows],
            None,
        ),
        ("one_step", [{"step": 1, "reward/accuracy": 0.5}], {}),
        ("gaps", [*rows, {"step": 31, "reward/accuracy": math.nan}], None),
    ):
        path = tmp_path / f"{name}.png"
        draw_curves(metrics, path, "a run", summary)
        with Image.open(path) as image:
            assert (image.format, image.size) == ("PNG", (1440, 792))
            pictures[name] = image.convert("RGB").tobytes()
    assert pictures["gaps"] == pictures["no_summary"]
    assert len(set(pictures.values())) == 5


def test_no_picture_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no steps to draw"):
        draw_curves([], tmp_path / "c.png", "a run")


def test_the_summary_has_the_promised_keys(tmp_path: Path) -> None:
    path = write_summary(tmp_path, BEFORE, AFTER, {"steps": 60, "notes": {"x": math.inf}})
    assert path == tmp_path / "summary.json"
    assert json.loads(path.read_text()) == {
        "before": BEFORE,
        "after": AFTER,
        "steps": 60,
        "notes": {"x": None},
    }
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_no_right_answer_has_no_length(tmp_path: Path) -> None:
    write_summary(tmp_path, BEFORE | {"tokens_correct_mean": math.nan}, None)
    summary = read_summary(tmp_path)
    assert summary == {"before": BEFORE | {"tokens_correct_mean": None}}
    console, stream = screen(terminal=False)
    render_summary(tmp_path, console)
    assert "40.0%" in stream.getvalue()


@pytest.mark.parametrize(
    ("before", "extra", "message"),
    [
        ({"accuracy": 0.4}, {}, "before needs"),
        (BEFORE | {"more": 1.0}, {}, "before needs"),
        (BEFORE, {"after": 1}, "must not hold 'after'"),
    ],
)
def test_a_wrong_summary_is_refused(
    tmp_path: Path, before: dict[str, float], extra: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_summary(tmp_path, before, AFTER, extra)
    assert not list(tmp_path.iterdir())


def test_the_table_tells_the_change(tmp_path: Path) -> None:
    console, stream = screen(terminal=False)
    render_summary(tmp_path, console)
    assert stream.getvalue() == ""
    write_summary(tmp_path, BEFORE, AFTER)
    render_summary(tmp_path, console)
    rows = [line.split("│")[1:-1] for line in stream.getvalue().splitlines() if "│" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["accuracy", "40.0%", "90.0%", "+50.0 points"],
        ["response tokens", "100.0", "50.0", "-50.0 %"],
        ["tokens of right answers", "80.0", "60.0", "-25.0 %"],
    ]
