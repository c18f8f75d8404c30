#!/usr/bin/env bash
# The installation steps of the image, all of them or one at a time (so that each can be a layer of its own):
#
#     docker/install.sh VENV [dependencies | package | smoke]
#
# "dependencies" reads pyproject.toml and constraints.txt only: its layer stays valid while the code changes.
# CI runs the same script outside Docker. PYTHON names the interpreter that makes the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$(realpath -m "$1")

dependencies() {
    [[ -x $venv/bin/python ]] || "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -c 'import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' >"$venv/requirements.txt"
    "$venv/bin/python" -m pip install --disable-pip-version-check -r "$venv/requirements.txt" -c constraints.txt
}

package() {
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-deps .
}

# What an image without a GPU can show: the installed package, run from another folder, trains two steps on two ranks.
smoke() {
    local folder
    folder=$(mktemp -d)
    (
        trap 'rm -rf "$folder"' EXIT
        cd "$folder"
        export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
        "$venv/bin/python" -m joint_train.starter pair
        "$venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node=2 -m joint_train \
            +experiment=starter pair=pair output_dir=run max_steps=2 data.max_length=64 eval.batches=1 \
            eval.max_new_tokens=8 tracking.wandb=disabled
        "$venv/bin/python" -m launch.submit --dry-run gpus_per_node=2 -- +experiment=starter pair=pair >job.sh
    )
}

for step in ${2:-dependencies package smoke}; do
    "$step"
done
