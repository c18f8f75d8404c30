#!/usr/bin/env bash
# Train on this machine alone, without Slurm:
#
#     launch/local.sh [overrides of python -m joint_train]
#
# All GPUs, or two ranks on CPU without one; RANKS_PER_NODE=… sets another number. PYTHON=… names the interpreter.
# Ctrl-C ends the run; `kill` (SIGTERM) or SIGUSR1 to this process lets it save first. The same command goes on from there.
set -euo pipefail
GPUS_PER_NODE=$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)
RANKS_PER_NODE=${RANKS_PER_NODE:-$((GPUS_PER_NODE > 0 ? GPUS_PER_NODE : 2))}
export GPUS_PER_NODE RANKS_PER_NODE
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
PYTHON=${PYTHON:-python3}

"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node="$RANKS_PER_NODE" -m launch.preflight "$@"
# In the environment, not as an option: torchrun before 2.13 has neither, and kills after 30 seconds.
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-${SHUTDOWN_TIMEOUT:-150}}
# exec: a signal to this script is a signal to torchrun, which waits for the save before it kills the workers.
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node="$RANKS_PER_NODE" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m joint_train "$@"
