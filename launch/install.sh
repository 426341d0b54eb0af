#!/usr/bin/env bash
# Makes the virtual environment with the pinned CPU stack. Does nothing, quickly, when it is complete.
#
#   bash launch/install.sh [--dev]        --dev: also what the tests and checks need; with root on Debian and its kin
#                                         that includes a Slurm, whose services stay off, and a Chromium
#   bash launch/install.sh --gpu          the two environments of a GPU machine instead: .venv for trainers and
#                                         controller, .venv-rollout for servers (recipes: launch/images/)
#
#   AGPO_VENV  where the environment lies   (default: .venv in the repository; the servers': beside it, with -rollout)
#   PYTHON     interpreter to make it with  (default: the first of python3, python3.11 ... that is >= 3.11)
#
# PyTorch: requirements-cpu.txt pins torch==2.13.0. Which build of it pip finds (CPU or CUDA) depends on the indexes
# that pip is configured with. On a machine without a GPU point pip at PyTorch's index of CPU wheels with
# PIP_EXTRA_INDEX_URL (or PIP_INDEX_URL, or pip.conf) before running this; a CUDA build works too, it is only large.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${AGPO_VENV:-$repo/.venv}
sglang=sglang==0.5.23
megatron=megatron-core==0.19.2

fail() { echo "install: $*" >&2; exit 1; }

dev=false gpu=false
for argument in "$@"; do
    case $argument in
        --dev) dev=true ;;
        --gpu) gpu=true ;;
        *) fail "unknown option $argument; usage: bash launch/install.sh [--dev | --gpu]" ;;
    esac
done

# Each environment is finished by its own script; a stamp written last says that it was.
install_gpu() {
    command -v nvidia-smi >/dev/null || fail "--gpu needs NVIDIA's driver for CUDA 13, and there is no nvidia-smi here"
    command -v "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" nvcc >/dev/null ||
        fail "--gpu compiles a part of Transformer Engine and finds no nvcc: install the CUDA 13 toolkit, set CUDA_HOME"
    local name folder stamp wanted
    for name in train rollout; do
        folder=$venv
        [ $name = train ] || folder=$venv-rollout
        ! [ -e "$folder/.base.stamp" ] ||
            fail "$folder has the packages of a machine without GPU; remove it or set AGPO_VENV to another place"
        stamp=$folder/.$name.stamp
        wanted=$(cat "$repo"/launch/images/*.txt "$repo/launch/images/$name.sh" "$repo/launch/requirements-cpu.txt" |
            sha256sum | cut -d' ' -f1)
        [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || continue
        echo "install: $folder with launch/images/$name.sh"
        bash "$repo/launch/images/$name.sh" "$folder"
        [ $name = rollout ] ||
            "$folder/bin/python" -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e "$repo"
        echo "$wanted" >"$stamp"
    done
    echo "install: start with bash launch/local.sh CONFIG, or sbatch launch/agpo_8b.sh"
}
if $gpu; then
    $dev && fail "--gpu and --dev make different environments at one place; use AGPO_VENV and two calls"
    install_gpu
    exit
fi

usable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        usable "$PYTHON" || fail "PYTHON=$PYTHON is not a Python >= 3.11 with the venv module; set PYTHON to one"
        echo "$PYTHON"
        return
    fi
    local candidate
    for candidate in python3 python3.11 python3.12 python3.13 python3.14; do
        if usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python >= 3.11 with the venv module found (on Debian: apt-get install python3-venv); set PYTHON"
}

if ! [ -x "$venv/bin/python" ]; then
    python=$(find_python)
    echo "install: $venv from $("$python" --version)"
    "$python" -m venv "$venv"
fi
python=$venv/bin/python
usable "$python" || fail "$venv is not a Python >= 3.11 environment; remove it or set AGPO_VENV to another place"

# A stamp says what an environment was made from; it is written last, so an interrupted install is repeated.
fingerprint() { (cd "$repo" && echo "$repo" && "$python" --version && cat setup.py "$@") | sha256sum | cut -d' ' -f1; }
complete() { [ "$(cat "$venv/.$1.stamp" 2>/dev/null)" = "$2" ]; }

pip_install() { # NAME ARGUMENTS...: one pip run, timed; its output is shown when it fails
    local name=$1 log start=$SECONDS
    shift
    log=$(mktemp)
    # --no-compile: Python compiles what is imported when it is imported (unless PYTHONDONTWRITEBYTECODE is set);
    # compiling all of it takes a minute.
    if ! "$python" -m pip install --no-compile --disable-pip-version-check --no-input "$@" >"$log" 2>&1; then
        cat "$log" >&2
        rm -f "$log"
        fail "could not install $name (pip's messages are above)"
    fi
    rm -f "$log"
    echo "install: $name, $((SECONDS - start)) s"
}

# What tests start of the distribution's packages: installed with root on Debian and its kin, else those tests skip.
install_packages() { # NAME TESTS PACKAGES...
    local name=$1 tests=$2 log start=$SECONDS
    shift 2
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        echo "install: no $name here, and no root or apt-get to install it: $tests will be skipped"
        return
    fi
    log=$(mktemp)
    export DEBIAN_FRONTEND=noninteractive
    local install=(apt-get install -y -q --no-install-recommends "$@")
    if ! "${install[@]}" >"$log" 2>&1 && ! { apt-get update -q && "${install[@]}"; } >"$log" 2>&1; then
        cat "$log" >&2
        echo "install: could not install $* (apt-get's messages are above): $tests will be skipped"
        return
    fi
    rm -f "$log"
    echo "install: $name, $((SECONDS - start)) s"
}

# tests/slurm starts clusters of its own from the distribution's packages.
install_slurm() {
    local name policy=/usr/sbin/policy-rc.d
    for name in slurmctld slurmd sbatch munged ip; do
        PATH=$PATH:/usr/sbin:/sbin command -v $name >/dev/null || break
        [ $name != ip ] || return 0
    done
    if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null && ! [ -e "$policy" ]; then # the packages must not start their services
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
        # shellcheck disable=SC2064
        trap "rm -f $policy" EXIT
    fi
    install_packages Slurm "the tests in tests/slurm" slurmctld slurmd slurm-client munge iproute2
}

# A test opens a report in a browser. Playwright would download one of its own; the distribution's serves.
install_chromium() {
    ! command -v chromium >/dev/null || return 0
    install_packages Chromium "the tests that open a report in a browser" chromium fonts-dejavu-core
}

base=$(fingerprint launch/install.sh launch/requirements-cpu.txt)
if ! complete base "$base"; then
    pip_install "CPU stack" -r "$repo/launch/requirements-cpu.txt"
    # --no-deps: sglang's metadata pins a CUDA build of another torch and CUDA-only kernels; what it really imports
    # when it serves on a CPU is listed in requirements-cpu.txt.
    pip_install "$sglang" --no-deps "$sglang"
    # --no-deps: its dependencies are in the list too. Its metadata asks for Python >= 3.12, but megatron.core
    # imports and runs on 3.11 (only megatron.training, which is not used here, needs 3.12).
    if "$python" -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then
        pip_install "$megatron" --no-deps --ignore-requires-python "$megatron"
    else
        pip_install "$megatron" --no-deps "$megatron"
    fi
    # setuptools is there (torch requires it), so nothing is fetched to build an editable install.
    pip_install "agpo_megatron (editable)" --no-deps --no-build-isolation -e "$repo"
    echo "$base" >"$venv/.base.stamp"
fi
if $dev; then
    tools=$(fingerprint launch/requirements-dev.txt)
    if ! complete dev "$tools"; then
        pip_install "tests and checks" -r "$repo/launch/requirements-dev.txt"
        echo "$tools" >"$venv/.dev.stamp"
    fi
    install_slurm
    install_chromium
fi
