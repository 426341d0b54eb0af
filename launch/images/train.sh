#!/usr/bin/env bash
# The trainers' environment as a virtual environment: what train.Dockerfile runs, what launch/install.sh --gpu runs, and
# the recipe for a site without containers. Needs Python >= 3.12, the CUDA 13 toolkit and cuDNN headers (Transformer
# Engine compiles its PyTorch part; CUDA_HOME says where they are). Not yet built or run on a GPU.
#
#   bash launch/images/train.sh /shared/venvs/agpo-train
#
#   PYTHON   interpreter to make it with (default: python3)
set -euo pipefail
venv=${1:?usage: train.sh FOLDER}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cpu=$here/requirements-cpu.txt
[ -f "$cpu" ] || cpu=$here/../requirements-cpu.txt

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip install --no-cache-dir --disable-pip-version-check "$@"; }

# The CPU list is what this project imports, torch included. What only SGLang needs of it does no harm here.
pip -r "$cpu"
pip setuptools wheel ninja pybind11
pip --no-build-isolation -r "$here/requirements-train.txt"
# Last, so that nothing that asks for torch brings torch's own NCCL back.
pip --no-deps -r "$here/nccl.txt"
"$venv/bin/python" "$here/check_nccl.py" "$here/nccl.txt"
