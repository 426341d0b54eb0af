#!/usr/bin/env bash
# Fresh machine to test result: installs, checks style, types and the rules of the house, runs the tests.
#
#   bash tests/run.sh [--unit|--full] [pytest arguments]
#
#   --unit: the inner loop, under a minute: no ranks, no servers;  --full: the slow tier as well
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$repo"
# The environment is installed without compiled modules; processes that may not keep theirs start three times slower.
unset PYTHONDONTWRITEBYTECODE
# Several processes share few cores here: more threads each would only fight.
export OMP_NUM_THREADS=1 PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"

arguments=()
for argument in "$@"; do
    case $argument in
        --full) arguments+=(-m "full or not full") ;;
        --unit) arguments+=(tests/unit -m "not full and not processes") ;;
        *) arguments+=("$argument") ;;
    esac
done

bash launch/install.sh --dev
bin=${AGPO_VENV:-$repo/.venv}/bin
step() { printf '== %s\n' "$*"; }

step ruff check
"$bin/ruff" check .
step ruff format --check
"$bin/ruff" format --check .
step mypy
"$bin/mypy"
step lint-imports
"$bin/lint-imports"
step pytest
exec "$bin/python" -m pytest --durations=15 "${arguments[@]}"
