"""One real SGLang server for all end-to-end tests of a session: it takes half a minute to start."""

from __future__ import annotations

from collections.abc import Iterator

import live_server as live
import pytest


@pytest.fixture(scope="session")
def live_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[live.LiveServer]:
    yield from live.run_server(tmp_path_factory.mktemp("sglang"))
