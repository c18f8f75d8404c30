# shellcheck shell=bash
# Environment of a run, sourced by job.sbatch and local.sh. A variable that is already set is left as it is.
# RANKS_PER_NODE is set by the caller.

# Threads of a rank: its share of the node's cores. torchrun would set 1, which starves the loader and the CPU optimizer.
cores=${SLURM_CPUS_ON_NODE:-$(nproc)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores >= RANKS_PER_NODE ? cores / RANKS_PER_NODE : 1))}

# torch's default ends the process when a collective hangs for longer than parallel.timeout_seconds; the flight recorder
# then says which ranks were missing in which collective.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}

# Warnings name the interface or the peer; INFO writes pages for each rank.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# NCCL takes the fastest network it finds, and gloo the interface that the host name resolves to. Where that is wrong
# (a management network, docker0), name the right one for both, e.g. NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0, and
# for InfiniBand NCCL_IB_HCA=mlx5_0,mlx5_1,….
if [[ -n ${NCCL_SOCKET_IFNAME:-} ]]; then
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$NCCL_SOCKET_IFNAME}
fi

# Tokenizer threads deadlock in forked loader processes.
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

# The log shows a line when it is printed, also the last one of a process that is killed.
export PYTHONUNBUFFERED=1
