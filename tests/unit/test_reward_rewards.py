"""Which functions score which source, and how verdicts reach the samples of a group."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import made
import pytest

from agpo_megatron.config.task import PartConfig, RewardConfig, TrainSourceConfig
from agpo_megatron.reward import Problem
from agpo_megatron.reward.loading import RewardError
from agpo_megatron.reward.rewards import Rewards, parts_of, reference_check
from agpo_megatron.samples import Group


def test_a_spec_is_a_name_a_list_or_a_field_of_the_row() -> None:
    assert parts_of("math", {}) == [PartConfig(name="math")]
    listed = [
        PartConfig(name="math", weight=2.0, options={"extract": "tag"}),
        PartConfig(name="format"),
    ]
    assert parts_of(listed, {}) == listed
    assert parts_of("row:meta.kind", {"meta": {"kind": "choice"}}) == [PartConfig(name="choice")]
    with pytest.raises(RewardError, match="reward row:kind: no field 'kind'"):
        parts_of("row:kind", {"other": 1})
    with pytest.raises(RewardError, match="the row says 'os:system'; a row chooses among numeric"):
        parts_of("row:kind", {"kind": "os:system"})


@pytest.mark.parametrize(
    ("spec", "row", "answer", "message"),
    [
        ("numeric", {}, "2\\pi", "is not one number"),
        ("row:kind", {"kind": "choice"}, "5", "none of the letters ABCDE"),
        ([PartConfig(name="choice", options={"letters": "AB"})], {}, "C", "none of the letters AB"),
        ("code", {}, "[]", "no tests"),
        ("row:kind", {}, "5", "no field 'kind'"),
    ],
)
def test_references_that_could_never_be_confirmed_are_known_beforehand(
    spec: Any, row: dict[str, Any], answer: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        reference_check(spec)(row, answer)
    reference_check("numeric")({}, "#### 5")
    reference_check("math")({}, "2\\pi")
    reference_check("my.module:score")({}, "")


def test_every_source_has_its_own_reward_and_samples_get_their_verdicts() -> None:
    sources = [TrainSourceConfig(path="a"), TrainSourceConfig(path="b", reward="exact")]
    prompt = made.prompt(3)
    samples = [
        replace(made.sample(prompt, i, 2), text=t) for i, t in enumerate(["7", "it is 7", "8"])
    ]

    async def run() -> list[Group]:
        config = RewardConfig(correct=2.0, wrong=-1.0, workers=1, max_error_frac=1.0)
        async with Rewards(config, sources) as rewards:
            problems = [(Problem([], "7"), 0), (Problem([], "7"), 1), (Problem([], "none"), 0)]
            return [await rewards.score_group(Group(prompt, samples), p, s) for p, s in problems]

    numeric, exact, broken = asyncio.run(run())
    assert [(s.raw_reward, s.correct) for s in numeric.samples] == [
        (2, True),
        (2, True),
        (-1, False),
    ]
    assert [(s.raw_reward, s.correct) for s in exact.samples] == [
        (2, True),
        (-1, False),
        (-1, False),
    ]
    assert {s.reward_error for s in exact.samples} == {""}
    assert all(
        s.raw_reward == -1 and s.reward_error.startswith("exception: ") for s in broken.samples
    )
