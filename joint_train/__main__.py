"""The main job: ``torchrun --nproc-per-node N -m joint_train [overrides]``."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from joint_train import command

command.set_allocator()  # before torch is imported, which reads it once

import hydra  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from joint_train.config import conf_dir, help_text, validate, world_size_from_env  # noqa: E402
from joint_train.errors import JointTrainError  # noqa: E402


def run(cfg: DictConfig) -> None:
    """Train as configured, on this rank."""
    # torch and transformers take seconds to import
    from joint_train.train import trainer

    try:
        trainer.run(cfg)
    except JointTrainError as error:
        refuse(error, int(os.environ.get("RANK", 0)))


@hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> None:
    rank = int(os.environ.get("RANK", 0))
    command.start_logging(rank)
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


def print_help() -> None:
    """``--help``: the groups of keys. ``--help data optim``: the keys of these groups. ``--help all``: every key."""
    wanted = [word for word in sys.argv[1:] if not word.startswith("-")]
    if not wanted:
        print(__doc__.strip())
        print("\nAn override is KEY=VALUE. `--help GROUP` lists a group's keys, `--help all` all of them;")
        print("`--cfg job` prints what a command composes, and `--hydra-help` Hydra's own flags.\n\nGroups of keys:")
    print(help_text(wanted).strip("\n"))


if __name__ == "__main__":
    if {"--help", "-h"} & set(sys.argv):
        sys.exit(command.start("joint_train", print_help))
    else:
        try:
            main()
            leave(0)
        except SystemExit as end:
            leave(end.code)
