#!/usr/bin/env bash
# Acceptance kit: what holds on this machine's GPUs, stage by stage, in one table (gpu_report.json, gpu_report.md).
#
#   bash tests/gpu/run.sh [--stages abcdef] [--device cuda|cpu] [--out DIR]
#
# Runs from a plain checkout and fetches nothing: Python >= 3.11 with torch is enough for stage a; docs/gpu.md says what
# the others need. A stage that cannot run says why; one that fails hides no other. Exit code 0 unless one failed.
#
#   TRAIN_PYTHON, ROLLOUT_PYTHON   as for launch/local.sh (default: .venv and .venv-rollout here, else python3)
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
own() { if [ -x "$1" ]; then echo "$1"; else echo "$2"; fi; }
train=${TRAIN_PYTHON:-$(own "$repo/.venv/bin/python" "$(command -v python3)")}
export TRAIN_PYTHON=$train
export ROLLOUT_PYTHON=${ROLLOUT_PYTHON:-$(own "$repo/.venv-rollout/bin/python" "$train")}
export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}
exec "$train" "$repo/tests/gpu/kit.py" "$@"
