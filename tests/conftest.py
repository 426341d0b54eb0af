"""Shared by all tests: helper modules of tests/ and its folders import by their plain names."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import settings

settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")

for folder in ("", "resume", "unit", "slurm", "gpu"):
    sys.path.insert(0, str(Path(__file__).parent / folder))
