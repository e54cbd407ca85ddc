# shellcheck shell=bash
# Settings of the environment of every role, each with its reason. Sourced; never run. What is set already stays.
# The site's own settings belong into launch/site.env, which is read first (launch/site.env.example lists them).

# The program's Python: that of `make setup`, or the container's.
if [[ -z ${PYTHON:-} ]]; then
    if [[ -z ${CONTAINER_IMAGE:-} && -x $MOPD_ROOT/.venv/bin/python ]]; then PYTHON=$MOPD_ROOT/.venv/bin/python; else PYTHON=python3; fi
fi
export PYTHON
# Output line by line: the log of a rank that gets killed is complete.
export PYTHONUNBUFFERED=1
# Ranks share the cores of a node; threads that spin while they wait take them from each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

# An asynchronous NCCL error ends the rank instead of leaving its peers in a collective for ever: the job can restart.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# After a time-out, write which collective each rank was in (one ring of 2000 entries a rank).
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
# Warnings name the broken link; INFO writes thousands of lines a rank.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Weights are re-read by shape-varying rollouts and packed batches: without it fragments add up until memory is out.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# One hardware queue, so that kernels start in the order of their launch: tensor parallelism overlaps a transfer with
# the GEMM after it only then (Hopper and older; Megatron-Core asks for it with sequence parallelism).
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# NVLink SHARP needs extra GPU memory for its buffers on every communicator; Megatron has many small ones.
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
# NCCL_IB_HCA, NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME are the site's: a wrong interface hangs without a word, and
# the right one has another name on each cluster. Set them in site.env where the default does not work.
