"""A lock file that one process of the machine holds while others wait, for as long as the holder makes progress."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock


@contextmanager
def locked(path: Path, timeout: float, what: str) -> Iterator[Callable[[], None]]:
    """Hold a lock. The kernel drops that of a process that dies.

    Args:
        path: of the lock's file.
        timeout: seconds without progress of another holder, before giving up.
        what: the holder does, for the error.

    Yields:
        What the holder has to call whenever it makes progress.

    Raises:
        TimeoutError: another process holds the lock and makes no progress.
    """
    lock = filelock.FileLock(path)
    seen, since = None, time.monotonic()
    while True:
        try:
            lock.acquire(timeout=min(1.0, timeout))
            break
        except filelock.Timeout:
            # The holder touches the lock file whenever it makes progress. Waiters only look for a change, so clocks
            # needn't agree.
            touched = path.stat().st_mtime if path.exists() else None
            if touched != seen:
                seen, since = touched, time.monotonic()
            if time.monotonic() - since > timeout:
                raise TimeoutError(
                    f"another process holds {path} and has made no progress with {what} for {timeout:.0f} s. If none "
                    "is running, remove the file; or set data.cache_dir to a folder of your own"
                ) from None
    try:
        yield lambda: os.utime(path)
    finally:
        lock.release()
