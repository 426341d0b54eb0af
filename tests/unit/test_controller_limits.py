"""The controller raises its own limit of open files."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from agpo_megatron.controller.__main__ import raise_descriptor_limit

pytestmark = pytest.mark.processes


def test_the_soft_limit_becomes_the_hard_one() -> None:
    """In a process of its own, with a soft limit of 100 files; it holds 200 open."""
    program = """
import os, resource
from agpo_megatron.controller.__main__ import raise_descriptor_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300))
raise_descriptor_limit()
held = [os.open("/dev/null", os.O_RDONLY) for _ in range(200)]
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.split(), done.returncode) == (["300", "300"], 0), done.stderr


def test_a_system_that_refuses_is_only_noted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    raise_descriptor_limit()
    assert "the limit of open files stays at" in caplog.text
