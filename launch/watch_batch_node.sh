#!/usr/bin/env bash
# Requeues a job when the node of its batch script has been lost (agpo_70b.sh starts this on another node).
#
#   bash launch/watch_batch_node.sh JOB_ID HOST [SECONDS]
set -uo pipefail
job=$1 host=$2 seconds=${3:-20}

while sleep "$seconds"; do
    nodes=$(squeue --noheader --jobs="$job" --format=%N 2>/dev/null | paste -sd,) || continue
    [ -n "$nodes" ] || continue # no answer from slurmctld, which may itself be away
    if ! scontrol show hostnames "$nodes" | grep -qx "$host"; then
        echo "watch_batch_node.sh: job $job has lost $host, the node of its batch script; requeueing"
        scontrol requeue "$job" && exit
    fi
done
