"""Skipped only where Slurm cannot be had at all; with root it must be there."""

from __future__ import annotations

import os

import pytest
from slurm_cluster import missing


@pytest.fixture(scope="session", autouse=True)
def slurm_can_run() -> None:
    if reason := missing():
        if os.geteuid() == 0:
            pytest.fail(reason)
        pytest.skip(reason)
