"""The main job: ``torchrun --nproc-per-node N -m joint_train [overrides]``."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from joint_train import cli, command

command.set_allocator()  # before torch is imported, which reads it once

import hydra  # noqa: E402
from hydra.errors import HydraException  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

from joint_train.config import (  # noqa: E402
    Config,
    checked_command_line,
    composed_by_hydra,
    conf_dir,
    explained,
    help_text,
)
from joint_train.errors import JointTrainError  # noqa: E402


def run(cfg: Config) -> None:
    """Train as configured, on this rank."""
    # torch and transformers take seconds to import
    from joint_train.train import trainer

    try:
        trainer.run(cfg)
    except JointTrainError as error:
        refuse(error, int(os.environ.get("RANK", 0)))


@hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")
def main(composed: Any) -> None:
    rank = int(os.environ.get("RANK", 0))
    command.start_logging(rank)
    command.leave_out_torchao()
    # Writes the first failed rank's traceback to where torchrun looks for it.
    from torch.distributed.elastic.multiprocessing.errors import record

    try:
        record(run)(composed_by_hydra(composed))
    except JointTrainError as error:
        refuse(error, rank)


def refuse(error: Exception, rank: int) -> NoReturn:
    """Report an error without its stack, which would add nothing; torchrun repeats it at the end of its report.

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
        code = command.EXPLAINED_ERROR
    # torch's handler raises where a loader's process is killed; and torchrun signals those that end last.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, command.PARENT_ENDED):
        signal.signal(number, signal.SIG_IGN)
    for worker in multiprocessing.active_children():  # of the data loaders: Python's own ending would end them
        worker.kill()
        worker.join(5)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def print_help() -> None:
    """``--help``: the groups of keys. ``--help data optim.lr``: a group's keys, one key. ``--help all``: every key."""
    wanted = [word for word in sys.argv[1:] if not word.startswith("-")]
    if not wanted:
        print(__doc__.strip())
        print("\nAn override is KEY=VALUE. `--help GROUP` lists a group's keys, `--help KEY` one, `--help data.train`")
        print("a source's, `--help all` all of them. `--config FILE.yaml` takes settings from a file of your own,")
        print("`--cfg job` prints what a command composes, `--hydra-help` Hydra's own flags.\n\nGroups of keys:")
    print(help_text(wanted).strip("\n"))


def start() -> None:
    """Hand the command line to Hydra, which raises its errors for us to put in our own words."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        sys.argv[1:] = checked_command_line(sys.argv[1:])
        main()
    except JointTrainError as error:
        refuse(error, int(os.environ.get("RANK", 0)))
    except (HydraException, OmegaConfBaseException) as error:
        refuse(explained(error), int(os.environ.get("RANK", 0)))


if __name__ == "__main__":
    if {"--help", "-h"} & set(sys.argv):
        sys.exit(command.start("joint_train", print_help))
    if "--version" in sys.argv:
        sys.exit(print(cli.versions()))
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a rank ends with its torchrun: it saves, see distributed/preemption.py
        command.end_with_parent(command.PARENT_ENDED)
    try:
        start()
        leave(command.DONE)
    except KeyboardInterrupt:  # before there is anything to save
        leave(command.INTERRUPTED)
    except SystemExit as end:
        leave(end.code)
