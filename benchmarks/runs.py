"""Runs of the main job on starter pairs, for the benchmarks: made once, each in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from joint_train.errors import ConfigError
from joint_train.files import replace

DONE = "overrides.json"  # written last: the run is whole, and this is how it was made


def run_module(module: str, *arguments: str, ranks: int | None = None, timeout: float = 7200) -> None:
    """``python -m module``, on one thread a process unless OMP_NUM_THREADS says otherwise; under torchrun for `ranks`.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    command = [sys.executable, "-m"]
    if ranks is not None:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command += [module, *arguments]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}")


def starter_pair(directory: Path, seed: int = 0, timeout: float = 7200) -> Path:
    """The starter pair with random weights of this seed, in ``directory``."""
    run_module("joint_train.starter", str(directory), "--seed", str(seed), timeout=timeout)
    return directory


def train(output: Path, pair: Path, *overrides: str, ranks: int | None = None, timeout: float = 7200) -> Path:
    """The run of the main job in ``output``, made if it isn't there; one that was cut short is made anew.

    Args:
        pair: the starter pair that ``+experiment=starter`` reads.
        ranks: processes under torchrun; by default one without it.
        overrides: of the configuration. There are no checkpoints but the last, and no generation unless they say so.

    Raises:
        ConfigError: ``output`` has a finished run with other overrides.
        RuntimeError: the run failed.
    """
    marker = output / DONE
    if marker.exists():
        if json.loads(marker.read_text()) != list(overrides):
            raise ConfigError(f"{output} is a run with other settings ({marker}): remove it, or name another folder")
        return output
    shutil.rmtree(output, ignore_errors=True)
    common = ["+experiment=starter", f"pair={pair}", f"output_dir={output}", "resume=never"]
    common += ["tracking.wandb=disabled", "checkpoint.every=1000000", "eval.every=0", "eval.prompts=0"]
    run_module("joint_train", *common, *overrides, ranks=ranks, timeout=timeout)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)  # the export is what is measured
    replace(marker, json.dumps(list(overrides), indent=1) + "\n")
    return output
