#!/usr/bin/env bash
#SBATCH --job-name=agpo
#SBATCH --nodes=24
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
# AGPO under Slurm: trainers and rollout servers on nodes of their own, the controller beside trainer rank 0.
#
#   bash launch/agpo_70b.sh [CONFIG] [--set a.b=c]... [--run-dir DIR]              submits, with the config's node count
#   sbatch [--nodes=N] launch/agpo_70b.sh [CONFIG] ...                             the same by hand
#   sbatch --nodes=T : --nodes=R --ntasks-per-node=1 --exclusive --mem=0 \
#       --gpus-per-node=8 --no-kill launch/agpo_70b.sh [CONFIG] ...                heterogeneous job: trainers, servers
#   bash launch/agpo_70b.sh --dry-run [CONFIG] ...                                 only shows nodes, roles and commands
#   bash launch/agpo_70b.sh --mode sft|eval [CONFIG] ...                           cold start, or evaluation of eval.sets
#   sbatch --nodes=T launch/agpo_70b.sh --mode sft [CONFIG] ...                    a cold start needs no rollout nodes
#
# CONFIG: configs/agpo_70b.yaml unless given. The site's own settings: launch/site.env (see site.env.example).
# What happens when something fails, and why this script is as it is: docs/cluster.md.
set -euo pipefail

signal_lead=3600 # seconds from USR1 to the time limit, as in --signal above: the longest step, a save and a minute
fail() { echo "agpo_70b.sh: $*" >&2; exit 2; }

# Slurm runs a copy of this file: only it knows where the file came from.
script=${BASH_SOURCE[0]}
if [ -n "${SLURM_JOB_ID:-}" ]; then
    script=$(scontrol show job -o "$SLURM_JOB_ID" | sed -n 's/.* Command=\([^ ]*\).*/\1/p' | head -n 1)
fi
repo=${AGPO_REPO:-$(cd "$(dirname "$script")/.." && pwd)}

config=$repo/configs/agpo_70b.yaml
options=()
dry_run=
arguments=("$@")
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry_run=yes; shift ;;
        --set | --run-dir | --mode) [ $# -ge 2 ] || fail "$1 needs a value"; options+=("$1" "$2"); shift 2 ;;
        --set=* | --run-dir=* | --mode=*) options+=("$1"); shift ;;
        -*) fail "unknown option $1; known: --dry-run, --mode train|sft|eval, --set a.b=c, --run-dir DIR" ;;
        *) config=$1; shift ;;
    esac
done
[ -f "$config" ] || fail "no configuration file $config"

site=${AGPO_SITE_ENV:-$repo/launch/site.env}
if [ -f "$site" ]; then
    set -a # what it sets is for sbatch and for every role
    # shellcheck source=/dev/null
    . "$site"
    set +a
fi
# As launch/install.sh --gpu makes them, unless the site says otherwise. Exported: with rollout_nodes 0 a trainer's node
# starts servers, in their environment.
own_rollout=$repo/.venv-rollout/bin/python
[ -x "$own_rollout" ] || own_rollout=${TRAIN_PYTHON:-$repo/.venv/bin/python}
export TRAIN_PYTHON=${TRAIN_PYTHON:-$repo/.venv/bin/python} ROLLOUT_PYTHON=${ROLLOUT_PYTHON:-$own_rollout}
train=("$TRAIN_PYTHON") rollout=("$ROLLOUT_PYTHON")
container() { # IMAGE: pyxis options
    [ -z "$1" ] || printf '%s\n' "--container-image=$1" "--container-mounts=${MOUNTS:?MOUNTS is not set in $site}" \
        "--container-workdir=$PWD" --no-container-mount-home
}
mapfile -t train_container < <(container "${TRAIN_IMAGE:-}")
mapfile -t rollout_container < <(container "${ROLLOUT_IMAGE:-}")
export AGPO_SIGNAL_LEAD=$signal_lead PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}

# Python of the trainers' environment on this node; inside their container when there is one.
control() {
    local here=()
    if [ -n "${SLURM_JOB_ID:-}" ] && [ ${#train_container[@]} -gt 0 ]; then
        here=(srun ${SLURM_HET_SIZE:+--het-group=0} --overlap --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME"
            "${train_container[@]}")
    fi
    "${here[@]}" "${train[@]}" -m agpo_megatron.cluster "$@"
}

# Sets start (folder of this start of the run), trainer_hosts and rollout_hosts, or refuses: see cluster/roles.py.
if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "$dry_run" ]; then
    plan=$(control plan "$config" "${options[@]}")
else
    plan=$(control plan --dry-run "$config" "${options[@]}")
fi
eval "$plan"
if [ -z "${SLURM_JOB_ID:-}" ] && [ -z "$dry_run" ]; then
    exec sbatch --nodes=$((${#trainer_hosts[@]} + ${#rollout_hosts[@]})) "$script" "${arguments[@]}"
fi
[ -n "$start" ] || exit 0 # the run is complete

# One task per host: it supervises the roles of its node.
step() { # HET_GROUP HOST... -- COMMAND...
    local group=$1 hosts=()
    shift
    while [ "$1" != -- ]; do hosts+=("$1"); shift; done
    shift
    local command=(srun ${SLURM_HET_SIZE:+--het-group="$group"} --nodes=${#hosts[@]} --ntasks=${#hosts[@]}
        --ntasks-per-node=1 --nodelist="$(IFS=,; echo "${hosts[*]}")" --cpu-bind=none --kill-on-bad-exit=1 "$@")
    if [ -n "$dry_run" ]; then
        printf '%q ' "${command[@]}"; echo
    else
        exec "${command[@]}"
    fi
}
node=(-m agpo_megatron.cluster node "$start")
trainers_step() { step 0 "${trainer_hosts[@]}" -- "${train_container[@]}" "${train[@]}" "${node[@]}"; }
# A step for each server's node, and --no-kill for the job: losing one of them ends no other.
servers_step() { step 1 "$1" -- "${rollout_container[@]}" "${rollout[@]}" "${node[@]}"; }

if [ -n "$dry_run" ]; then
    trainers_step
    for host in "${rollout_hosts[@]}"; do servers_step "$host"; done
    env | grep -E '^(TRAIN_|ROLLOUT_|MOUNTS=|AGPO_|NCCL_|GLOO_|OMP_|PYTHONPATH=)' | sort || true
    exit 0
fi

echo "agpo_70b.sh: job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, start folder $start"
trainers_step &
trainers=$!
servers=()
for host in "${rollout_hosts[@]}"; do
    servers_step "$host" &
    servers+=($!)
done

# With --no-kill Slurm goes on without the node of this very script when that one fails: another node has to notice.
# (Inside containers there is no scontrol, so none of the roles could.)
others=("${trainer_hosts[@]:1}" "${rollout_hosts[@]}")
if [ ${#others[@]} -gt 0 ]; then
    group=0
    [ ${#trainer_hosts[@]} -gt 1 ] || group=1
    srun ${SLURM_HET_SIZE:+--het-group="$group"} --overlap --nodes=1 --ntasks=1 --nodelist="${others[0]}" \
        bash "$repo/launch/watch_batch_node.sh" "$SLURM_JOB_ID" "$SLURMD_NODENAME" \
        "${AGPO_WATCH_SECONDS:-20}" >"$start/watch.log" 2>&1 &
    watch=$!
fi

# Preemption and time limit: the controller saves after the step under way, then the trainers' step ends by itself.
terminated=
deadline=$((SECONDS + 366 * 86400))
ask_to_stop() { # SECONDS to wait for it
    kill -USR1 "$trainers" 2>/dev/null || true # srun hands it to its tasks; SIGTERM it would answer by killing them
    deadline=$((SECONDS + $1))
}
trap 'echo "agpo_70b.sh: USR1, asking for a checkpoint"; ask_to_stop $((signal_lead - 90))' USR1
trap 'terminated=yes; ask_to_stop 20' TERM
while kill -0 "$trainers" 2>/dev/null && [ $SECONDS -lt $deadline ]; do
    sleep 2 &
    wait $! || true # returns early for a signal
done
trap - USR1 TERM

await_end() { # SECONDS PID...: until none of them is left
    local end=$((SECONDS + $1))
    shift
    while kill -0 "$@" 2>/dev/null && [ $SECONDS -lt $end ]; do sleep 0.2; done
}
verdict=0
if kill -0 "$trainers" 2>/dev/null; then
    echo "agpo_70b.sh: the step under way did not end in time; it is trained from the journal at the next start"
    verdict=75
else
    control conclude "$start" || verdict=$? # also tells the servers' nodes to stop
    await_end 30 "${servers[@]}"
fi
kill ${watch:+"$watch"} "${servers[@]}" 2>/dev/null || true
# An srun that outlives this script is nobody's; one without an answer waits for its step for 32 s. After SIGTERM there
# is no time for that: Slurm ends everything itself, 30 s later.
[ -n "$terminated" ] || await_end 40 ${watch:+"$watch"} "${servers[@]}"

[ "$verdict" -eq 75 ] || exit "$verdict"
# After scancel the job must not come back, after preemption Slurm brings it back itself.
if [ -n "$terminated" ]; then
    scontrol show job -o "$SLURM_JOB_ID" | grep -qE ' JobState=RUNNING | Reason=TimeLimit ' || exit 75
fi
echo "agpo_70b.sh: requeueing job $SLURM_JOB_ID"
scontrol requeue "$SLURM_JOB_ID"
exec sleep 600 # until Slurm ends it; as a child it could be missed
