# shellcheck shell=bash disable=SC2034,SC2054
# (SC2034: what is set here is used in the files that are sourced together; SC2054: srun wants commas)
# One attempt of a job: its folder, what is recorded in it, how it ends, and whether there is another one. Sourced by
# mopd.sh, inside a job.

log() { printf '%(%F %T)T mopd[%s.%s]: %s\n' -1 "${SLURM_JOB_ID:-local}" "${ATTEMPT_NUMBER:-0}" "$*"; }

job_nodes() { # HOSTS, HET_HOSTS, ALL_HOSTS, NODES, GPUs, and the address of the first rank
    local list=${SLURM_JOB_NODELIST_HET_GROUP_0:-$SLURM_JOB_NODELIST} restart=${SLURM_RESTART_COUNT:-0}
    mapfile -t HOSTS < <(scontrol show hostnames "$list")
    if [[ -n ${SLURM_JOB_NODELIST_HET_GROUP_1:-} ]]; then
        mapfile -t HET_HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_1")
        HET_FIRST=(--het-group=0)
    fi
    ALL_HOSTS=("${HOSTS[@]}" "${HET_HOSTS[@]}")
    NODES=${#HOSTS[@]}
    GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:-0}
    set_nodes
    export RANKS_PER_NODE GPUS_PER_NODE
    # Below the ephemeral range, and another one after a restart, should something still hold the last.
    export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 64 + restart * 640) % 10000))
}

begin_attempt() { # MOPD_ATTEMPT: RUN_DIR/logs/attempt_K, and `latest`
    LOGS=$RUN_DIR/logs
    [[ $COMMAND == run ]] || LOGS=$RUN_DIR/logs/$COMMAND
    DONE=$LOGS/DONE
    [[ $COMMAND == run ]] && DONE=$RUN_DIR/DONE
    mkdir -p "$LOGS" || { log "run_dir: $RUN_DIR cannot be written"; exit 93; }
    local folder
    ATTEMPT_NUMBER=1
    for folder in "$LOGS"/attempt_*; do
        folder=${folder##*_}
        [[ $folder =~ ^[0-9]+$ ]] && ((folder >= ATTEMPT_NUMBER)) && ATTEMPT_NUMBER=$((folder + 1))
    done
    export MOPD_ATTEMPT=$LOGS/attempt_$ATTEMPT_NUMBER MASTER_ADDR=${HOSTS[0]}
    mkdir -p "$MOPD_ATTEMPT" || exit 93
    ln -sfn "attempt_$ATTEMPT_NUMBER" "$LOGS/latest"
    STEP_BEFORE=$(latest_step)
    [[ -n $STOP ]] && : >"$MOPD_ATTEMPT/stop"
    write_provenance
    log "$COMMAND $CONFIG on $(join , "${ALL_HOSTS[@]}"); $MOPD_ATTEMPT"
}

write_provenance() { # what ran, where, from which sources
    {
        printf 'job: %s restart %s\nhosts: %s\nversions: %s\n' "$SLURM_JOB_ID" "${SLURM_RESTART_COUNT:-0}" "${ALL_HOSTS[*]}" "${FACTS[versions]:-}"
        printf 'command: '
        print_command mopd "$COMMAND" "$CONFIG" "${ARGUMENTS[@]}"
        printf 'container: %s\n' "${CONTAINER_IMAGE:-none}"
        printf 'commit: %s\n' "$(git -C "$MOPD_ROOT" rev-parse HEAD 2>/dev/null || echo unknown)"
    } >"$MOPD_ATTEMPT/provenance.txt"
    git -C "$MOPD_ROOT" diff HEAD >"$MOPD_ATTEMPT/uncommitted.diff" 2>/dev/null
    [[ -s $MOPD_ATTEMPT/uncommitted.diff ]] || rm -f "$MOPD_ATTEMPT/uncommitted.diff"
    cp "$CONFIG" "$MOPD_ATTEMPT/config.yaml" 2>/dev/null
}

latest_step() { # of the newest complete checkpoint; 0: none
    local target
    target=$(readlink "$RUN_DIR/checkpoints/latest") || { echo 0; return; }
    target=${target##*step_}
    [[ $target =~ ^[0-9]+$ ]] && echo "$((10#$target))" || echo 0
}

end_attempt() { # REASON: complete | failed | nodes | time-limit | stopped | no-restart
    printf '%s %s %s %s\n' "$1" "$SLURM_JOB_ID" "$STEP_BEFORE" "$(latest_step)" >"$MOPD_ATTEMPT/end"
}

finish_complete() { # keep what a command printed, next to the run
    [[ $COMMAND == run || ! -s $MOPD_ATTEMPT/result.out ]] || cp "$MOPD_ATTEMPT/result.out" "$RUN_DIR/$COMMAND.json"
    [[ -e $DONE ]] || printf '%s\n' "${FACTS[steps]:-}" >"$DONE"
}

stalled_attempts() { # of this job, how many of the last ended by themselves without a new checkpoint
    local number count=0 reason job before after
    for ((number = ATTEMPT_NUMBER; number > 0; number--)); do
        [[ -s $LOGS/attempt_$number/end ]] || continue # killed with the node or requeued from outside: not the run's fault
        read -r reason job before after <"$LOGS/attempt_$number/end"
        [[ $job == "$SLURM_JOB_ID" ]] || break
        [[ $reason == stopped ]] && continue
        ((after > before)) && break
        count=$((count + 1))
    done
    echo "$count"
}

leave() { # EXIT CODE: back into the queue, unless it was cancelled or makes no progress
    local code=$(($1 ? $1 : 1)) job stalled
    job=$(scontrol show job "$SLURM_JOB_ID")
    # Cancelled or being requeued by Slurm, it is no longer RUNNING but COMPLETING, as after its time limit.
    if [[ $job != *JobState=RUNNING* && $job != *Reason=TimeLimit* ]]; then
        log "Slurm ends the job; nothing to do"
        exit "$code"
    fi
    stalled=$(stalled_attempts)
    if ((stalled >= ${MAX_STALLED:-3})); then
        log "not started again: $stalled attempts without a new checkpoint; the last is $MOPD_ATTEMPT"
        exit 93
    fi
    log "back into the queue${EXCLUDED:+, without $EXCLUDED}"
    trap '' TERM # Slurm ends all processes of the job once it is requeued; what follows must still happen
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        log "the job cannot be requeued; submit it again to go on from step $(latest_step)"
        exit "$code"
    fi
    [[ -n ${EXCLUDED:-} ]] && exclude_nodes
    exit "$code"
}

exclude_nodes() { # the requeued job is pending: from now on it may be changed
    local try
    for ((try = 0; try < 20; try++)); do
        scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$EXCLUDED" 2>/dev/null && return
        sleep 0.2
    done
    log "$EXCLUDED could not be excluded; submit again with --exclude=$EXCLUDED"
}

first_traceback() { # of the rank that failed first; its peers' complaints about a lost connection say nothing
    # shellcheck disable=SC2016
    local file text start='/^\(\[rank[0-9]*\]: \)\{0,1\}Traceback (most recent call last)/,$p' # torch adds the rank
    while IFS= read -r file; do
        [[ -n $file ]] || continue
        text=$(sed -n "$start" "$file")
        [[ -n $text ]] || text=$(grep -h '^mopd: error:' "$file")
        [[ -z $text ]] && continue
        grep -qiE 'nccl|gloo|connection (closed|reset)|DistBackendError|broken pipe' <<<"$text" && continue
        log "first failure: $file"
        tail -n 40 <<<"$text"
        return
    done < <(ls -tr "$MOPD_ATTEMPT"/rank*.log 2>/dev/null)
    log "no rank left a traceback of its own; the ends of $MOPD_ATTEMPT/*.log say more"
}
