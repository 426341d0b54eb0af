"""Server against trainer in the loss: the token correction that it computes, effective sample sizes, ages."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from made import changed, loss, sequence

from agpo_megatron.algorithm.correction import rollout_correction
from agpo_megatron.algorithm.loss import check_rows, micro_batch_loss, row_loss
from agpo_megatron.algorithm.loss_metrics import loss_metrics
from agpo_megatron.policy.packing import pack
from agpo_megatron.samples import TrainSequence

LOG2 = math.log(2.0)
TIS = {"correction": {"kind": "tis", "high": 1.5}}
GAPS = [[LOG2, 0.0, -LOG2], [0.3, -50.0]]
"""log q of each token, q = exp(trainer - server)."""


def work(gaps: list[list[float]], **columns: Any) -> list[TrainSequence]:
    """Sequences of a group, A = 1, -2, ..., loss weight 0.25; the trainer says -1 for every token."""
    return [
        sequence(
            f"g0.{i}",
            [1] * (len(mine) + 1),
            0.25,
            [0] + [1] * len(mine),
            [1.0, -2.0, 0.5][i],
            rollout_logprobs=[0.0, *(-1.0 - gap for gap in mine)],
            **{name: values[i] for name, values in columns.items()},
        )
        for i, mine in enumerate(gaps)
    ]


def computed(
    how: Any, sequences: list[TrainSequence]
) -> tuple[list[float], dict[str, float], dict[str, float]]:
    """(gradient by log-prob, sums, metrics) of one pack."""
    batch = pack(sequences, 1)
    check_rows(how, batch.loss)
    logprob = torch.full((len(batch.rows),), -1.0, requires_grad=True)
    total, stats = micro_batch_loss(how, logprob, logprob.detach(), batch.loss)
    (gradient,) = torch.autograd.grad(total, logprob)
    rows = row_loss(how, batch.loss)
    assert rows is not None
    by_row = rows(logprob, logprob.detach(), slice(None)).sum()
    assert torch.autograd.grad(by_row, logprob)[0].equal(gradient)
    sums = {name: float(value) for name, value in stats.items()}
    return gradient.tolist(), sums, loss_metrics(how, sums, None)[0]


def test_truncated_token_weights_are_computed_without_gradient() -> None:
    gradient, sums, metrics = computed(loss(**TIS), work(GAPS))
    factors = [1.5, 1.0, 0.5, math.exp(0.3), math.exp(-20.0)]  # the log is limited
    advantages = [1.0, 1.0, 1.0, -2.0, -2.0]
    expected = [-0.25 * c * a for c, a in zip(factors, advantages, strict=True)]
    assert gradient == pytest.approx(expected, rel=1e-6)
    assert sums["loss"] == pytest.approx(sum(expected), rel=1e-6)
    assert metrics["correction/mean"] == pytest.approx(sum(factors) / 5)
    assert metrics["correction/dropped_frac"] == 0.0


def test_they_are_those_of_the_scored_way() -> None:
    plain = work(GAPS)
    scored = [
        changed(
            s,
            correction=[
                0.0,
                *rollout_correction(
                    np.full(len(s.response_tokens), -1.0, np.float32),
                    s.columns["rollout_logprobs"],
                    s.loss_mask,
                    kind="tis",
                    level="token",
                    low=0.5,
                    high=1.5,
                ),
            ],
        )
        for s in plain
    ]
    one, sums, _ = computed(loss(**TIS), plain)
    other, its, metrics = computed(loss(**TIS), scored)
    assert one == pytest.approx(other, rel=1e-6)
    assert sums["loss"] == pytest.approx(its["loss"], rel=1e-6)
    assert "correction/mean" not in metrics, "known with the batch"
    moved = [changed(s, rollout_logprobs=[0.0, *[-9.0] * len(s.response_tokens)]) for s in scored]
    assert computed(loss(**TIS), moved)[0] == other, "what was decided with the batch stays"
    without, _, _ = computed(loss(), plain)
    assert without == pytest.approx([-0.25, -0.25, -0.25, 0.5, 0.5])


@pytest.mark.parametrize(
    ("correction", "known"),
    [
        ({"kind": "tis"}, False),
        ({"kind": "tis", "level": "sequence"}, True),
        ({"kind": "mis"}, True),
    ],
)
def test_a_correction_that_nobody_can_compute_is_refused(
    correction: dict[str, str], known: bool
) -> None:
    sequences = work(GAPS)
    if not known:
        sequences = [changed(s, rollout_logprobs=[math.nan] * s.length) for s in sequences]
    with pytest.raises(ValueError, match="a rollout correction needs the log-probs"):
        check_rows(loss(correction=correction), pack(sequences, 1).loss)


def test_effective_sample_sizes() -> None:
    gaps = [[LOG2, 0.0], [0.0, 0.0]]  # q = 2, 1, 1, 1 by token; 2, 1 by sequence
    _, _, metrics = computed(loss(), work(gaps))
    assert metrics["rollout/ess_token"] == pytest.approx(25 / (4 * 7))
    assert metrics["rollout/ess_sequence"] == pytest.approx(9 / (2 * 5))
    idle = changed(work([[LOG2]])[0], loss_weight=0.0)  # in the pack, without a trained token
    assert computed(loss(), [*work(gaps), idle])[2] == metrics
    same = computed(loss(), work([[LOG2, LOG2], [LOG2, LOG2]]))[2]
    assert (same["rollout/ess_token"], same["rollout/ess_sequence"]) == pytest.approx((1, 1))
    # of the weights that the batch starts from, where those were scored
    old = [[0.0, -1.0 + LOG2, -1.0], [0.0, -1.0, -1.0]]
    scored = computed(loss(), work([[0.0, 0.0], [0.0, 0.0]], old_logprobs=old))[2]
    assert scored["rollout/ess_token"] == pytest.approx(25 / (4 * 7))
    unknown = [changed(s, rollout_logprobs=[math.nan] * 3) for s in work(gaps)]
    assert not {n for n in computed(loss(), unknown)[2] if n.startswith("rollout/")}


def test_products_over_long_sequences_stay_finite() -> None:
    _, _, metrics = computed(loss(), work([[60.0] * 30, [-60.0] * 30]))
    assert metrics["rollout/ess_token"] == pytest.approx(0.5)
    assert metrics["rollout/ess_sequence"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("staleness", "age"),
    [(0.0, 0), (0.9, 0), (1.0, 1), (2.0, 2), (3.5, 2), (4.0, 4), (7.9, 4), (8.0, 8), (40.0, 8)],
)
def test_differences_are_told_apart_by_age(staleness: float, age: int) -> None:
    gaps = [[0.5, -0.25, 0.0], [1.0]]
    _, _, metrics = computed(loss(), work(gaps, staleness=[staleness, 100.0]))
    found = {n: x for n, x in metrics.items() if "_age" in n}
    expected = {f"rollout/logprob_abs_diff_age{age}": 0.25, "rollout/logprob_abs_diff_age8": 1.0}
    if age == 8:
        expected = {"rollout/logprob_abs_diff_age8": 1.75 / 4}
    assert found == pytest.approx(expected)
