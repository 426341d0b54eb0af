"""Benchmarks of single parts: ``python tools/bench.py PART``. What each measures: tools/benchmarks/PART.py."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

PARTS = sorted(p.stem for p in (Path(__file__).parent / "benchmarks").glob("*.py"))


def main() -> int:
    if sys.argv[1:2] not in [[part] for part in PARTS]:
        print(f"usage: python tools/bench.py {{{','.join(PARTS)}}}", file=sys.stderr)
        return 2
    result: int = importlib.import_module(f"benchmarks.{sys.argv[1]}").main()
    return result


if __name__ == "__main__":
    raise SystemExit(main())
