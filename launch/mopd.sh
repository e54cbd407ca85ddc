#!/usr/bin/env bash
#SBATCH --job-name=mopd
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%j.out
#
#   sbatch -N16 --gpus-per-node=8 -p PARTITION -A ACCOUNT launch/mopd.sh [OPTIONS] [COMMAND] CONFIG [key.path=value ...]
#          launch/mopd.sh [SBATCH OPTIONS] [OPTIONS] [COMMAND] CONFIG [key.path=value ...]
#
# The second form checks everything first, names the job after the run, and submits it (one job of a name at a time).
# COMMAND is one of mopd's: run (default), eval, sample, export, merge. The job continues by itself after its time
# limit, a preemption, a lost node or a crash, from the newest complete checkpoint, until the run is complete.
#
#   --dry-run            print nodes per role, GPU-hours and the srun lines; check; submit nothing
#   --rollout-nodes N    of the job's nodes, N start SGLang servers; `all`: every node does, and trains as well.
#                        A het job's second part does it by itself: sbatch -N12 ... : -N4 ... launch/mopd.sh CONFIG
#   --spare-nodes N      nodes that wait, to stand in for bad ones
#   --ranks-per-node N   default: the GPUs of a node
#
# Settings (launch/site.env or the environment): MAX_STALLED=3 attempts in a row without a new checkpoint end the job ·
# PREFLIGHT=full|fast|off · MOPD_SHARED_STORAGE=yes: the run folder is shared although it does not look so ·
# PYTHON, CONTAINER_IMAGE, ...: launch/site.env.example. docs/cluster.md has the rest.
set -uo pipefail # not -e: how a step ended is decided upon

find_root() { # the repository: sbatch runs a copy of this file, so that its own place says nothing inside a job
    local place command=
    [[ -n ${SLURM_JOB_ID:-} ]] && command=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/^ *Command=\(.*launch\)\/mopd\.sh.*/\1/p' | head -n1)
    for place in "${MOPD_ROOT:-}" "${BASH_SOURCE[0]%/*}/.." "${command:+$command/..}" "${SLURM_SUBMIT_DIR:-}"; do
        [[ -n $place && -f $place/launch/attempt.sh ]] && (cd "$place" && pwd) && return
    done
    echo "mopd: error: the repository was not found; submit from its folder, or set MOPD_ROOT" >&2
    return 1
}

MOPD_ROOT=$(find_root) || exit 93
export MOPD_ROOT
# shellcheck source=/dev/null
[[ -f $MOPD_ROOT/launch/site.env ]] && source "$MOPD_ROOT/launch/site.env"
source "$MOPD_ROOT/launch/env.sh"
source "$MOPD_ROOT/launch/plan.sh"
source "$MOPD_ROOT/launch/attempt.sh"

main() {
    parse_arguments "$@" || exit 93
    if [[ -n ${SLURM_JOB_ID:-} && -z ${MOPD_SUBMIT_ONLY:-} ]]; then
        run_job
    else
        source "$MOPD_ROOT/launch/submit.sh"
        submit
    fi
}

# ---- the job -----------------------------------------------------------------------------------------------------

STOP=''          # why Slurm wants the job to end: time-limit, or stopped (preemption, requeue, lost node, scancel)
ROLLOUT_ENDED='' # a server ended by itself
SERVERS_LOST=''  # and training was asked to stop for it
EXCLUDED=''      # bad nodes, for the next attempt

catch_signals() {
    # Handlers only set a flag and touch a file: a second signal during $(...) in a handler makes bash 5.2 fail, and
    # Slurm sends SIGCONT right after the warning. The agents on the nodes see the file and let the ranks save.
    trap 'STOP=time-limit; [[ -n ${MOPD_ATTEMPT:-} ]] && : >"$MOPD_ATTEMPT/stop"' USR1
    trap 'STOP=${STOP:-stopped}; [[ -n ${MOPD_ATTEMPT:-} ]] && : >"$MOPD_ATTEMPT/stop"' TERM
    trap 'ROLLOUT_ENDED=1' USR2
}

run_job() {
    catch_signals
    job_nodes
    describe_in_job || exit 93
    begin_attempt
    if [[ ${FACTS[complete]:-0} == 1 ]]; then
        log "$RUN_DIR is complete at step ${FACTS[steps]}; nothing to do"
        finish_complete
        exit 0
    fi
    rm -f "$DONE"
    if ! check_nodes; then
        end_attempt "${STOP:-nodes}"
        leave 1
    fi
    start_roles
    wait_for_training
    stop_rollout
    judge
}

describe_in_job() { # FACTS, RUN_DIR: asked on the job's first node, where the program's Python is
    local text code try
    describe_arguments
    for try in 1 2 3; do
        text=$(srun --nodes=1 --ntasks=1 --nodelist="${ALL_HOSTS[0]}" "${HET_FIRST[@]}" --overlap "${CONTAINER[@]}" \
            "$PYTHON" -m megatron_mopd.cluster.describe "${DESCRIBE[@]}")
        code=$?
        ((code == 0)) && read_facts "$text" && return
        ((code == 2)) && return 1 # a mistake of the user's, which has been told
        log "srun failed with exit code $code on ${ALL_HOSTS[0]} (try $try of 3)"
        sleep 10
    done
    return 1
}

check_nodes() { # one task per node; bad nodes leave the roles, or the job is requeued without them
    [[ ${PREFLIGHT:-full} == off ]] && { plan_roles && return; }
    local folder=$MOPD_ATTEMPT/nodes host bad=() network=()
    mkdir -p "$folder"
    printf '%s\n' "$SLURM_JOB_ID.$ATTEMPT_NUMBER" >"$folder/canary"
    [[ ${PREFLIGHT:-full} == full ]] && network=(--network)
    export MOPD_VERSIONS=${FACTS[versions]:-}
    local task_of_all=(--ntasks-per-node=1 --kill-on-bad-exit=0 --cpu-bind=none "${CONTAINER[@]}")
    local check=("$PYTHON" -m megatron_mopd.cluster.node_check --folder "$folder" --token "$SLURM_JOB_ID.$ATTEMPT_NUMBER"
        --gpus "$GPUS_PER_NODE" --port "$((MASTER_PORT + 1))" "${network[@]}" --nodes "${ALL_HOSTS[@]}")
    local line=(srun "${HET_FIRST[@]}" "--nodes=$NODES" "--ntasks=$NODES" "${task_of_all[@]}" "${check[@]}")
    ((${#HET_HOSTS[@]})) && line+=(: --het-group=1 "--nodes=${#HET_HOSTS[@]}" "--ntasks=${#HET_HOSTS[@]}" "${task_of_all[@]}" "${check[@]}")
    timeout "${PREFLIGHT_SECONDS:-600}" "${line[@]}" >"$folder/output.log" 2>&1 &
    local task=$!
    while is_running "$task"; do sleep 0.5; done
    [[ -n $STOP ]] && return 1 # cut short: this says nothing about the nodes
    for host in "${ALL_HOSTS[@]}"; do
        [[ -e $folder/$host.ok ]] && continue
        bad+=("$host")
        if [[ -s $folder/$host.bad ]]; then log "bad node $host: $(paste -sd';' "$folder/$host.bad")"; else log "bad node $host: did not answer; see $folder/output.log"; fi
    done
    ((${#bad[@]})) || { log "all ${#ALL_HOSTS[@]} nodes passed the check"; }
    if ((${#bad[@]} == ${#ALL_HOSTS[@]} && ${#bad[@]} > 1)); then # it is not the nodes
        log "not started again: no node passed the check; see $folder"
        end_attempt no-restart
        exit 93
    fi
    plan_roles "${bad[@]}" && return
    EXCLUDED=$(join , "${bad[@]}")
    return 1
}

start_roles() {
    local command
    srun_lines
    { ((${#ROLLOUT_SRUN[@]})) && print_command "${ROLLOUT_SRUN[@]}"; print_command "${TRAIN_SRUN[@]}"; } >"$MOPD_ATTEMPT/commands.txt"
    ROLLOUT_PID=
    if ((${#ROLLOUT_SRUN[@]})); then
        # Whoever can reach a server could change its weights: it answers only with the attempt's own key.
        MOPD_SGLANG_API_KEY=$(head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n')
        export MOPD_SGLANG_API_KEY
        ("${ROLLOUT_SRUN[@]}" >"$MOPD_ATTEMPT/rollout.log" 2>&1; kill -USR2 $$ 2>/dev/null) &
        ROLLOUT_PID=$!
        wait_for_servers || { log "the rollout servers did not come up; see $MOPD_ATTEMPT/rollout*.log"; return; }
    fi
    [[ -n $STOP ]] && return # nothing is running yet that would have to be saved
    log "training on ${#TRAIN_HOSTS[@]} nodes ($(join , "${TRAIN_HOSTS[@]}")) from step $STEP_BEFORE; rank 0 is $MOPD_ATTEMPT/rank0.log"
    "${TRAIN_SRUN[@]}" &
    TRAIN_PID=$!
}

wait_for_servers() { # until every server is well, one dies, or the time is up
    local url deadline=$((SECONDS + ${SERVER_SECONDS:-1800}))
    for url in "${SERVER_URLS[@]}"; do
        until is_well "${url#http://}" 2>/dev/null; do
            [[ -n $ROLLOUT_ENDED || -n $STOP ]] && return 1
            ((SECONDS < deadline)) || return 1
            sleep 2
        done
    done
}

is_well() ( # HOST:PORT; SGLang answers /health without the key
    local code
    exec 3<>"/dev/tcp/${1%:*}/${1##*:}" || exit 1
    printf 'GET /health HTTP/1.0\r\nHost: %s\r\n\r\n' "$1" >&3
    read -r -t 10 _ code _ <&3 && [[ $code == 200 ]]
)

is_running() { kill -0 "$1" 2>/dev/null; }
# Polled: `wait` that a trapped signal has interrupted once may never return the second time (bash 5.2.15).

wait_for_training() { # TRAIN_CODE; a role that ends by itself takes the others with it
    TRAIN_CODE=1
    [[ -n ${TRAIN_PID:-} ]] || return
    local deadline=
    while is_running "$TRAIN_PID"; do
        sleep 1
        if [[ -n $ROLLOUT_ENDED && -z $SERVERS_LOST ]]; then
            SERVERS_LOST=1 deadline=$((SECONDS + ${ROLE_GRACE:-900}))
            : >"$MOPD_ATTEMPT/stop"
            log "a rollout server ended; the ranks are asked to save and have ${ROLE_GRACE:-900} s for it"
        fi
        [[ -n $deadline ]] && ((SECONDS > deadline)) && scancel --signal=KILL "$SLURM_JOB_ID"
    done
    wait "$TRAIN_PID"
    TRAIN_CODE=$?
}

stop_rollout() {
    [[ -n $ROLLOUT_PID ]] || return
    local deadline=$((SECONDS + 60))
    : >"$MOPD_ATTEMPT/rollout-stop"
    while is_running "$ROLLOUT_PID" && ((SECONDS < deadline)); do sleep 0.5; done
}

judge() { # complete, useless to repeat, or again
    # A run says by itself that its last step is saved; other commands are through when they end well.
    if [[ -e $DONE || ($COMMAND != run && $TRAIN_CODE == 0 && -z $STOP$SERVERS_LOST) ]]; then
        end_attempt complete
        finish_complete
        log "complete; $RUN_DIR"
        exit 0
    fi
    local why=failed
    if [[ -n $STOP ]]; then why=$STOP; elif ((TRAIN_CODE == 0)) && [[ -z $SERVERS_LOST ]]; then why=stopped; fi
    if [[ $why == failed ]]; then
        first_traceback
        if [[ -e $MOPD_ATTEMPT/no-restart ]]; then
            log "not started again: $(<"$MOPD_ATTEMPT/no-restart")"
            end_attempt no-restart
            exit 93
        fi
    fi
    end_attempt "$why"
    log "attempt $ATTEMPT_NUMBER ended: $why (exit code $TRAIN_CODE), step $STEP_BEFORE -> $(latest_step)"
    leave "$TRAIN_CODE"
}

main "$@"
