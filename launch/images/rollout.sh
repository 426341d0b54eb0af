#!/usr/bin/env bash
# The rollout servers' environment as a virtual environment, for a site without containers, and what launch/install.sh
# --gpu runs. Needs Python >= 3.11 and a driver for CUDA 13. Not yet built or run on a GPU.
#
#   bash launch/images/rollout.sh /shared/venvs/agpo-rollout
#
#   PYTHON   interpreter to make it with (default: python3)
set -euo pipefail
venv=${1:?usage: rollout.sh FOLDER}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip install --no-cache-dir --disable-pip-version-check "$@"; }

pip -r "$here/requirements-rollout.txt"
pip --no-deps -r "$here/nccl.txt"
"$venv/bin/python" "$here/check_nccl.py" "$here/nccl.txt"
