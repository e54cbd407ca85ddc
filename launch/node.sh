#!/usr/bin/env bash
# What one srun task does on its node. Not for users: launch/mopd.sh starts it.
#   node.sh train COMMAND CONFIG [ARGUMENTS]                torchrun with this node's ranks
#   node.sh rank COMMAND CONFIG [ARGUMENTS]                 one rank, under torchrun
#   node.sh rollout MODEL SERVERS GPUS_PER_SERVER PORT      this node's rollout servers
set -uo pipefail

train() {
    # The agent passes a request to stop on to the ranks; exec, so that no shell in between dies of the signal.
    exec "$PYTHON" -m megatron_mopd.cluster.agent --attempt "$MOPD_ATTEMPT" -- \
        "--nnodes=$SLURM_STEP_NUM_NODES" "--node-rank=$SLURM_NODEID" "--nproc-per-node=$RANKS_PER_NODE" \
        "--master-addr=$MASTER_ADDR" "--master-port=$MASTER_PORT" --max-restarts=0 --no-python \
        bash "$MOPD_ROOT/launch/node.sh" rank "$@"
}

rank() {
    local log=$MOPD_ATTEMPT/rank$RANK.log
    ((RANK)) && exec "$PYTHON" -m megatron_mopd "$@" >>"$log" 2>&1
    # Rank 0 speaks to the job's log as well. tee must outlive signals that Slurm sends to all processes.
    if [[ $1 == run ]]; then
        exec "$PYTHON" -m megatron_mopd "$@" > >(trap '' TERM USR1 INT; exec tee -a "$log") 2>&1
    fi
    exec "$PYTHON" -m megatron_mopd "$@" > >(trap '' TERM USR1 INT; exec tee "$MOPD_ATTEMPT/result.out") \
        2> >(trap '' TERM USR1 INT; exec tee -a "$log" >&2)
}

rollout() { # ends when one server ends, or when the launcher says that training has
    local model=$1 servers=$2 gpus=$3 port=$4 server pids=() name=${SLURMD_NODENAME:-$(hostname -s)} pid visible
    local command=("${SERVER_PYTHON:-$PYTHON}" -m sglang.launch_server)
    [[ -n ${SERVER_COMMAND:-} ]] && command=("$SERVER_COMMAND")
    local more=()
    # shellcheck source=/dev/null
    [[ -f $MOPD_ROOT/launch/site.env ]] && source "$MOPD_ROOT/launch/site.env" && more=("${SERVER_ARGUMENTS[@]:-}")
    [[ -n ${more[*]} ]] || more=()
    # A package of SGLang's is called `kernels`, as is a folder here: it must not be found through the working folder.
    export PYTHONSAFEPATH=1
    for ((server = 0; server < servers; server++)); do
        if ((gpus)); then
            visible=$(seq -s, $((server * gpus)) $((server * gpus + gpus - 1)))
            export CUDA_VISIBLE_DEVICES=$visible
            more+=(--tp "$gpus")
        fi
        "${command[@]}" --model-path "$model" --host 0.0.0.0 --port "$((port + server))" "${more[@]}" \
            >>"$MOPD_ATTEMPT/rollout-$name-$server.log" 2>&1 &
        pids+=("$!")
    done
    trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM
    while [[ ! -e $MOPD_ATTEMPT/rollout-stop ]]; do
        for pid in "${pids[@]}"; do
            kill -0 "$pid" 2>/dev/null && continue
            wait "$pid"
            echo "mopd: a rollout server on $name ended with exit code $?; see $MOPD_ATTEMPT/rollout-$name-*.log" >&2
            kill -TERM "${pids[@]}" 2>/dev/null
            exit 1
        done
        sleep 1 &
        wait $!
    done
    kill -TERM "${pids[@]}" 2>/dev/null
    for ((server = 0; server < 20; server++)); do
        kill -0 "${pids[@]}" 2>/dev/null || break
        sleep 0.5
    done
    kill -KILL "${pids[@]}" 2>/dev/null
    exit 0
}

"$@"
