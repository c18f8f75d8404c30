#!/usr/bin/env bash
# The tests of what only a GPU shows, on one of them: one command, no network, nothing installed. Arguments go to pytest.
# PYTHON is the Python to use; JOINT_TRAIN_GPU_SUITE_DEVICE=cpu runs the same tests on CPU, at small sizes.
set -euo pipefail
cd "$(dirname "$0")/../.."
export JOINT_TRAIN_GPU_SUITE_DEVICE=${JOINT_TRAIN_GPU_SUITE_DEVICE:-cuda}
export PYTHON=${PYTHON:-.venv/bin/python} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export HF_HUB_OFFLINE=1 WANDB_MODE=disabled
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # products that are the same each time, which a resumed run is compared by
seconds=${JOINT_TRAIN_GPU_SUITE_SECONDS:-400} limit=100
if [[ $JOINT_TRAIN_GPU_SUITE_DEVICE == cpu ]]; then
    export CUDA_VISIBLE_DEVICES=""
    seconds=${JOINT_TRAIN_GPU_SUITE_SECONDS:-1800} limit=600
else
    unset OMP_NUM_THREADS # the references are computed on the CPU
fi
command -v "$PYTHON" >/dev/null || {
    echo "the GPU suite needs a Python: there is none at $PYTHON. Set PYTHON, or BIN for make test-gpu." >&2
    exit 2
}
# The process that starts the tests asks for GPUs without beginning to use one, which its children couldn't then.
export PYTORCH_NVML_BASED_CUDA_CHECK=1
"$PYTHON" tests/gpu/requirements.py
export JOINT_TRAIN_GPU_SUITE_SECONDS=$seconds
# Beyond that no test begins; one that hangs is ended by itself (conftest.py).
export JOINT_TRAIN_GPU_SUITE_TEST_SECONDS=${JOINT_TRAIN_GPU_SUITE_TEST_SECONDS:-$limit}
exec timeout --kill-after=30 $((seconds + limit)) "$PYTHON" -m pytest -m gpu tests/gpu -o timeout=0 "$@"
