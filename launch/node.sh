#!/usr/bin/env bash
# What one srun task does on its node. Not for users: launch/mopd.sh starts it.
#   node.sh train COMMAND CONFIG [ARGUMENTS]                torchrun with this node's ranks
#   node.sh rank COMMAND CONFIG [ARGUMENTS]                 one rank, under torchrun
#   node.sh rollout --port PORT CONFIG [key.path=value]     this node's rollout servers
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

rollout() { exec "$PYTHON" -m megatron_mopd.cluster.serve --attempt "$MOPD_ATTEMPT" "$@"; }

"$@"
