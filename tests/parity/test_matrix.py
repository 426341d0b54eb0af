"""One batch, one answer: every row of the matrix against the fp64 reference that has no layout."""

from __future__ import annotations

import matrix
import pytest
from matrix import Row

from agpo_megatron.parity.comparison import failures
from agpo_megatron.parity.contract import Contract

SMALL, LARGE = matrix.tiers()


def check(contract: Contract, row: Row) -> None:
    step, limits = matrix.step_of(contract, row)
    assert list(failures(step.deviations(limits))) == []


@pytest.mark.parametrize("row", SMALL, ids=matrix.name_of)
def test_on_up_to_four_ranks(contract: Contract, row: Row) -> None:
    check(contract, row)


@pytest.mark.full
@pytest.mark.parametrize("row", LARGE, ids=matrix.name_of)
def test_on_up_to_eight_ranks(contract: Contract, row: Row) -> None:
    check(contract, row)


def test_every_admissible_pair_is_in_a_row() -> None:
    """A pair that no row of up to 8 ranks holds is one that an exclusion forbids, or needs more ranks."""
    held = frozenset().union(*(matrix.pairs_of(r) for r in [*SMALL, *LARGE]))
    for (a, x), (b, y) in matrix.all_pairs() - held:
        least = {axis: values[0] for axis, values in matrix.AXES.items()}
        row = {**least, a: x, b: y}
        assert matrix.reason_against(row) or matrix.world(row) > 8, (a, x, b, y)
