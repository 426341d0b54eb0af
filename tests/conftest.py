"""Shared by all tests: helper modules of tests/ and its folders import by their plain names."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("", "resume", "unit", "slurm", "gpu"):
    sys.path.insert(0, str(Path(__file__).parent / folder))
