#!/usr/bin/env bash
# From a fresh machine (Python >= 3.11) to a trained policy: install, prepare, cold start, AGPO.
#
#   bash launch/quickstart.sh [--config FILE] [--run-dir DIR] [--set a.b=c]...
#
# Started again with the same options it continues where it stopped.
set -euo pipefail

# The environment is installed without compiled modules; processes that may not keep theirs start three times slower.
unset PYTHONDONTWRITEBYTECODE
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
config=$repo/configs/tiny_cpu.yaml
options=()

fail() { echo "quickstart: $*" >&2; exit 2; }

while [ $# -gt 0 ]; do
    case $1 in
        --config | --run-dir | --set) [ $# -ge 2 ] || fail "$1 needs a value" ;;&
        --config) config=$2; shift 2 ;;
        --run-dir | --set) options+=("$1" "$2"); shift 2 ;;
        --config=*) config=${1#*=}; shift ;;
        --run-dir=* | --set=*) options+=("$1"); shift ;;
        -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) fail "unknown option $1; known: --config FILE, --run-dir DIR, --set a.b=c" ;;
    esac
done
[ -f "$config" ] || fail "no configuration file $config"

timings=()
timed() { # NAME COMMAND...
    local name=$1 start=$SECONDS
    shift
    printf '\n== %s\n' "$name"
    "$@"
    timings+=("$(printf '%-9s %4d s' "$name" $((SECONDS - start)))")
}

agpo() { "${AGPO_VENV:-$repo/.venv}/bin/agpo-megatron" "$1" "$config" "${options[@]}"; }

timed install bash "$repo/launch/install.sh"
resolved=$(agpo check) # bad input ends here, before any work
if ! grep -q '^  recipe: none' <<<"$resolved"; then
    timed prepare agpo prepare
fi
if ! grep -q '^sft: null' <<<"$resolved"; then
    timed sft agpo sft
fi
timed train agpo train

printf '\n== time\n'
printf '%s\n' "${timings[@]}"
