"""A save that goes on while the training does."""

import threading
from contextlib import nullcontext

import torch

from joint_train.errors import CheckpointError


class BackgroundSave:
    """A save in a thread of its own, and how it ended."""

    DONE, RUNNING, FAILED = range(3)

    def __init__(self, step: int, write):
        self.step = step
        self.error: BaseException | None = None
        # In a new thread CUDA's device is the first and its stream the one of the training, and torch's checkpoint
        # writer waits for the current stream after each large tensor.
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        # A daemon: a process that has to go isn't held up by a write that hangs.
        self._thread = threading.Thread(target=self._run, args=(write,), name=f"save-{step}", daemon=True)
        self._thread.start()

    def _run(self, write) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)
            with nullcontext() if self._device is None else torch.cuda.stream(torch.cuda.Stream(self._device)):
                write()
        except BaseException as error:
            self.error = error

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def status(self, late: bool = False) -> int:
        """The state of the save; with ``late`` a save that still runs counts as failed."""
        if self._thread.is_alive():
            if late:
                self.error = CheckpointError(f"saving step {self.step} has not finished in time, its disk may hang")
            return self.FAILED if late else self.RUNNING
        return self.DONE if self.error is None else self.FAILED

    def reraise(self) -> None:
        if self.error is not None:
            raise CheckpointError(f"saving step {self.step} failed: {self.error}") from self.error
