#!/usr/bin/env bash
# The same as agpo_70b.sh on this machine, without Slurm: all roles as subprocesses of one supervisor.
#
#   bash launch/local.sh [CONFIG] [--set a.b=c]... [--run-dir DIR]
#
#   TRAIN_PYTHON, ROLLOUT_PYTHON   interpreters of trainers (and controller) and of servers, also from launch/site.env
#
# CONFIG: configs/tiny_cpu.yaml unless given.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
site=${AGPO_SITE_ENV:-$repo/launch/site.env}
if [ -f "$site" ]; then
    set -a
    # shellcheck source=/dev/null
    . "$site"
    set +a
fi
config=$repo/configs/tiny_cpu.yaml
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    config=$1
    shift
fi
export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}
# Where launch/install.sh --gpu has made an environment of their own, the servers run in it.
if [ -z "${ROLLOUT_PYTHON:-}" ] && [ -x "$repo/.venv-rollout/bin/python" ]; then
    export ROLLOUT_PYTHON=$repo/.venv-rollout/bin/python
fi
exec "${TRAIN_PYTHON:-$repo/.venv/bin/python}" -m agpo_megatron train "$config" "$@"
