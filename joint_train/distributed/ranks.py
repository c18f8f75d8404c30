"""Agreement between ranks: what fails on one fails on all, and every wait has a time limit."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from joint_train.errors import CheckpointError

T = TypeVar("T")


_control: dict[tuple[Any, float], dist.ProcessGroup] = {}


def control_group(timeout_seconds: float) -> dist.ProcessGroup | None:
    """The gloo group of all ranks for what the main thread has to agree on; None without a process group.

    One for each time-out, since a group has a connection to every other rank. Collective the first time.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    key = dist.group.WORLD, timeout_seconds
    if key not in _control:
        _control[key] = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
    return _control[key]


class Ranks:
    """All ranks of the job on the control group, or the only process there is.

    With ``own_group`` they have a group of their own, for another thread than the main one.

    Every method is collective and raises CheckpointError on every rank if it fails on any, within ``timeout_seconds``.
    """

    def __init__(self, timeout_seconds: float, own_group: bool = False):
        self.timeout_seconds = timeout_seconds
        self.group = None
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.group = control_group(timeout_seconds)
            if own_group:
                self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
            self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def each(self, what: str, function: Callable[[], T]) -> list[T]:
        """Run it on every rank; the results, in order of rank. ``what`` names it in errors."""
        results = [self._attempt(what, function)] * self.size
        if self.group is not None:
            mine = results[self.rank]
            self._bounded(what, lambda: dist.all_gather_object(results, mine, group=self.group))
        return [_value(result) for result in results]

    def all(self, what: str, function: Callable[[], T]) -> T:
        """Run it on every rank; this rank's own result."""
        result = self._attempt(what, function)
        self.each(what, lambda: _value(result) and None)
        return _value(result)

    def first(self, what: str, function: Callable[[], T]) -> T:
        """Run it on rank 0; its result, on every rank."""
        result: list[Any] = [self._attempt(what, function) if self.rank == 0 else None]
        if self.group is not None:
            self._bounded(what, lambda: dist.broadcast_object_list(result, src=0, group=self.group))
        return cast(T, _value(result[0]))

    def highest(self, what: str, value: int) -> int:
        """The largest of the ranks' values."""
        return self.start_highest(what, value)()

    def start_highest(self, what: str, value: int) -> Callable[[], int]:
        """Start :meth:`highest` without waiting; the result of what this returns, called later, is its value."""
        tensor = torch.tensor(value)
        if self.group is None:
            return lambda: value
        work = []
        self._bounded(what, lambda: work.append(dist.all_reduce(tensor, dist.ReduceOp.MAX, self.group, async_op=True)))

        def finish() -> int:
            self._bounded(what, work[0].wait)
            return int(tensor)

        return finish

    def _bounded(self, what: str, collective: Callable[[], None]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise CheckpointError(
                f"{what}: rank {self.rank} lost another rank, or waited {self.timeout_seconds:g} s for it: {error}"
            ) from error

    def _attempt(self, what: str, function: Callable[[], T]) -> T | CheckpointError:
        try:
            return function()
        except CheckpointError as error:
            return error
        except Exception as error:  # as words: not every exception survives the trip to the other ranks
            return CheckpointError(f"{what} failed on rank {self.rank}: {type(error).__name__}: {error}")


def _value(result: T | CheckpointError) -> T:
    if isinstance(result, CheckpointError):
        raise result
    return result


def run_on_all_ranks(action: Callable[[], Any]) -> None:
    """Run an action on every rank; if it fails on one, it fails on all of them, and none is left waiting.

    Raises:
        Exception: this rank's own; on the other ranks a RuntimeError with its text.
    """
    error = None
    try:
        action()
    except Exception as e:
        error = e
    if dist.is_initialized():
        texts: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(texts, error and f"{type(error).__name__}: {error}")
        for rank, text in enumerate(texts):
            if text and error is None:
                raise RuntimeError(f"rank {rank}: {text}")
    if error:
        raise error
