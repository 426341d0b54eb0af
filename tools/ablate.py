"""Compare arms on tasks over seeds: ``python tools/ablate.py configs/ablation.yaml --out DIR``.

The file lists arms, tasks and seeds (configs/ablation.yaml says what each key means); every cell of the table is a run
by the public command line. Data and cold start of a task and seed are made once for all arms. Called again it goes on:
cells that have ended are not run again, interrupted ones continue where they were. Tables of what has ended so far,
with intervals, and one page go to ``--out``: results.md, results.html, results.json, frontier.png.

    --jobs N             so many cells at once
    --only ARM,TASK,SEED just this cell (and what it needs); its numbers are printed
    --report             no runs; tables of what is there
    --slurm              submit arrays to Slurm, one element per cell; options for sbatch after ``--``
    CONFIG --vary KEY=a,b --seeds 1,2,3    without a file: one key of one run's configuration
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ablation.measures import Measured, measured
from ablation.plan import START, Cell, Plan, PlanError, read_plan, varied
from ablation.report import write_report
from ablation.running import is_finished, run_cells
from ablation.slurm_array import submit

from agpo_megatron.config import ConfigError


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the arguments, and the options for sbatch behind ``--``."""
    own, beyond = list(argv), []
    if "--" in own:
        at = own.index("--")
        own, beyond = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(
        prog="ablate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "file", type=Path, help="the ablation, or with --vary the configuration of a run"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--jobs", type=int, default=1, metavar="N")
    parser.add_argument("--only", metavar="ARM,TASK,SEED")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--slurm", action="store_true")
    parser.add_argument("--vary", metavar="KEY=a,b", help="preset=grpo,agpo: algorithm.preset")
    parser.add_argument("--seeds", default="1", metavar="1,2,3", help="with --vary")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=c",
        dest="settings",
        help="for every cell",
    )
    arguments = parser.parse_args(own)
    if beyond and not arguments.slurm:
        parser.error(f"{' '.join(beyond)} after -- is for sbatch; add --slurm")
    if arguments.jobs < 1:
        parser.error("--jobs: at least 1")
    return arguments, beyond


def plan_of(arguments: argparse.Namespace) -> Plan:
    if arguments.vary:
        return varied(
            arguments.file, arguments.vary, arguments.seeds, arguments.out, arguments.settings
        )
    return read_plan(arguments.file, arguments.out, arguments.settings)


def finished(plan: Plan) -> tuple[dict[Cell, Measured], dict[str, float]]:
    """Read the cells that have ended: their measures, and seconds by name."""
    results, seconds = {}, {}
    for cell in plan.cells():
        if is_finished(plan, cell):
            folder = plan.run_dir(cell)
            results[cell] = measured(folder, plan.config(cell))
            seconds[str(cell)] = json.loads((folder / "cell.json").read_text())["seconds"]
    return results, seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0 done, 1 if a cell failed, 2 bad input, 130 interrupted."""
    arguments, options = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        plan = plan_of(arguments)
        plan.out.mkdir(parents=True, exist_ok=True)
        if arguments.slurm:
            print("submitted", *submit(plan, arguments.jobs, options))
            return 0
        cells = [plan.cell(arguments.only)] if arguments.only else plan.cells()
        failed = [] if arguments.report else run_cells(plan, cells, arguments.jobs)
        if arguments.only:
            if not failed and cells[0].arm != START:
                numbers = measured(plan.run_dir(cells[0]), plan.config(cells[0])).summary()
                print(json.dumps(numbers, indent=1))
        else:
            print(write_report(plan, *finished(plan)))
    except (PlanError, ConfigError) as error:
        print(f"ablate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
