#!/usr/bin/env bash
# Usage: launch/setup.sh [VENV]      (make setup calls it)
# Finds a Python >= 3.12, makes the virtual environment VENV (default .venv) and installs this package into it
# with the pinned versions of constraints.txt. PYTHON=/path/to/python chooses the interpreter. Safe to run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${1:-.venv}

# A candidate counts only if it runs (pyenv's shims exist for versions that are not active), is new enough and
# can make environments (Debian ships venv separately).
usable() {
    "$1" -c 'import sys, ssl, ctypes, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

candidates() {
    local version folder
    for version in 3.12 3.13 3.14; do
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
        echo "setup: PYTHON=$PYTHON does not run, is older than 3.12, or lacks the venv module" >&2
        exit 1
    fi
    local candidate
    while read -r candidate; do
        usable "$candidate" && echo "$candidate" && return
    done < <(candidates)
    cat >&2 <<'MESSAGE'
setup: no Python >= 3.12 with the venv module was found. Install one and run this again, for example:
    apt-get install python3.12-venv     Ubuntu 24.04 (Debian 13: python3.13-venv)
    dnf install python3.12              Fedora, RHEL 9
    pyenv install 3.12                  anywhere, without root
or name one: make setup PYTHON=/path/to/python3.12
MESSAGE
    exit 1
}

# Runs a command into the log; says every 20 seconds that it is alive; shows the log's end if it fails.
logged() {
    local started=$SECONDS command
    "$@" >>"$log" 2>&1 &
    command=$!
    while kill -0 "$command" 2>/dev/null; do
        sleep 1
        (((SECONDS - started) % 20)) || echo "  ... $((SECONDS - started)) s; $(grep -cE '^ *(Downloading|Using cached)' "$log" || true) packages so far"
    done
    wait "$command" || {
        echo "setup: failed; the end of $log:" >&2
        grep -v '^WARNING: Location' "$log" | tail -n 25 >&2
        exit 1
    }
}

compile() {
    "$venv/bin/python" -W ignore -m compileall -qq -j 0 -x '/transformers/models/(?!auto/|qwen|__init__)|/tests?/' \
        "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || true
}

if [[ ! -x $venv/bin/python ]] || ! usable "$venv/bin/python"; then
    python=$(find_python)
    echo "setup: new environment $venv with $("$python" --version) ($python)"
    "$python" -m venv --clear "$venv"
fi
log=$venv/setup.log
: >"$log"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input install -c constraints.txt)
echo "setup: installing the pinned packages; torch with its CUDA libraries is about 5 GB. Log: $log"
# Without build isolation the editable install uses the pinned setuptools, not whichever is newest today.
logged "${pip[@]}" setuptools
# pip compiles every module, on one core, in a minute: half of its work. This uses all cores and leaves out what is
# not imported here. A file that does not compile (tests of old syntax) is no failure.
logged "${pip[@]}" --no-build-isolation --no-compile --progress-bar off -e ".[dev]"
# Transformer Engine's Python code alone (1 MB), beside the environment and not in it: tests make its modules, which
# nothing can run without a GPU. In the environment Megatron-Core would take it for the whole package.
"${pip[@]}" --no-deps --no-compile --upgrade --target "$venv/transformer_engine" transformer-engine >>"$log" 2>&1 ||
    echo "setup: transformer-engine could not be downloaded; tests/te will be skipped"
echo "setup: compiling"
logged compile
echo "setup: done in $SECONDS s"
