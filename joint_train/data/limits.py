"""Limits of time and memory for what strangers wrote: the chat templates that come with models.

Python can only be interrupted by an exception that a signal's handler raises, at whatever point the program has
reached. Three things make that safe here. The handler raises only while the limited call is on the stack, however late
a signal arrives. An exception that Python swallows (in a finaliser) or that the call catches is raised again at the
next tick, until the call ends. And the garbage collector, whose callbacks and finalisers belong to the rest of the
program, doesn't run meanwhile.
"""

import gc
import os
import resource
import signal
import threading
from collections.abc import Callable
from functools import lru_cache
from types import FrameType
from typing import Any, TypeVar

SECONDS = 10.0
"""Processor time of this process for one call; a rendering usually takes less than a millisecond."""
BYTES = 2**30
"""Memory that one call may take beyond what the process has; a rendering usually takes a few copies of the text."""
TICK_SECONDS = 0.05
"""How soon the exception is raised again, if it was swallowed."""

PAGE = resource.getpagesize()
Result = TypeVar("Result")


class TooLong(BaseException):
    """A call took longer than SECONDS. Not an ``Exception``: jinja catches those in some places."""


def limited(work: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """What ``work(*args, **kwargs)`` returns.

    Only the main thread handles signals. In another one the call isn't limited.

    Raises:
        TooLong: it takes longer than SECONDS.
        MemoryError: it takes more than BYTES.
    """
    if threading.current_thread() is not threading.main_thread():
        return work(*args, **kwargs)
    _handle_signals()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    collecting = gc.isenabled()
    try:
        gc.disable()
        if (size := _address_space()) is not None:
            bounds = [bound for bound in (size + BYTES, soft, hard) if bound != resource.RLIM_INFINITY]
            resource.setrlimit(resource.RLIMIT_AS, (min(bounds), hard))
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, TICK_SECONDS)
        return _watched(work, args, kwargs)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        if collecting:
            gc.enable()


def _watched(work: Callable[..., Result], args: tuple, kwargs: dict[str, Any]) -> Result:
    return work(*args, **kwargs)


def _interrupt(_: int, frame: FrameType | None) -> None:
    """Raise an error in the limited call, unless that has returned or is in a finaliser."""
    while frame is not None:
        if frame.f_code is _watched.__code__:
            raise TooLong
        if frame.f_code.co_name == "__del__":
            return
        frame = frame.f_back


@lru_cache(maxsize=1)
def _handle_signals() -> None:  # forked processes inherit it
    signal.signal(signal.SIGVTALRM, _interrupt)


def _address_space() -> int | None:
    """Bytes of this process's address space, where the system tells it."""
    try:
        file = os.open("/proc/self/statm", os.O_RDONLY)  # a third of the time of open()
    except OSError:
        return None
    try:
        return int(os.read(file, 100).split()[0]) * PAGE
    finally:
        os.close(file)
