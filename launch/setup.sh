#!/usr/bin/env bash
# Usage: launch/setup.sh [VENV]      (make setup calls it)
# Finds a Python >= 3.12, makes the virtual environment VENV (default .venv) and installs this package into it
# with the pinned versions of constraints.txt. PYTHON=/path/to/python chooses the interpreter. Safe to run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
name=setup oldest=3.12 newest=3.14 venv=${1:-.venv}
# shellcheck source=launch/python_environment.sh
source launch/python_environment.sh

compile() {
    "$venv/bin/python" -W ignore -m compileall -qq -j 0 -x '/transformers/models/(?!auto/|qwen|__init__)|/tests?/' \
        "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || true
}

python_environment
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
