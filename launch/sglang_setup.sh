#!/usr/bin/env bash
# Usage: launch/sglang_setup.sh [VENV]      (make sglang calls it)
# Finds a Python 3.11 to 3.13 and makes VENV (default .venv-sglang): SGLang on the CPU with the pinned versions of
# constraints-sglang.txt and our platform plugin. PYTHON=/path/to/python chooses the interpreter. Safe to run again.
# On machines with GPUs install plain sglang instead and name its interpreter in the YAML: rollout.sglang.launch.python.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$(realpath -sm "${1:-.venv-sglang}")

# The same test as in setup.sh; the versions are those that the pinned wheels exist for.
usable() {
    "$1" -c 'import sys, ssl, ctypes, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1
}

candidates() {
    local version folder
    for version in 3.11 3.12 3.13; do
        type -aP "python$version" || true
        for folder in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin /usr/local/bin /opt/*/bin /opt/*/*/bin \
            "$HOME"/.local/share/uv/python/*/bin; do
            [[ -x $folder/python$version ]] && echo "$folder/python$version"
        done
    done
    type -aP python3 || true
}

find_python() {
    if [[ -n ${PYTHON:-} ]]; then
        usable "$PYTHON" && echo "$PYTHON" && return
        echo "sglang: PYTHON=$PYTHON does not run, is not 3.11 to 3.13, or lacks the venv module" >&2
        exit 1
    fi
    local candidate
    while read -r candidate; do
        usable "$candidate" && echo "$candidate" && return
    done < <(candidates)
    echo "sglang: no Python 3.11 to 3.13 with the venv module was found; install one (apt-get install python3.12-venv," \
        "pyenv install 3.12) or name one: make sglang PYTHON=/path/to/python3.12" >&2
    exit 1
}

# Runs a command into the log; says every 20 seconds that it is alive; shows the log's end if it fails.
logged() {
    local started=$SECONDS command
    "$@" >>"$log" 2>&1 &
    command=$!
    while kill -0 "$command" 2>/dev/null; do
        sleep 1
        (((SECONDS - started) % 20)) || echo "  ... $((SECONDS - started)) s"
    done
    wait "$command" || {
        echo "sglang: failed; the end of $log:" >&2
        tail -n 25 "$log" >&2
        exit 1
    }
}

if [[ ! -x $venv/bin/python ]] || ! usable "$venv/bin/python"; then
    python=$(find_python)
    echo "sglang: new environment $venv with $("$python" --version) ($python)"
    "$python" -m venv --clear "$venv"
fi
log=$venv/setup.log
: >"$log"
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
# The first import compiles the modules that a server needs, and only those.
echo "sglang: first import of the server"
logged env -C "$source" SGLANG_PLATFORM=torch_cpu OMP_NUM_THREADS=1 "$venv/bin/python" -P -c \
    'import sglang.srt.entrypoints.http_server, sglang.srt.managers.scheduler, sglang.srt.models.qwen3_moe'
echo "sglang: done in $SECONDS s"
