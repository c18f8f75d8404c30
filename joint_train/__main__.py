"""The main job: ``torchrun --nproc-per-node N -m joint_train [overrides]``."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import hydra
from omegaconf import DictConfig

from joint_train.command import start_logging
from joint_train.config import choices_text, conf_dir, help_text, validate, world_size_from_env
from joint_train.errors import JointTrainError


def run(cfg: DictConfig) -> None:
    """Train as configured, on this rank."""
    # torch and transformers take seconds to import
    from joint_train.train.trainer import Trainer

    try:
        Trainer(cfg).train()
    except JointTrainError as error:
        refuse(error, int(os.environ.get("RANK", 0)))


@hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> None:
    rank = int(os.environ.get("RANK", 0))
    start_logging(rank)
    # Writes the first failed rank's traceback to where torchrun looks for it.
    from torch.distributed.elastic.multiprocessing.errors import record

    try:
        validate(cfg, world_size_from_env())
        record(run)(cfg)
    except JointTrainError as error:
        refuse(error, rank)


def refuse(error: Exception, rank: int) -> NoReturn:
    """Say what is wrong, in place of a stack that says nothing more; torchrun repeats it at the end of its report.

    torchrun ends every rank as soon as one has ended, so the others leave rank 0 the time to speak; one that is still
    here after that has a reason of its own, and says so itself.
    """
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the trainer's handler would only take note
        time.sleep(20)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": str(error), "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": message}))
    sys.exit(f"[rank {rank}] joint_train: {error}" if rank else f"joint_train: {error}")


def leave(code: int | str | None) -> NoReturn:
    """End this process here. All that matters is closed by now, and torch's threads don't always survive Python's own
    ending ("terminate called without an active exception"): a run that had finished would count as a crash."""
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    for worker in multiprocessing.active_children():  # of the data loaders: Python's own ending would end them
        worker.kill()
        worker.join(5)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    if {"--help", "-h"} & set(sys.argv):
        print(__doc__ + "\nHydra: --cfg job prints the composed configuration; --hydra-help has its own flags.")
        print(f"\nprepared settings\n{choices_text()}")
        print(help_text())
    else:
        try:
            main()
            leave(0)
        except SystemExit as end:
            leave(end.code)
