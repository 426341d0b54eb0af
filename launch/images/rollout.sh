#!/usr/bin/env bash
# The rollout servers' environment as a virtual environment, for a site without containers. Needs Python >= 3.11 and a
# driver for CUDA 13. Not yet built or run on a GPU.
#
#   bash launch/images/rollout.sh /shared/venvs/agpo-rollout
set -euo pipefail
venv=${1:?usage: rollout.sh FOLDER}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

python3 -m venv "$venv"
pip() { "$venv/bin/python" -m pip install --no-cache-dir --disable-pip-version-check "$@"; }

pip sglang==0.5.23 # with its dependencies: torch 2.14.1, its kernels, flashinfer
pip -r "$here/requirements-rollout.txt"
