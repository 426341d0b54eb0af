"""The time line of a run: its bars are the seconds that were recorded, one after the other."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from agpo_megatron.cli import main
from agpo_megatron.observe.timeline import Span, Usage, draw_timeline, share_of, spans, usage

pytestmark = pytest.mark.processes

# Two batches of two updates each, after a start and a publish; times as a run wrote them, rounded.
ROWS = [
    {
        "step": 1,
        "time/publish": 0.5,
        "time/rollout": 2.0,
        "time/score": 0.25,
        "time/update": 1.0,
        "time/step": 4.0,
        "rollout/slots_used_frac": 0.75,
    },
    {"step": 2, "time/update": 1.5, "time/step": 1.5},
    {
        "step": 3,
        "time/publish": 0.5,
        "time/rollout": 0.0,
        "time/update": 1.0,
        "time/step": 1.5,
        "rollout/slots_used_frac": 0.9,
    },
    {
        "step": 4,
        "time/rollout": 1.0,
        "time/update": 1.0,
        "time/step": math.nan,
        "rollout/slots_used_frac": math.nan,
    },
]


def test_the_trainers_time_is_laid_end_to_end_in_the_order_of_its_phases() -> None:
    assert spans(ROWS) == [
        Span(1, "publishes", 0.0, 0.5),
        Span(1, "waits for groups", 0.5, 2.0),
        Span(1, "scores", 2.5, 0.25),
        Span(1, "decides, commits", 2.75, 0.25),
        Span(1, "trains", 3.0, 1.0),
        Span(2, "trains", 4.0, 1.5),
        Span(3, "publishes", 5.5, 0.5),
        Span(3, "trains", 6.0, 1.0),
        Span(4, "waits for groups", 7.0, 1.0),
        Span(4, "trains", 8.0, 1.0),
    ]
    assert share_of(spans(ROWS), "trains") == 4.5 / 9.0
    assert share_of([], "trains") == 0.0


def test_slots_stand_between_the_moments_at_which_batches_were_complete() -> None:
    """Also where the trainer did not have to wait at all."""
    assert usage(ROWS) == [Usage(0.5, 2.0, 0.75), Usage(2.5, 3.5, 0.9)]


def test_the_command_draws_runs_above_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        lines = [json.dumps(row).replace("NaN", "null") + "\n" for row in ROWS]
        (tmp_path / name / "metrics.jsonl").write_text("".join(lines))
    assert main(["timeline", str(tmp_path / "one")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/one/timeline.png\n"
    both = tmp_path / "both.png"
    assert (
        main(["timeline", str(tmp_path / "one"), str(tmp_path / "other"), "--out", str(both)]) == 0
    )
    heights = []
    for path in (tmp_path / "one" / "timeline.png", both):
        with Image.open(path) as image:
            assert image.width == 1320
            heights.append(image.height)
    assert heights[1] > heights[0]


def test_a_run_without_a_step_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="second has recorded the time of none"):
        draw_timeline({"first": ROWS, "second": []}, tmp_path / "t.png")


def test_a_long_run_shows_its_last_steps(tmp_path: Path) -> None:
    rows = [{"step": i, "time/update": 1.0, "time/step": 1.0} for i in range(1, 201)]
    draw_timeline({"run": rows}, tmp_path / "all.png")
    draw_timeline({"run": rows[-40:]}, tmp_path / "last.png")
    assert (tmp_path / "all.png").read_bytes() == (tmp_path / "last.png").read_bytes()
