"""Checksums of files, computed once on a machine for as long as a file isn't touched.

A file's size, inode and times are kept beside its checksum in the cache folder. One that was changed within the last
seconds isn't trusted to show a further change in its times, so nothing is kept for it yet.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from joint_train.data.locks import locked
from joint_train.files import replace

CHUNK = 1 << 24
SETTLED_SECONDS = 2.0
"""Some file systems count times in seconds: a later change within one would leave no trace."""


def digest(path: Path | str, cache: Path, timeout: float = 1800.0) -> str:
    """The SHA-256 of a file, in hex.

    Args:
        path: of the file.
        cache: the folder of what is known about files; nothing is kept where it can't be written.
        timeout: seconds without progress of another process that reads the same file.

    Raises:
        OSError: the file can't be read.
        TimeoutError: another process reads it and makes no progress.
    """
    note = _note(path, cache)
    if (known := _known(note, path)) is not None:
        return known
    with ExitStack() as stack:
        touch: Callable[[], object] = int  # where the cache can't be written there is no lock
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            touch = stack.enter_context(locked(note.with_suffix(".lock"), timeout, f"reading {path}"))
        except TimeoutError:
            raise
        except OSError:
            pass
        if (known := _known(note, path)) is not None:
            return known
        settled = time.time_ns() - SETTLED_SECONDS * 1e9
        before, found = _state(path), hashlib.sha256()
        with open(path, "rb") as stream:
            while chunk := stream.read(CHUNK):
                found.update(chunk)
                touch()
        if before == _state(path) and max(before[1:3]) < settled:
            remember(path, cache, found.hexdigest())
        return found.hexdigest()


def remember(path: Path | str, cache: Path, found: str) -> None:
    """Keep the checksum of a file as it is now, where that can be written."""
    try:
        note = _note(path, cache)
        note.parent.mkdir(parents=True, exist_ok=True)
        replace(note, json.dumps({"path": str(path), "state": _state(path), "sha256": found}))
    except OSError:
        pass


def _note(path: Path | str, cache: Path) -> Path:
    return cache / "digests" / f"{hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:32]}.json"


def _state(path: Path | str) -> list[int]:
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _known(note: Path, path: Path | str) -> str | None:
    try:
        known = json.loads(note.read_text())
        return known["sha256"] if known["state"] == _state(path) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
