#!/usr/bin/env python3
"""Benchmarks: bench.py NAME [options]; NAME is a module of tools/benchmarks, --help of each says what it measures."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "benchmarks"


def main() -> int:
    """Run the benchmark that the first argument names; returns its exit code."""
    names = sorted(path.stem for path in FOLDER.glob("[a-z]*.py"))
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        print(f"{__doc__}\nNAME: {', '.join(names)}", file=sys.stderr)
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    sys.path.insert(0, str(FOLDER))
    return int(importlib.import_module(sys.argv[1]).main(sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(main())
