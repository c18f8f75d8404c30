"""How every command starts and ends: logging, errors that are reported in one sentence, the exit code."""

import argparse
import ctypes
import importlib.metadata
import logging
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn, cast

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from joint_train.errors import JointTrainError

DONE, NO, EXPLAINED_ERROR, TOO_LARGE, HUNG, PREEMPTED, OVERRUN, INTERRUPTED = 0, 1, 2, 3, 70, 85, 86, 130
EXIT_CODES = {
    DONE: "the work is done",
    NO: "the command's own answer is no (a damaged checkpoint, a bad row, texts that differ, an unhealthy host); or a "
    "bug, which ends with its stack",
    EXPLAINED_ERROR: "an error that the message on stderr explains",
    TOO_LARGE: "`joint_train.plan`: the run doesn't fit",
    HUNG: "the watchdog ended a run that made no progress for `parallel.timeout_seconds`",
    PREEMPTED: "a signal stopped the run, and it is saved or had nothing to save: run the same command again",
    OVERRUN: "a signal stopped the run, and `checkpoint.grace_seconds` were over before the save was done: the newest "
    "complete checkpoint stands; run the same command again",
    INTERRUPTED: "Ctrl-C ended a command that has nothing to save, or a second one a run that was still saving",
}

# Errors that are reported in one sentence. OSError is a file that can't be read or written: its message names it.
EXPLAINED = (JointTrainError, HydraException, OmegaConfBaseException, OSError)


def set_allocator() -> None:
    """How torch's allocators of GPU and pinned memory work, unless the environment says so already. Before torch is
    imported."""
    if "PYTORCH_ALLOC_CONF" in os.environ or "PYTORCH_CUDA_ALLOC_CONF" in os.environ:
        return
    # Sharded training allocates and frees blocks of many sizes: without this the allocator fragments.
    settings = "expandable_segments:True"
    if tuple(map(int, importlib.metadata.version("torch").split(".")[:2])) >= (2, 13):
        # Otherwise a pinned buffer is rounded up to a power of two: up to twice the host memory for a shard's copy.
        settings += ",pinned_max_round_threshold_mb:1"
    os.environ["PYTORCH_ALLOC_CONF"] = settings


def leave_out_torchao() -> None:
    """Keep transformers from importing torchao, as it does wherever that is installed: it takes a second and prints
    seven lines, and only ``optim.name=adamw_8bit`` uses it, which asks for it with :func:`let_torchao_in`."""
    sys.modules.setdefault("torchao", cast(Any, None))  # importlib takes this for a package that isn't there


def let_torchao_in() -> None:
    """Undo :func:`leave_out_torchao`."""
    if sys.modules.get("torchao", ...) is None:
        del sys.modules["torchao"]


class StderrLines(logging.Handler):
    """Log lines to whatever stderr is when they come: a live progress bar takes its place and prints them above itself,
    where a ``StreamHandler`` would go on writing into the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def start_logging(rank: int) -> None:
    """Messages to stderr; ranks other than 0 say errors only, with their number."""
    line = "%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"
    level = logging.INFO if rank == 0 else logging.ERROR
    logging.basicConfig(level=level, format=line, handlers=[StderrLines()], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # else a line for each request
    logging.getLogger("huggingface_hub").propagate = False  # it prints its lines itself
    if rank or not sys.stderr.isatty():  # bars are for a terminal
        for library in ("HF_HUB", "HF_DATASETS"):  # transformers has that of HF_HUB
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")


class Parser(argparse.ArgumentParser):
    """The options of a command. What is wrong with them is told in one line, by the name that was typed."""

    started_as: str | None = None  # how the command ``joint-train`` calls the module that it runs

    def __init__(self, *args: Any, **options: Any) -> None:
        if self.started_as and str(options.get("prog")).startswith("python -m"):
            options["prog"] = " ".join([self.started_as, *options["prog"].split()[3:]])
        super().__init__(*args, **options)

    def error(self, message: str) -> NoReturn:
        message = message.replace("invalid choice", "there is no such choice").replace("arguments are", "are")
        self.exit(EXPLAINED_ERROR, f"{self.prog}: {message}. --help lists what it takes.\n")


def sentence(error: Exception) -> str:
    """What an error says to a user: of one of the operating system the file and the reason, without its number."""
    if isinstance(error, OSError) and not isinstance(error, JointTrainError) and error.strerror and error.filename:
        return f"{os.path.abspath(os.fsdecode(error.filename))}: {error.strerror}"
    return str(error)


def start(name: str, main: Callable[[], int | None], rank: int = 0) -> int:
    """Run a command's work; an explained error becomes ``name: message`` on stderr.

    Args:
        name: as it is typed, e.g. ``joint_train.plan``.
        main: does the work and returns an exit code, ``None`` for 0.
        rank: of this process, see :func:`start_logging`.

    Returns:
        The exit code.
    """
    start_logging(rank)
    leave_out_torchao()
    try:
        return main() or DONE
    except EXPLAINED as error:
        print(f"{f'[rank {rank}] ' if rank else ''}{name}: {sentence(error)}", file=sys.stderr)
        return EXPLAINED_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


def positive(text: str) -> int:
    """The type of an option that counts something: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def from_zero(text: str) -> int:
    """The type of an option that is an index or a seed, or where 0 means none: a whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def above_zero(text: str) -> float:
    """The type of an option that measures something, such as seconds or GB."""
    return _number(text, lambda value: 0 < value < math.inf, "a number above 0")


def not_negative(text: str) -> float:
    """The type of an option where 0 means none, such as a temperature."""
    return _number(text, lambda value: 0 <= value < math.inf, "a number of 0 or more")


def share(text: str) -> float:
    """The type of an option that is a share of something."""
    return _number(text, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def _number(text: str, fits: Callable[[float], bool], what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


PARENT_ENDED = signal.SIGUSR2  # to a rank whose torchrun ended; the kernel may send it more than once
_prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux has it


def end_with_parent(number: int = signal.SIGKILL, parent: int | None = None) -> None:
    """Have the kernel send this process a signal when its parent ends, however that ends; Linux only.

    More exactly when the thread that started this process ends: only for processes that a main thread starts.

    Args:
        parent: its process id, where it is known; that of ``multiprocessing`` or what it is now by default.
    """
    started, parent = multiprocessing.parent_process() if parent is None else None, parent or os.getppid()
    if _prctl is None:
        return
    _prctl(1, number)  # PR_SET_PDEATHSIG
    if os.getppid() != parent or (started is not None and not started.is_alive()):  # it was faster
        os.kill(os.getpid(), number)
