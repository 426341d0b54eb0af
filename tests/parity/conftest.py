"""One contract for all of these tests: ranks are started once, truths computed once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agpo_megatron.parity.contract import Contract


@pytest.fixture(scope="package")
def contract(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Contract]:
    with Contract(tmp_path_factory.mktemp("parity"), ranks=4) as made:
        yield made
