# Read by setup.sh and sglang_setup.sh, which set: name (what messages begin with), oldest and newest (3.N), venv.
# python_environment finds a Python of these versions and makes $venv with it; `logged` runs what is then installed.

# A candidate counts only if it runs (pyenv's shims exist for versions that are not active), is of the right version
# and can make environments (Debian ships venv separately).
usable() {
    "$1" -c "import sys, ssl, ctypes, venv, ensurepip
sys.exit(not (3, ${oldest#3.}) <= sys.version_info[:2] <= (3, ${newest#3.}))" >/dev/null 2>&1
}

candidates() {
    local minor folder
    for ((minor = ${oldest#3.}; minor <= ${newest#3.}; minor++)); do
        type -aP "python3.$minor" || true
        for folder in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin /usr/local/bin /opt/*/bin /opt/*/*/bin \
            "$HOME"/.local/share/uv/python/*/bin; do
            [[ -x $folder/python3.$minor ]] && echo "$folder/python3.$minor"
        done
    done
    type -aP python3 || true
}

find_python() {
    if [[ -n ${PYTHON:-} ]]; then
        usable "$PYTHON" && echo "$PYTHON" && return
        echo "$name: PYTHON=$PYTHON does not run, is not Python $oldest to $newest, or lacks the venv module" >&2
        exit 1
    fi
    local candidate
    while read -r candidate; do
        usable "$candidate" && echo "$candidate" && return
    done < <(candidates)
    cat >&2 <<MESSAGE
$name: no Python $oldest to $newest with the venv module was found. Install one and run this again, for example:
    apt-get install python3.12-venv     Ubuntu 24.04 (Debian 13: python3.13-venv)
    dnf install python3.12              Fedora, RHEL 9
    pyenv install 3.12                  anywhere, without root
or name one: make $name PYTHON=/path/to/python3.12
MESSAGE
    exit 1
}

python_environment() {
    if [[ ! -x $venv/bin/python ]] || ! usable "$venv/bin/python"; then
        local python
        python=$(find_python)
        echo "$name: new environment $venv with $("$python" --version) ($python)"
        "$python" -m venv --clear "$venv"
    fi
    log=$venv/setup.log
    : >"$log"
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
        echo "$name: failed; the end of $log:" >&2
        grep -v '^WARNING: Location' "$log" | tail -n 25 >&2
        exit 1
    }
}
