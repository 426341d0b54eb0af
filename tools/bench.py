"""Benchmarks of single parts: ``python tools/bench.py PART [options]``. What they measure: tools/benchmarks/PART.py."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

PARTS = sorted(p.stem for p in (Path(__file__).parent / "benchmarks").glob("*.py"))


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in PARTS:
        print(f"usage: python tools/bench.py {{{','.join(PARTS)}}} [options]", file=sys.stderr)
        return 2
    part = sys.argv[1]
    sys.argv = [f"bench.py {part}", *sys.argv[2:]]
    result: int = importlib.import_module(f"benchmarks.{part}").main()
    return result


if __name__ == "__main__":
    raise SystemExit(main())
