"""How every command starts and ends: logging, an error said in a sentence, the exit code.

Exit codes: 0; 1 where a command's own answer is no (a damaged checkpoint, a text that differs); 2 for an error that the
message explains, as ``argparse`` has it. Anything else is a bug and ends with its stack.
"""

import importlib.metadata
import logging
import os
import sys
from collections.abc import Callable

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from joint_train.errors import JointTrainError

# What is said in a sentence. OSError is a file that can't be read or written: its message names it.
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
    try:
        return main() or 0
    except EXPLAINED as error:
        print(f"{f'[rank {rank}] ' if rank else ''}{name}: {error}", file=sys.stderr)
        return 2
