#!/usr/bin/env bash
# The trainers' environment as a virtual environment: what train.Dockerfile runs, and the recipe for a site without
# containers. Needs Python >= 3.12, the CUDA 13 toolkit and cuDNN headers (Transformer Engine compiles its PyTorch part).
# Not yet built or run on a GPU.
#
#   bash launch/images/train.sh /shared/venvs/agpo-train
set -euo pipefail
venv=${1:?usage: train.sh FOLDER}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
requirements=$here/requirements-cpu.txt
[ -f "$requirements" ] || requirements=$here/../requirements-cpu.txt

python3 -m venv "$venv"
pip() { "$venv/bin/python" -m pip install --no-cache-dir --disable-pip-version-check "$@"; }

pip torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130
# Trainers and servers meet in NCCL groups, and NCCL refuses members of another version: this is the one that the
# torch 2.14.1 of sglang 0.5.23 brings. The preflight compares the two.
pip nvidia-nccl-cu13==2.30.7
# The CPU list is what this project imports; torch is there already. Its packages only SGLang needs do no harm here.
grep -v '^torch==' "$requirements" >"$venv/requirements.txt"
pip -r "$venv/requirements.txt"
pip setuptools wheel ninja pybind11
pip --no-build-isolation "transformer-engine[pytorch,core_cu13]==2.20.2"
pip --no-deps megatron-core==0.19.2
"$venv/bin/python" -c 'import torch; print("torch", torch.__version__)'
