# shellcheck shell=bash disable=SC2034,SC2054
# (SC2034: what is set here is used in the files that are sourced together; SC2054: srun wants commas)
# Arguments, nodes per role, and the srun lines: the same functions for a dry run and for the job. Sourced by mopd.sh.

SBATCH_GIVEN=() COMMAND=run CONFIG='' ARGUMENTS=() OWN_OPTIONS=()
DRY_RUN='' ROLLOUT_NODES=0 SPARE_NODES=0 RANKS_PER_NODE='' COLOCATED=''
CONTAINER=() HET_FIRST=() HET_HOSTS=() ALL_HOSTS=() GPUS_PER_NODE=0
declare -A FACTS=()
SERVER_PORT=${SERVER_PORT:-30000}
if [[ -n ${CONTAINER_IMAGE:-} ]]; then # pyxis; without its plugin srun knows none of these options
    CONTAINER=("--container-image=$CONTAINER_IMAGE" "--container-mounts=$MOPD_ROOT:$MOPD_ROOT${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}" "--container-workdir=$PWD")
fi

fail() {
    echo "mopd: error: $*" >&2
    return 1
}

join() { # SEPARATOR ITEM...
    local IFS=$1
    shift
    echo "$*"
}

print_command() { # as it can be typed
    local line
    printf -v line '%q ' "$@"
    printf '%s\n' "${line% }"
}

parse_arguments() { # [SBATCH OPTIONS] [OPTIONS] [COMMAND] CONFIG [ARGUMENTS]; the first *.yaml is CONFIG
    while (($#)); do
        case $1 in
            --dry-run) DRY_RUN=1 ;;
            --rollout-nodes | --spare-nodes | --ranks-per-node)
                (($# > 1)) || { fail "$1: needs a number"; return 1; }
                own_option "$1" "$2" || return 1
                shift
                ;;
            --rollout-nodes=* | --spare-nodes=* | --ranks-per-node=*) own_option "${1%%=*}" "${1#*=}" || return 1 ;;
            run | eval | sample | export | merge) COMMAND=$1 ;;
            *.yaml | *.yml)
                CONFIG=$1
                ARGUMENTS=("${@:2}")
                break
                ;;
            -h | --help)
                sed -n '/^#   sbatch/,/^set /p' "$MOPD_ROOT/launch/mopd.sh" | sed '$d; s/^# \{0,1\}//'
                exit 0
                ;;
            *) SBATCH_GIVEN+=("$1") ;;
        esac
        shift
    done
    [[ -n $CONFIG ]] || { fail "no CONFIG: name the run's YAML file; launch/mopd.sh --help shows how"; return 1; }
    if [[ -n ${SLURM_JOB_ID:-} && -z ${MOPD_SUBMIT_ONLY:-} && ${#SBATCH_GIVEN[@]} -gt 0 ]]; then
        fail "${SBATCH_GIVEN[0]}: not an option of launch/mopd.sh; options of sbatch stand before launch/mopd.sh"
        return 1
    fi
}

own_option() { # NAME VALUE
    [[ $2 =~ ^[0-9]+$ || ($1 == --rollout-nodes && $2 == all) ]] || { fail "$1: needs a number, got '$2'"; return 1; }
    OWN_OPTIONS+=("$1=$2")
    case $1 in
        --rollout-nodes) if [[ $2 == all ]]; then COLOCATED=1; else ROLLOUT_NODES=$2; fi ;;
        --spare-nodes) SPARE_NODES=$2 ;;
        --ranks-per-node) RANKS_PER_NODE=$2 ;;
    esac
}

set_nodes() { # HOSTS of the job or of the het job's first part, GPUS per node; HET_HOSTS is set before
    GPUS_PER_NODE=${GPUS_PER_NODE:-0}
    RANKS_PER_NODE=${RANKS_PER_NODE:-$GPUS_PER_NODE}
    ((${#HET_HOSTS[@]})) && ROLLOUT_NODES=${#HET_HOSTS[@]}
    # shellcheck disable=SC2153
    [[ -n $COLOCATED ]] && ROLLOUT_NODES=$NODES
    return 0
}

describe_arguments() { # DESCRIBE: what describe.py is asked; NODES and the roles are known
    DESCRIBE=(--nodes "$((NODES + ${#HET_HOSTS[@]}))" --rollout-nodes "$ROLLOUT_NODES" --spare-nodes "$SPARE_NODES"
        --ranks-per-node "${RANKS_PER_NODE:-0}" ${COLOCATED:+--colocated} "$COMMAND" "$CONFIG" "${ARGUMENTS[@]}")
}

read_facts() { # FACTS from `name=value` lines
    local name value
    while IFS='=' read -r name value; do FACTS[$name]=$value; done <<<"$1"
    RUN_DIR=${FACTS[run_dir]:-}
    [[ -n $RUN_DIR ]]
}

plan_roles() { # [BAD HOST...]: TRAIN_HOSTS, ROLLOUT_HOSTS, SERVER_URLS from HOSTS and HET_HOSTS, or 1 when too few are good
    local good=() rollout=() host train
    for host in "${HOSTS[@]}"; do [[ " $* " == *" $host "* ]] || good+=("$host"); done
    for host in "${HET_HOSTS[@]}"; do [[ " $* " == *" $host "* ]] || rollout+=("$host"); done
    train=$((NODES - SPARE_NODES))
    if ((${#HET_HOSTS[@]})); then
        ((${#rollout[@]} == ROLLOUT_NODES && ${#good[@]} >= train)) || return 1
    elif [[ -n $COLOCATED ]]; then
        ((${#good[@]} >= train)) || return 1
        rollout=("${good[@]:0:train}")
    else
        ((${#good[@]} >= train)) || return 1
        train=$((train - ROLLOUT_NODES))
        rollout=("${good[@]:train:ROLLOUT_NODES}")
    fi
    TRAIN_HOSTS=("${good[@]:0:train}") ROLLOUT_HOSTS=("${rollout[@]}") SERVER_URLS=()
    local server
    for host in "${ROLLOUT_HOSTS[@]}"; do
        for ((server = 0; server < ${FACTS[servers]:-1}; server++)); do SERVER_URLS+=("http://$host:$((SERVER_PORT + server))"); done
    done
    ((${#TRAIN_HOSTS[@]}))
}

srun_lines() { # TRAIN_SRUN, ROLLOUT_SRUN: what is run, as arrays
    local urls=() train_part=() rollout_part=() common nodes=${#TRAIN_HOSTS[@]}
    # One task a node starts that node's ranks. --ntasks is said because srun would take the batch job's.
    # No binding: Slurm would give the one task one core. A failed task ends the others.
    common=(--ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 --export=ALL "${CONTAINER[@]}")
    if ((${#HET_HOSTS[@]})); then train_part=(--het-group=0) rollout_part=(--het-group=1); fi
    [[ -n $COLOCATED ]] && common+=(--overlap)
    ((${#SERVER_URLS[@]})) && urls=("rollout.sglang.urls=[$(join , "${SERVER_URLS[@]}")]" rollout.sglang.launch=null)
    TRAIN_SRUN=(srun "${train_part[@]}" --job-name=train "--nodes=$nodes" "--ntasks=$nodes" "--nodelist=$(join , "${TRAIN_HOSTS[@]}")"
        "${common[@]}" bash "$MOPD_ROOT/launch/node.sh" train "$COMMAND" "$CONFIG" "${ARGUMENTS[@]}" "${urls[@]}")
    ROLLOUT_SRUN=()
    nodes=${#ROLLOUT_HOSTS[@]}
    ((nodes)) && ROLLOUT_SRUN=(srun "${rollout_part[@]}" --job-name=rollout "--nodes=$nodes" "--ntasks=$nodes" "--nodelist=$(join , "${ROLLOUT_HOSTS[@]}")"
        "${common[@]}" bash "$MOPD_ROOT/launch/node.sh" rollout --port "$SERVER_PORT" "$CONFIG" "${ARGUMENTS[@]}")
    return 0
}
