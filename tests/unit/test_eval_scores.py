"""Scores of an evaluation: unbiased pass@k, intervals over problems, accuracy against tokens; scored again."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.config.task import DataConfig, EvalSetConfig, RewardConfig
from agpo_megatron.controller.eval_scores import (
    SAMPLES_SCHEMA,
    bootstrap_interval,
    pass_at,
    set_scores,
)
from agpo_megatron.controller.evaluation import EvalSet, rescore, samples_path
from agpo_megatron.data.problems import DataError, ProblemSet, problem_id
from agpo_megatron.data.rows import JsonLines, read_arrow
from agpo_megatron.files import write_durably
from agpo_megatron.journal.records import encode_table
from agpo_megatron.reward.rewards import Rewards


def test_pass_at_k_is_the_mean_over_all_draws() -> None:
    for n, correct in itertools.product(range(1, 7), range(7)):
        if correct > n:
            continue
        verdicts = [i < correct for i in range(n)]
        for k in range(1, n + 1):
            draws = [any(draw) for draw in itertools.combinations(verdicts, k)]
            assert pass_at(k, n, correct) == pytest.approx(np.mean(draws))
    with pytest.raises(ValueError, match="k must be 1 to n"):
        pass_at(5, 4, 1)


def test_the_interval_narrows_with_problems_and_holds_the_mean() -> None:
    few, many = bootstrap_interval([0.0, 1.0] * 10), bootstrap_interval([0.0, 1.0] * 1000)
    assert few[0] < many[0] < 0.5 < many[1] < few[1]
    assert many[1] - many[0] == pytest.approx(
        4 * 0.5 / 2000**0.5, rel=0.15
    )  # of a mean: +- 1.96 sigma / sqrt(n)
    assert bootstrap_interval([1.0] * 5) == (1.0, 1.0)
    assert bootstrap_interval([0.0, 1.0, 1.0]) == bootstrap_interval([0.0, 1.0, 1.0])


def table(verdicts: list[list[bool]], tokens: list[list[int]]) -> pa.Table:
    rows = [
        {
            "problem": p,
            "problem_id": problem_id([{"role": "user", "content": f"p{p}"}]),
            "sample": i,
            "prompt": f"p{p}",
            "answer": str(p),
            "response": f"\\boxed{{{p if right else -1}}}",
            "tokens": count,
            "finish_reason": "length" if count >= 100 else "stop",
            "value": float(right),
            "correct": right,
            "parts": json.dumps({"near": 0.5 * right}),
            "error": "timeout: no verdict" if count == 7 else "",
            "prompt_tokens": [1],
            "response_tokens": [2] * count,
            "rollout_logprobs": [-1.0] * count,
        }
        for p, (right_of, tokens_of) in enumerate(zip(verdicts, tokens, strict=True))
        for i, (right, count) in enumerate(zip(right_of, tokens_of, strict=True))
    ]
    return pa.Table.from_pylist(rows, SAMPLES_SCHEMA)


SAMPLES = table([[True, False], [False, False], [True, True]], [[10, 7], [100, 20], [40, 64]])


def test_scores_of_a_set() -> None:
    scores = set_scores(SAMPLES, 100)
    assert (scores["problems"], scores["samples_per_problem"]) == (3, 2)
    assert scores["accuracy"] == scores["pass@1"] == pytest.approx(0.5)
    assert scores["pass@2"] == pytest.approx(2 / 3)
    assert scores["accuracy_low"] < 0.5 < scores["accuracy_high"]
    assert scores["tokens_mean"] == pytest.approx(241 / 6)
    assert scores["tokens_correct_mean"] == pytest.approx(38.0)
    assert scores["truncated_frac"] == pytest.approx(1 / 6)
    assert scores["error_frac"] == pytest.approx(1 / 6)
    assert scores["parts"] == {"near": 0.25}
    assert scores["accuracy_at_tokens"] == {
        "32": pytest.approx(1 / 6),
        "64": pytest.approx(3 / 6),
        "100": pytest.approx(3 / 6),
    }
    uneven = table([[True], [True, True]], [[1], [1, 1]])
    with pytest.raises(ValueError, match="1 to 2 samples"):
        set_scores(uneven, 100)


def held_out(answers: list[int], shift: int = 0) -> EvalSet:
    lines = [
        (i + 1, json.dumps({"prompt": f"p{i + shift}", "answer": a})) for i, a in enumerate(answers)
    ]
    tokens = [np.array([1], np.int32)] * len(lines)
    problems = ProblemSet("set", DataConfig(), JsonLines("x", lines), np.arange(len(lines)), tokens)
    return EvalSet(EvalSetConfig(path="x", name="set", n=2, temperature=1.0), problems, 0, 100)


def scored_again(folder: RunFolder, eval_set: EvalSet) -> float:
    async def run() -> float:
        async with Rewards(RewardConfig(function="math", workers=1), [eval_set.config]) as rewards:
            return float((await rescore(folder, [eval_set], rewards))[3]["set"]["accuracy"])

    return asyncio.run(run())


def test_sets_of_different_names_have_files_of_their_own(tmp_path: Path) -> None:
    names = ["a_b", "a b", "a/b", "a%b", "a.b"]
    paths = {samples_path(RunFolder(tmp_path), 3, name) for name in names}
    assert len(paths) == len(names)
    assert {path.parent for path in paths} == {tmp_path / "evaluations"}
    assert {path.name.split(".")[0] for path in paths} == {"step-00000003"}


def test_stored_samples_are_scored_again_without_generating(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(DataError, match="no samples to score again"):
        scored_again(folder, held_out([0, 1, 2]))
    path = samples_path(folder, 3, "set")
    path.parent.mkdir()
    write_durably(path, encode_table(SAMPLES))
    assert scored_again(folder, held_out([0, 1, 2])) == pytest.approx(0.5)
    assert scored_again(folder, held_out([0, -1, 2])) == pytest.approx(
        5 / 6
    )  # a reference was mended
    again = read_arrow(path).to_pylist()
    assert [row["correct"] for row in again] == [True, False, True, True, True, True]
    assert again[2]["answer"] == "-1" and again[0]["response_tokens"] == [2] * 10
    content = json.loads(folder.evaluation(3).read_text())
    assert (
        content["sets"]["set"]["accuracy"] == content["scores"]["accuracy"] == pytest.approx(5 / 6)
    )
    with pytest.raises(DataError, match="samples of problem 0 are of another problem"):
        scored_again(folder, held_out([0, 1, 2], shift=1))
