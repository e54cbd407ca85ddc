#!/usr/bin/env bash
# What to run first on a node with GPUs: launch/h100_smoke.sh [--device cpu] [--sglang-python FILE]
#
# Checks every path that only a GPU has against its reference on the CPU: kernels, Transformer Engine's layers and grouped
# GEMM, swapped teachers, one update with each objective, weights in an SGLang server. Prints a table; exit code 1 if
# something failed, 2 without a GPU. It measures no speed. --device cpu checks what exists on the CPU.
set -euo pipefail

MOPD_ROOT=${MOPD_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
export MOPD_ROOT
# shellcheck source=/dev/null
[[ -f $MOPD_ROOT/launch/site.env ]] && source "$MOPD_ROOT/launch/site.env"
source "$MOPD_ROOT/launch/env.sh"
cd "$MOPD_ROOT"
exec "$PYTHON" -m megatron_mopd.smoke "$@"
