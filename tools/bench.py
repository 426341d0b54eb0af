"""Benchmarks of single parts: ``python tools/bench.py NAME [options]``; ``NAME --help`` lists the options."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = ("logprob",)


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in BENCHMARKS:
        print(f"usage: python tools/bench.py {{{','.join(BENCHMARKS)}}} [options]", file=sys.stderr)
        return 2
    benchmark = importlib.import_module(f"benchmarks.{arguments[0]}")
    result: int = benchmark.main(arguments[1:])
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
