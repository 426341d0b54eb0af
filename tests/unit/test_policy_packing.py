from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import made
import numpy as np
import pytest
import torch

from agpo_megatron.algorithm.loss import check_rows
from agpo_megatron.algorithm.settings import LossSettings
from agpo_megatron.config.schema import PolicyConfig
from agpo_megatron.policy.packing import PAD_TOKEN, pack, pack_all, pack_multiple
from agpo_megatron.samples import COLUMNS, TrainSequence

pytestmark = pytest.mark.processes


def sequence(
    name: str, tokens: list[int], mask: list[int], weight: float = 0.5, **more: object
) -> TrainSequence:
    return made.sequence(name, tokens, weight, mask, advantage=2.0, **more)


SHORT = sequence("a", [7, 8, 9], [0, 1, 1], 0.25, rollout_logprobs=[0, -1.0, -2.0])
LONG = sequence("b", [1, 2, 3, 4, 5], [0, 0, 1, 0, 1])


def test_rows_are_the_positions_before_weighted_tokens() -> None:
    batch = pack([SHORT, LONG], 16)
    assert batch.lengths == (5, 3, 5, 3), (
        "longest first, padding in pieces no longer than a sequence"
    )
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 7, 8, 9] + [PAD_TOKEN] * 8
    assert batch.positions[:8].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.rows.tolist() == [1, 3, 5, 6]
    assert batch.targets.tolist() == [3, 5, 8, 9]
    column = batch.loss.column
    assert column("loss_weight").tolist() == [0.5, 0.5, 0.25, 0.25]
    assert batch.loss.sequence.tolist() == [0, 0, 1, 1]
    assert column("staleness").tolist() == [0.0] * 4
    assert column("advantage").tolist() == [2.0] * 4
    assert column("rollout_logprobs").isnan().tolist() == [True, True, False, False]
    assert column("rollout_logprobs")[2:].tolist() == [-1, -2]
    assert [(s.sample_id, s.start, s.stop) for s in batch.spans] == [("b", 0, 2), ("a", 2, 4)]


def test_scoring_takes_every_token_but_the_first() -> None:
    batch = pack([SHORT, LONG], 16, every_token=True)
    assert batch.rows.tolist() == [0, 1, 2, 3, 5, 6]
    assert batch.targets.tolist() == [2, 3, 4, 5, 8, 9]


@pytest.mark.parametrize("multiple", [1, 16, 48])
def test_length_is_a_multiple(multiple: int) -> None:
    for batch in (pack([SHORT, LONG], multiple), pack([], multiple)):
        assert len(batch.tokens) % multiple == 0
        assert sum(batch.lengths) == len(batch.tokens) == len(batch.positions)
        assert all(a >= b for a, b in pairwise(batch.lengths[:2]))


@pytest.mark.parametrize(
    ("recipe", "tp", "cp", "sequence_parallel", "multiple"),
    [
        ("none", 1, 1, False, 16),
        ("none", 3, 1, True, 48),
        ("none", 8, 2, True, 32),
        ("blockwise", 1, 1, False, 128),
        ("blockwise", 8, 1, False, 128),
        ("blockwise", 8, 1, True, 1024),
        ("blockwise", 4, 2, True, 1024),
        ("tensorwise", 8, 1, True, 128),
        ("delayed", 2, 1, True, 32),
        ("mxfp8", 1, 1, False, 32),
        ("mxfp8", 3, 1, True, 96),
        ("mxfp8", 8, 2, True, 512),
    ],
)
def test_what_fp8_matmuls_need(
    recipe: str, tp: int, cp: int, sequence_parallel: bool, multiple: int
) -> None:
    config = PolicyConfig.model_validate(
        {
            "tensor_parallel": tp,
            "context_parallel": cp,
            "sequence_parallel": sequence_parallel,
            "fp8": {"recipe": recipe},
        }
    )
    assert pack_multiple(config) == multiple


def test_a_filler_trains_nothing() -> None:
    filler = pack([], 16)
    assert len(filler.tokens) == 16
    assert len(filler.rows) == len(filler.loss.sequence) == 0
    assert filler.rows.dtype == filler.targets.dtype == torch.int64


def test_replicas_with_less_work_get_fillers_of_one_length_when_asked() -> None:
    batches = pack_all([[SHORT], [LONG, SHORT] * 3], 16, 4, same_length=True)
    assert [len(b.tokens) for b in batches] == [32] * 4
    assert [len(b.rows) for b in batches] == [2, 12, 0, 0]
    assert [len(b.tokens) for b in pack_all([[SHORT]], 16, 2, same_length=False)] == [16, 16]


def test_logprobs_and_corrections_follow_their_tokens() -> None:
    scored = {"a": [0.0, -0.5, -0.6], "b": [0, -1, -2, -3, -4]}
    batch = pack(
        [
            made.changed(
                s, old_logprobs=scored[s.sample_id], correction=[-x for x in scored[s.sample_id]]
            )
            for s in (SHORT, LONG)
        ],
        16,
    )
    assert batch.loss.column("old_logprobs").tolist() == pytest.approx([-2, -4, -0.5, -0.6])
    assert batch.loss.column("correction").tolist() == pytest.approx([2, 4, 0.5, 0.6])


def test_what_nobody_knows_is_not_packed_and_reads_as_its_default() -> None:
    """Prompts have the default too when all tokens are scored."""
    batch = pack([SHORT, LONG], 16, every_token=True)
    packed = {c.name: c.default for c in COLUMNS if c.default is not None}
    assert {*batch.loss.per_token, *batch.loss.per_sequence} == {
        "advantage",
        "loss_weight",
        "rollout_logprobs",
    }
    given = {"advantage", "loss_weight", "rollout_logprobs"}
    for name in packed.keys() - given:
        values = batch.loss.column(name)
        assert torch.equal(values.isnan(), torch.full((6,), math.isnan(packed[name])))
        assert math.isnan(packed[name]) or values.tolist() == [packed[name]] * 6
    prompted = TrainSequence(
        "c",
        np.array([1, 2, 3], np.int32),
        np.array([4, 5], np.int32),
        np.ones(2, np.uint8),
        {"old_logprobs": np.array([-1, -2], np.float32)},
    )
    old = pack([prompted], 1, every_token=True).loss.column("old_logprobs")
    assert old.isnan().tolist() == [True, True, False, False] and old[2:].tolist() == [-1, -2]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"loss_mask": np.ones(1)}, "2 response tokens but 1 loss_mask"),
        ({"columns": {"rollout_logprobs": np.ones(1)}}, "2 response tokens but 1 rollout_logprobs"),
        ({"columns": {"rolout": 1.0}}, r"\['rolout'\] is not in samples.COLUMNS"),
        ({"prompt_tokens": [], "response_tokens": [], "loss_mask": []}, "c has no tokens"),
    ],
)
def test_arrays_that_do_not_fit_are_named(values: dict[str, Any], words: str) -> None:
    fits = {"prompt_tokens": [1], "response_tokens": [2, 3], "loss_mask": [1, 1]}
    with pytest.raises(ValueError, match=words):
        TrainSequence(sample_id="c", **{**fits, **values})


def test_a_missing_old_logprob_is_refused() -> None:
    rows = pack([made.changed(SHORT, old_logprobs=[0.0, -0.5, -0.6]), LONG], 16).loss
    with pytest.raises(ValueError, match="no old_logprobs, others have"):
        check_rows(LossSettings(), rows)


def test_a_sequence_without_weight_has_no_rows() -> None:
    assert len(pack([made.changed(LONG, loss_weight=0.0)], 16).rows) == 0
