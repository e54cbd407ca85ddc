#!/usr/bin/env bash
# Submits a whole study as a chain of jobs: SFT -> one RL job per teacher -> MOPD -> evaluation.
#
#   launch/pipeline.sh [--dry-run] [--baselines] [--ranks-per-node N] [--rollout-nodes N] [--spare-nodes N] [SBATCH OPTIONS] \
#                      FOLDER [key.path=value ...]
#
# FOLDER holds sft.yaml, mopd.yaml and teacher_NAME.yaml (or rl_NAME.yaml) for every teacher that mopd.yaml names; with
# --baselines also those of mix_rl, cascade_rl, off_policy, param_merge that are there. A job starts when those before
# it are complete, waits while they are requeued, and is cancelled when one of them has failed for good. Submitting
# again goes on where the study stopped: complete runs end at once.
#
# launch/site.env may give a kind of job options of its own, for example OPTIONS_mopd=(-N 16) OPTIONS_teacher=(-N 8);
# kinds: sft, teacher, mopd, baseline, sample, merge, eval.
set -euo pipefail

MOPD_ROOT=${MOPD_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
export MOPD_ROOT
SBATCH_OPTIONS=()
# shellcheck source=/dev/null
[[ -f $MOPD_ROOT/launch/site.env ]] && source "$MOPD_ROOT/launch/site.env"
source "$MOPD_ROOT/launch/env.sh"

fail() {
    echo "mopd: error: $*" >&2
    exit 2
}

dry='' baselines=() options=() own=() servers=()
while (($#)); do
    case $1 in
        --dry-run) dry=1 ;;
        --baselines) baselines=(--baselines) ;;
        --ranks-per-node | --spare-nodes | --rollout-nodes)
            (($# > 1)) || fail "$1: needs a number"
            if [[ $1 == --rollout-nodes ]]; then servers=("$1=$2"); else own+=("$1=$2"); fi
            shift
            ;;
        -h | --help) sed -n '2,/^set /p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
        *)
            if [[ -d $1 ]]; then break; fi
            options+=("$1")
            ;;
    esac
    shift
done
(($#)) || fail "no FOLDER: name the folder with sft.yaml and mopd.yaml${options[0]:+ (${options[-1]} is no folder)}"
command -v sbatch >/dev/null || fail "sbatch: not found; run this where Slurm is"

plan=$("${LOGIN_PYTHON:-$PYTHON}" -m megatron_mopd.cluster.pipeline "${baselines[@]}" "$@") || exit $?
declare -A id=()

submit() { # NAME KIND AFTER JOB_NAME SERVERS ARGUMENT...
    local name=$1 kind=$2 after=${3#-} job_name=$4 served=$5 dependency=singleton parent line
    shift 5
    local -n special=OPTIONS_$kind
    for parent in ${after//,/ }; do dependency+=",afterok:${id[$parent]}"; done
    line=(sbatch --parsable "--job-name=$job_name" "--dependency=$dependency" --kill-on-invalid-dep=yes "${SBATCH_OPTIONS[@]}" "${options[@]}")
    [[ -n ${special+set} ]] && line+=("${special[@]}")
    if [[ $kind == merge ]]; then # one process
        line+=(--nodes=1 "$MOPD_ROOT/launch/mopd.sh" --ranks-per-node=1 "$@")
    else
        line+=("$MOPD_ROOT/launch/mopd.sh" "${own[@]}")
        [[ $served == servers ]] && line+=("${servers[@]}") # only where the file says what a server is
        line+=("$@")
    fi
    if [[ -n $dry ]]; then
        id[$name]="<$name>"
        printf '%-16s' "$name"
        printf ' %q' "${line[@]}"
        echo
    else
        id[$name]=$("${line[@]}") || { cancel "$name"; exit 2; }
        id[$name]=${id[$name]%%;*} # with several clusters, sbatch adds the cluster's name
        printf '%-16s %s%s\n' "$name" "${id[$name]}" "${after:+  after $after}"
    fi
}

cancel() { # a chain is submitted whole or not at all
    echo "mopd: error: $1 was refused (above); the jobs submitted so far are cancelled" >&2
    ((${#id[@]} > 1)) && scancel "${id[@]}" 2>/dev/null
    return 0
}

while IFS=$'\t' read -r -a job; do submit "${job[@]}"; done <<<"$plan"
