#!/usr/bin/env bash
# Usage: launch/sglang_setup.sh [VENV]      (make sglang calls it)
# Finds a Python 3.11 to 3.13 and makes VENV (default .venv-sglang): SGLang on the CPU with the pinned versions of
# constraints-sglang.txt and our platform plugin. PYTHON=/path/to/python chooses the interpreter. Safe to run again.
# On machines with GPUs install plain sglang instead and name its interpreter in the YAML: rollout.sglang.launch.python.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
name=sglang oldest=3.11 newest=3.13 venv=$(realpath -sm "${1:-.venv-sglang}")
# The versions are those that the pinned wheels exist for.
# shellcheck source=launch/python_environment.sh
source launch/python_environment.sh

python_environment
pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input install --no-compile --progress-bar off -c constraints-sglang.txt)
echo "sglang: installing the pinned packages (3 GB). Log: $log"
logged "${pip[@]}" setuptools
logged "${pip[@]}" -r launch/sglang_requirements.txt
logged "${pip[@]}" --no-deps sglang torchvision timm
# From a copy: setuptools writes build/ and *.egg-info beside the sources otherwise.
source=$(mktemp -d)
trap 'rm -rf "$source"' EXIT
cp -r launch/sglang_torch_cpu "$source"
logged "${pip[@]}" --no-deps --no-build-isolation --force-reinstall "$source/sglang_torch_cpu"
# A server is three processes that import thousands of modules each: uncompiled, that takes minutes of every start.
echo "sglang: compiling"
logged "$venv/bin/python" -W ignore -m compileall -qq -j 0 "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sglang/srt"
# What else a server imports is compiled by importing it, whatever the caller's environment says about .pyc files.
logged env -C "$source" -u PYTHONDONTWRITEBYTECODE SGLANG_PLATFORM=torch_cpu OMP_NUM_THREADS=1 "$venv/bin/python" -P -c \
    'import sglang.launch_server, sglang.srt.entrypoints.http_server, sglang.srt.managers.scheduler, sglang.srt.models.registry'
echo "sglang: done in $SECONDS s"
