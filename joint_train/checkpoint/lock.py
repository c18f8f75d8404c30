"""One live run in an output folder."""

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from joint_train.errors import CheckpointError

_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class RunLock:
    """A POSIX record lock on ``OUTPUT_DIR/run.lock``, held until :meth:`release` or the end of the process.

    The kernel frees it however the process ends, SIGKILL included. POSIX locks (not ``flock``) because they work
    between NFS clients, and because forked loader workers don't inherit them: an orphan can't hold a dead run's lock.
    ``held`` is False on a file system without locks; then nothing may be assumed about other runs.
    """

    def __init__(self, output_dir: Path, wait_seconds: float = 30.0):
        """Raises CheckpointError, naming the other run, if that one is still alive after ``wait_seconds``.

        The wait is for a run that was just killed or preempted and whose last process is still going away.
        """
        self.path = output_dir / "run.lock"
        self.held = False
        try:
            self._file = open(self.path, "a+")
        except OSError as error:
            raise CheckpointError(f"output_dir {output_dir} can't be written: {error.strerror} ({self.path})") from None
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _UNSUPPORTED:
                    return
                if time.monotonic() < deadline:
                    time.sleep(0.2)
                    continue
                self._file.seek(0)
                owner = self._file.read().strip() or "unknown"
                self._file.close()
                raise CheckpointError(
                    f"another run is writing to {output_dir} ({owner}); it holds {self.path}. "
                    "Stop it or set another output_dir. If its machine is surely down, delete that file"
                ) from None
            break
        self.held = True
        self._file.truncate(0)
        self._file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.ctime()}))
        self._file.flush()

    def release(self) -> None:
        self._file.close()
        self.held = False
