#!/usr/bin/env bash
# The same job on this machine, without Slurm: launch/local.sh [COMMAND] CONFIG [key.path=value ...]
#
# Uses every GPU (or parallel.ranks processes on a CPU), and starts the run again after a crash, from its newest
# checkpoint, until it is complete; MAX_STALLED=3 attempts in a row without a new checkpoint end it. Ctrl-C saves.
set -uo pipefail

MOPD_ROOT=${MOPD_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
export MOPD_ROOT
# shellcheck source=/dev/null
[[ -f $MOPD_ROOT/launch/site.env ]] && source "$MOPD_ROOT/launch/site.env"
source "$MOPD_ROOT/launch/env.sh"
source "$MOPD_ROOT/launch/plan.sh"
source "$MOPD_ROOT/launch/attempt.sh"

parse_arguments "$@" || exit 2
if ((${#SBATCH_GIVEN[@]})); then
    fail "${SBATCH_GIVEN[0]}: not an option of launch/local.sh"
    exit 2
fi
stalled=0
while :; do
    text=$("$PYTHON" -m megatron_mopd.cluster.describe "$COMMAND" "$CONFIG" "${ARGUMENTS[@]}") || exit 2
    read_facts "$text"
    before=$(latest_step)
    "$PYTHON" -m megatron_mopd "$COMMAND" "$CONFIG" "${ARGUMENTS[@]}"
    code=$?
    # 0: complete. 2: a mistake of the user's. Stopped by a signal to this script: the user wants it to end.
    ((code == 0 || code == 2 || code == 130 || code == 143)) && exit "$code"
    (($(latest_step) > before)) && stalled=0
    stalled=$((stalled + 1))
    if ((stalled >= ${MAX_STALLED:-3})); then
        log "not started again: $stalled attempts without a new checkpoint"
        exit 93
    fi
    log "ended with exit code $code; going on from step $(latest_step)"
done
