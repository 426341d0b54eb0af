"""The report of a run: its numbers are the journal's, its texts are texts, and no state of a run breaks it."""

from __future__ import annotations

import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_run import (
    HOSTILE,
    config,
    data_of,
    gap,
    length,
    make_run,
    make_start,
    reward,
    write_batch,
    write_metrics,
)

from agpo_megatron import cli
from agpo_megatron.cluster.start_folder import write_json
from agpo_megatron.config.record import resolved_yaml
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.journal import Journal, JournalReader
from agpo_megatron.observe.report import selection
from agpo_megatron.observe.report.selection import choose, shown_ranges, token_pieces
from agpo_megatron.observe.report.sweep import sweep

SAMPLES = 6  # of a step


def report(run: RunFolder, *more: str) -> dict[str, Any]:
    assert cli.main(["report", str(run.path), *more]) == 0
    return data_of(run.path / "report.html")


def trace(data: dict[str, Any], chart: str, name: str) -> dict[str, Any]:
    (found,) = [t for t in data["charts"][chart]["data"] if t.get("name") == name]
    return found


def test_the_numbers_are_those_of_metrics_and_journal(tmp_path: Path) -> None:
    data = report(make_run(tmp_path))
    assert data["facts"]["steps_done"] == 4 and data["facts"]["steps"] == 4
    assert (data["facts"]["mode"], data["facts"]["preset"]) == ("train", "grpo")
    mean = trace(data, "reward", "mean")
    assert (mean["x"], mean["y"]) == ([1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4])
    rewards = np.array([[reward(step, i) for i in range(SAMPLES)] for step in range(4)])
    band = trace(data, "reward", "samples, p10 to p90")
    assert band["y"] == pytest.approx(np.percentile(rewards, 10, axis=1))
    assert band["customdata"] == pytest.approx(np.percentile(rewards, 90, axis=1))
    groups = trace(data, "reward", "groups, p10 to p90")
    means = rewards.reshape(4, 2, 3).mean(axis=2)
    assert groups["y"] == pytest.approx(np.percentile(means, 10, axis=1))
    lengths = np.array([[length(step, i) for i in range(SAMPLES)] for step in range(4)])
    assert trace(data, "tokens", "p25 to p75")["y"] == pytest.approx(
        np.percentile(lengths, 25, axis=1)
    )
    assert trace(data, "gate", "gate")["y"] == [1, 0, 1, 0]
    assert trace(data, "covariance", "covariance")["y"] == [-1, -2, -3, -4]
    held = trace(data, "accuracy", "held.jsonl")
    assert (held["x"], held["y"], held["error_y"]["array"]) == ([4], [0.5], [0.25])
    heat = data["charts"]["distribution_length"]["data"][0]
    assert np.sum(heat["z"], axis=0) == pytest.approx([1, 1, 1, 1])
    for step in range(4):  # the mean by bins is the mean, to half a bin
        middle = np.dot(heat["y"], np.array(heat["z"])[:, step])
        assert abs(middle - lengths[step].mean()) <= (heat["y"][1] - heat["y"][0]) / 2


def test_time_is_split_as_recorded_and_idle_shares_are_shown(tmp_path: Path) -> None:
    data = report(make_run(tmp_path))
    bars = {t["name"]: t["y"] for t in data["charts"]["time"]["data"]}
    assert bars == {
        "publishes": [0.5] * 4,
        "waits for groups": [1.0] * 4,
        "decides, commits": [0.5] * 4,
        "trains": [2.0] * 4,
    }
    assert trace(data, "idle", "trainer waits for groups")["y"] == [0.25] * 4
    assert {"label": "trainer busy", "value": "50%"} in data["cards"]


def test_attempts_and_faults_stand_at_their_steps(tmp_path: Path) -> None:
    data = report(make_run(tmp_path))
    assert [(a["number"], a["after_step"], a["batches"]) for a in data["attempts"]] == [
        (1, 0, 2),
        (2, 2, 2),
    ]
    assert [a["reason"] for a in data["attempts"]] == [
        "the run began",
        "controller was killed by SIGKILL, started again",
    ]
    assert [(e["kind"], e["step"], e["who"]) for e in data["events"]] == [
        ("server lost", 2, "rollout server http://h:1"),
        ("start", 0, "s1"),
        ("killed", 2, "controller"),
    ], "that a publish is about to write to a server is no fault"
    lines = [s["x0"] for s in data["charts"]["reward"]["layout"]["shapes"]]
    assert lines == [2.5]


def test_a_sample_is_shown_as_the_journal_has_it(tmp_path: Path) -> None:
    data = report(make_run(tmp_path))
    shown = {s["id"]: s for s in data["samples"]}
    assert len(shown) == 4 * SAMPLES
    one = shown["g000000005.1"]  # step 3 counted from 1, second group
    assert (one["step"], one["source"], one["group"]) == (3, "words", "g000000005")
    assert (one["reward"], one["raw"], one["advantage"]) == (reward(2, 4), reward(2, 4), 1.5)
    assert (one["length"], one["correct"], one["parts"]) == (length(2, 4), False, {"near": 0.5})
    assert one["prompt"] == "what is 5"
    assert one["gap"] == pytest.approx(gap(2, 4), rel=1e-5)
    (tokens,) = one["ranges"]
    assert tokens["ids"] == [66] * length(2, 4) and tokens["texts"] is None
    assert tokens["server"] == [-1.0] * length(2, 4)
    assert tokens["gaps"][2] == pytest.approx(-gap(2, 4), rel=1e-5)
    assert set(tokens["gaps"][:2] + tokens["gaps"][3:]) == {0.125}
    assert [v["step"] for v in one["versions"]] == [2, 1] and one["started_from"] == 2
    assert "no tokenizer" in data["selection"]


def test_without_scores_the_report_says_so_and_invents_none(tmp_path: Path) -> None:
    data = report(make_run(tmp_path, scored=False))
    assert "no log-probs of the trainer" in data["selection"]
    assert {s["gap"] for s in data["samples"]} == {None}
    assert {r["gaps"] for s in data["samples"] for r in s["ranges"]} == {None}
    assert not any("worst gap" in s["why"] for s in data["samples"])


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / HOSTILE.replace("/", "|"), text=HOSTILE)
    data = report(run)
    tags = Tags()
    page = (run.path / "report.html").read_text("utf-8")
    tags.feed(page)
    assert tags.found.count("script") == 3 and "img" not in tags.found
    assert page.count("</script") == 3 and "<!--" not in page.split('id="data">')[1][:100_000]
    assert data["samples"][0]["prompt"] == f"{HOSTILE} 0"
    assert data["facts"]["name"] == run.path.name


def test_a_run_that_died_in_a_write_is_read_as_far_as_it_is_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (segment,) = run.journal.glob("samples/segment-a000002-00000001-*")  # of the last step
    content = segment.read_bytes()
    segment.write_bytes(content[: len(content) // 2])
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "rew')
    data = report(run)
    assert data["facts"]["steps_done"] == 4
    known = sum(s["step"] == 4 for s in data["samples"])
    assert (
        0 < known < SAMPLES and f"{SAMPLES - known} records could not be read" in data["selection"]
    )
    assert data["facts"]["state"] == "running", "its start has not ended, and began just now"


def test_the_state_of_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (start,) = [p for p in run.logs.iterdir() if not p.is_symlink()]
    write_json(start / "status.json", {"time": time.time() - 3600})
    silent = report(run)["facts"]
    assert silent["state"] == "silent" and "last wrote at" in silent["because"]
    write_json(start / "ended.json", {"outcome": "failed", "reason": "r: code 1", "time": 2e9})
    failed = report(run)
    assert (failed["facts"]["state"], failed["facts"]["because"]) == ("failed", "r: code 1")
    assert failed["events"][-1]["what"] == "failed: r: code 1"
    write_json(run.done, {"mode": "train", "steps": 2})  # before train.steps was raised
    extended = report(run)["facts"]
    assert (extended["state"], extended["steps"]) == ("failed", 4)
    write_json(run.done, {"mode": "replay", "steps": 2})  # of a dump of step 2
    assert report(run)["facts"]["state"] == "done"
    write_json(run.done, {"mode": "train", "steps": 4})
    assert report(run)["facts"]["state"] == "done"


def test_a_pruned_journal_leaves_the_curves(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    journal = Journal(run.journal)
    assert journal.prune(before_step=4) > 0
    data = report(run)
    assert trace(data, "reward", "mean")["x"] == [1, 2, 3, 4]
    assert {s["step"] for s in data["samples"]} == {4}
    assert [a["after_step"] for a in data["attempts"]] == [0, 2, 4]


def test_a_run_without_a_step_says_so(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.config.write_text(resolved_yaml(config(steps=9)))
    make_start(run)
    Journal(run.journal)
    data = report(run)
    assert data["facts"]["steps_done"] == 0 and data["facts"]["steps"] == 9
    assert data["samples"] == [] and "no sample" in data["selection"]


def test_a_folder_that_is_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "is not the folder of a run" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_out_names_the_file(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert cli.main(["report", str(run.path), "--out", str(tmp_path / "a.html")]) == 0
    assert data_of(tmp_path / "a.html")["samples"] and not (run.path / "report.html").exists()


def test_the_selection_is_bounded_and_has_the_largest_gaps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "journal")
    for step in range(12):
        write_batch(journal, step)
    monkeypatch.setattr(selection, "NEWEST", 3)
    monkeypatch.setattr(selection, "SPREAD_BATCHES", 4)
    monkeypatch.setattr(selection, "SPREAD_EACH", 3)
    monkeypatch.setattr(selection, "WORST", 8)
    swept = sweep(JournalReader(tmp_path / "journal"))
    chosen = choose(swept)
    by_reason = {
        why: [(c.batch, c.row) for c in chosen if why in c.why]
        for why in ("newest", "spread", "worst gap")
    }
    assert by_reason["newest"] == [(11, 0), (11, 1), (11, 2)], "a whole group"
    assert sorted({batch for batch, _ in by_reason["spread"]}) == [0, 4, 7, 11]
    assert len(by_reason["spread"]) == 12
    assert by_reason["worst gap"] == [(10, 4), (10, 5)] + [(11, i) for i in range(6)]
    monkeypatch.setattr(selection, "ALL_TOKENS", 20 * len(chosen))
    shown = list(selection.show(JournalReader(tmp_path / "journal"), swept, chosen, None))
    assert len(shown) == len(chosen)
    assert all(sum(len(r["ids"]) for r in s["ranges"]) <= 20 for s in shown)
    assert all(s["ranges"][0]["start"] == 0 for s in shown)


def test_a_long_response_keeps_beginning_end_and_its_largest_gap() -> None:
    gaps = np.zeros(1000, np.float32)
    gaps[500] = -3
    assert shown_ranges(1000, 90, gaps) == [(0, 30), (485, 515), (970, 1000)]
    assert shown_ranges(1000, 90, None) == [(0, 30), (970, 1000)]
    gaps[990] = 4
    assert shown_ranges(1000, 90, gaps) == [(0, 30), (970, 1000)]
    assert shown_ranges(90, 90, None) == [(0, 90)] and shown_ranges(0, 90, None) == []


def byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({mark: i for i, mark in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_character_of_several_tokens_comes_with_the_last_of_them(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(" né</script>", add_special_tokens=False)
    assert token_pieces(tokenizer)(ids) == [" ", "n", "", "é", *"</script>"]
    run = make_run(tmp_path)
    tokenizer.save_pretrained(run.exported_model)
    journal = Journal(run.journal)
    write_batch(journal, 4, ids=ids)
    write_metrics(run, [5])
    data = report(run)
    (tokens,) = next(s for s in data["samples"] if s["step"] == 5)["ranges"]
    assert tokens["texts"][:13] == [" ", "n", "", "é", *"</script>"]
    assert (run.path / "report.html").read_text("utf-8").count("</script") == 3
