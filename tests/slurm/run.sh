#!/usr/bin/env bash
# The job tests on a real Slurm, which is installed from Debian's packages if it is missing. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH=$PATH:/usr/sbin:/sbin
packages=(slurmctld slurmd slurm-client munge)

skip() {
    echo "SKIPPED: the job tests on Slurm did not run: $1"
    exit 0
}

if [[ $EUID -ne 0 ]]; then
    skip "slurmctld and slurmd have to be started by root"
fi
if ! command -v slurmctld slurmd sbatch munged >/dev/null; then
    command -v apt-get >/dev/null || skip "Slurm is not installed, and there is no apt-get to install ${packages[*]} with"
    echo "installing ${packages[*]}"
    log=$(mktemp)
    export DEBIAN_FRONTEND=noninteractive
    if ! { timeout 120 apt-get update && timeout 300 apt-get install -y --no-install-recommends "${packages[@]}"; } \
        >"$log" 2>&1; then
        tail -n 5 "$log"
        skip "apt-get could not install ${packages[*]}"
    fi
fi
export OMP_NUM_THREADS=1
exec "${PYTHON:-.venv/bin/python}" -m pytest -m slurm tests/slurm "$@"
