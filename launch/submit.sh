# shellcheck shell=bash disable=SC2034,SC2054
# (SC2034: what is set here is used in the files that are sourced together; SC2054: srun wants commas)
# Outside of a job: check, print the plan, and submit. Sourced by mopd.sh.

submit() {
    command -v sbatch >/dev/null || { fail "sbatch: not found; run this where Slurm is, or launch/local.sh on this machine"; exit 2; }
    SBATCH_GIVEN=("${SBATCH_OPTIONS[@]}" "${SBATCH_GIVEN[@]}")
    ask_options
    set_nodes
    describe_arguments
    local text shared=() name
    [[ ${MOPD_SHARED_STORAGE:-} == yes ]] && shared=(--shared)
    text=$("${LOGIN_PYTHON:-$PYTHON}" -m megatron_mopd.cluster.describe "${DESCRIBE[@]}") || exit 2 # quick: keys, shapes
    read_facts "$text"
    name=$(basename "$RUN_DIR")
    [[ $COMMAND == run ]] || name=$name-$COMMAND
    SBATCH_LINE=(sbatch "--job-name=$name" "--dependency=$(dependency)" --kill-on-invalid-dep=yes "${SBATCH_GIVEN[@]}"
        "$MOPD_ROOT/launch/mopd.sh" "${OWN_OPTIONS[@]}" "$COMMAND" "$CONFIG" "${ARGUMENTS[@]}")
    test_only || exit 2
    "${LOGIN_PYTHON:-$PYTHON}" -m megatron_mopd.cluster.describe --full "${shared[@]}" "${DESCRIBE[@]}" >/dev/null || exit 2 # files, space
    if [[ -n $DRY_RUN ]]; then
        print_plan
    else
        "${SBATCH_LINE[@]}" || exit 2
    fi
}

ask_options() { # NODES, GPUS_PER_NODE, TIME and the het job's nodes from sbatch's options; SBATCH_GIVEN without --dependency
    local item rest=() part=0 nodes=(1 0) value i
    GPUS_PER_NODE=0 TIME='' DEPENDENCY=''
    for ((i = 0; i < ${#SBATCH_GIVEN[@]}; i++)); do
        item=${SBATCH_GIVEN[i]} value=${SBATCH_GIVEN[i + 1]:-}
        case $item in
            :) part=1 nodes[1]=1 ;;
            -N | --nodes) nodes[part]=$value ;;
            -N*) nodes[part]=${item#-N} ;;
            --nodes=*) nodes[part]=${item#*=} ;;
            --gpus-per-node | --gres) ((part)) || GPUS_PER_NODE=${value##*:} ;;
            --gpus-per-node=* | --gres=*) ((part)) || { GPUS_PER_NODE=${item##*=}; GPUS_PER_NODE=${GPUS_PER_NODE##*:}; } ;;
            -t | --time) TIME=$value ;;
            -t*) TIME=${item#-t} ;;
            --time=*) TIME=${item#*=} ;;
            -d | --dependency) DEPENDENCY=$value; ((i += 1)); continue ;;
            --dependency=*) DEPENDENCY=${item#*=}; continue ;;
        esac
        rest+=("$item")
    done
    SBATCH_GIVEN=("${rest[@]}")
    NODES=${nodes[0]}
    [[ $NODES =~ ^[0-9]+$ && ${nodes[1]} =~ ^[0-9]+$ ]] || { fail "-N: needs a number of nodes, got '$NODES'"; exit 2; }
    HET_HOSTS=()
    for ((i = 0; i < nodes[1]; i++)); do HET_HOSTS+=("rollout$i"); done
}

dependency() { echo "singleton${DEPENDENCY:+,$DEPENDENCY}"; } # one job of this name at a time

test_only() { # Slurm's own opinion, and the nodes that it would give: HOSTS
    local answer
    if ! answer=$("${SBATCH_LINE[0]}" --test-only "${SBATCH_LINE[@]:1}" 2>&1); then
        fail "Slurm refuses the job: $(grep -v '^$' <<<"$answer" | tail -n1)"
        return 1
    fi
    # "... on nodes node[1-2] in partition batch"; of a het job "... on node[1-3]", where Slurm does not give both of its
    # parts the same nodes, each seen by itself: then nobody knows the names yet.
    mapfile -t HOSTS < <(scontrol show hostnames "$(sed -n 's/.* processors on \(nodes \)\{0,1\}\([^ ]*\).*/\2/p' <<<"$answer" | head -n1)" 2>/dev/null)
    local serving=${#HET_HOSTS[@]} i
    if ((${#HOSTS[@]} != NODES + serving)); then
        mapfile -t HOSTS < <(seq -f 'node%g' 0 $((NODES - 1)))
        return
    fi
    for ((i = 0; i < serving; i++)); do HET_HOSTS[i]=${HOSTS[NODES + i]}; done
    HOSTS=("${HOSTS[@]:0:NODES}")
}

print_plan() {
    local file total
    plan_roles || { fail "nodes: $NODES do not divide into the roles"; exit 2; }
    srun_lines
    for file in "$MOPD_ROOT"/launch/*.sh; do bash -n "$file" || exit 2; done
    total=$(((NODES + ${#HET_HOSTS[@]}) * GPUS_PER_NODE))
    printf 'run folder   %s\n' "$RUN_DIR"
    printf 'train        %d nodes x %s ranks = %s: %s\n' "${#TRAIN_HOSTS[@]}" "$RANKS_PER_NODE" "${FACTS[world]}" "$(join , "${TRAIN_HOSTS[@]}")"
    ((${#ROLLOUT_HOSTS[@]})) && printf 'rollout      %d nodes, %d servers: %s\n' "${#ROLLOUT_HOSTS[@]}" "${#SERVER_URLS[@]}" "$(join , "${ROLLOUT_HOSTS[@]}")"
    ((SPARE_NODES)) && printf 'spare        %d nodes\n' "$SPARE_NODES"
    printf 'GPU-hours    %d per hour%s\n' "$total" "${TIME:+; time limit $TIME per attempt}"
    printf 'submitted    '
    print_command "${SBATCH_LINE[@]}"
    ((${#ROLLOUT_SRUN[@]})) && { printf 'rollout      '; print_command "${ROLLOUT_SRUN[@]}"; }
    printf 'train        '
    print_command "${TRAIN_SRUN[@]}"
}
