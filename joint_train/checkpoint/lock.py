"""One live run in an output folder."""

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from joint_train.errors import CheckpointError

log = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
BEATS = 4

_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class RunLock:
    """A POSIX record lock on ``OUTPUT_DIR/run.lock``, held until :meth:`release` or the end of the process.

    The kernel frees it however the process ends, SIGKILL included. POSIX locks (not ``flock``) because they work
    between NFS clients, and because forked loader workers don't inherit them: an orphan can't hold a dead run's lock.

    On a file system without locks, ``OUTPUT_DIR/run.beat`` is rewritten every :data:`BEAT_SECONDS` instead. One that
    doesn't change while it is watched for :data:`BEATS` of them is a dead run's; no clock is compared with another's.
    """

    def __init__(self, output_dir: Path, wait_seconds: float = 30.0):
        """Raises CheckpointError, naming the other run, if that one is still alive after ``wait_seconds``.

        The wait is for a run that was just killed or preempted and whose last process is still going away.
        """
        self.path = output_dir / "run.lock"
        self.held = False
        self._released = threading.Event()
        self._beat: Path | None = None
        try:
            self._file = open(self.path, "a+", encoding="utf-8", errors="replace")
        except OSError as error:
            raise CheckpointError(f"output_dir {output_dir} can't be written: {error.strerror} ({self.path})") from None
        deadline, waited = time.monotonic() + wait_seconds, False
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _UNSUPPORTED:
                    self._start_beating(output_dir)
                    return
                self._file.seek(0)
                owner = self._file.read().strip() or "unknown"
                if time.monotonic() < deadline:
                    if not waited and wait_seconds > 1:
                        log.info("waiting up to %.0f s for the run that holds %s: %s", wait_seconds, self.path, owner)
                    waited = True
                    time.sleep(0.2)
                    continue
                self._file.close()
                raise _taken(output_dir, owner, self.path) from None
            break
        self.held = True
        self._file.truncate(0)
        self._file.write(json.dumps(_owner()))
        self._file.flush()

    def _start_beating(self, output_dir: Path) -> None:
        """Raises CheckpointError if another run's file changes while it is watched, or ours is overwritten at once."""
        path, ours = output_dir / "run.beat", _owner() | {"run": uuid.uuid4().hex}
        if (before := _read(path)) is not None:
            for _ in range(BEATS):
                time.sleep(BEAT_SECONDS)
                if (now := _read(path)) != before:
                    raise _taken(output_dir, now or "unknown", path)
        _write(path, ours | {"beat": 0})
        time.sleep(BEAT_SECONDS)  # of two that start together the one that wrote last goes on
        if f'"{ours["run"]}"' not in (now := _read(path) or ""):
            raise _taken(output_dir, now or "unknown", path)

        def beat() -> None:
            number = 0
            while not self._released.wait(BEAT_SECONDS):
                number += 1
                try:
                    _write(path, ours | {"beat": number})
                except OSError:
                    pass  # a disk that is full for a while: the next beat may come through

        self._beat, self.held = path, True
        threading.Thread(target=beat, name="run.beat", daemon=True).start()

    def release(self) -> None:
        self._released.set()
        if self._beat is not None:
            self._beat.unlink(missing_ok=True)
        self._file.close()
        self.held = False


def _owner() -> dict:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.ctime()}


def _taken(output_dir: Path, owner: str, file: Path) -> CheckpointError:
    return CheckpointError(
        f"another run is writing to {output_dir} ({owner}); it holds {file}. "
        "Stop it or set another output_dir. If its machine is surely down, delete that file"
    )


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return None


def _write(path: Path, content: dict) -> None:
    temporary = path.with_name(f"{path.name}.{content['run']}")
    temporary.write_text(json.dumps(content))
    temporary.rename(path)
