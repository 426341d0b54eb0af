#!/usr/bin/env bash
#SBATCH --job-name=agpo_8b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@3600
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#
# AGPO for an 8B policy on one node (4 GPUs train, 4 serve) or on two (one each):
#
#   sbatch launch/agpo_8b.sh [--set a.b=c]... [--run-dir DIR]
#   sbatch --nodes=2 launch/agpo_8b.sh --set cluster.rollout_nodes=1 --set policy.data_parallel=2 --set rollout.servers=8
#
# Everything else is agpo_70b.sh.
set -euo pipefail
script=${BASH_SOURCE[0]}
if [ -n "${SLURM_JOB_ID:-}" ]; then
    script=$(scontrol show job -o "$SLURM_JOB_ID" | sed -n 's/.* Command=\([^ ]*\).*/\1/p' | head -n 1)
fi
AGPO_REPO=${AGPO_REPO:-$(cd "$(dirname "$script")/.." && pwd)}
export AGPO_REPO
exec bash "$AGPO_REPO/launch/agpo_70b.sh" "$AGPO_REPO/configs/agpo_8b.yaml" "$@"
