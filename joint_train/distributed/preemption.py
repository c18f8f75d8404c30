"""Stopping a run cleanly when the machine is taken away.

SIGTERM, SIGUSR1, SIGHUP (a terminal that is closed) or SIGINT (Ctrl-C) to any rank: all ranks finish the step they are
in, save, and exit with :data:`PREEMPTED`:

    with Preemption(cfg.checkpoint.grace_seconds) as preemption:
        for step in …:
            …
            if preemption.should_stop():
                checkpointer.save(…, block=True)
                checkpointer.close()
                preemption.exit()

A second Ctrl-C ends the process at once. SIGINT and SIGHUP that the parent has had ignored (``nohup``, a shell's
background job) stay ignored.

Before the first step, and wherever else nothing would be lost, a signal ends the process at once, with the same code:

    with preemption.ends_at_once():
        model, data = …

What a launcher has to know:

- Exit code 85 of a worker means: saved, or nothing to save; run the same command again. 86: the grace period passed
  before the save was done (the newest older checkpoint stands); also to be run again, but no progress was kept.
- Signals may go to one worker or to all, once or many times, and to torchrun.
- torchrun (torch 2.13) passes on SIGTERM, SIGINT, SIGHUP and SIGQUIT only; SIGUSR1 kills it and leaves its workers
  without a parent. So ``torchrun --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1`` (or
  ``PET_SIGNALS_TO_HANDLE``). Slurm's ``--signal=USR1@…`` reaches the tasks of a step, that is torchrun.
- After passing a signal on, torchrun waits ``--shutdown-timeout`` (``PET_SHUTDOWN_TIMEOUT`` or
  ``TORCH_ELASTIC_SHUTDOWN_TIMEOUT``, default 30) seconds, then sends SIGKILL: set it above ``grace_seconds``, and leave
  Slurm's own notice and ``KillWait`` above that. Before torch 2.13 it is always 30.
- torchrun never returns a worker's exit code. It exits with 1: after ``SignalException`` if it got the signal itself,
  after ``ChildFailedError`` (whose ``failures[rank].exitcode`` is 85) if a worker did. A launcher that needs the
  difference calls ``torch.distributed.launcher.api.elastic_launch`` and catches the two, or starts the ranks itself.
- torchrun hands the first Ctrl-C to its workers, and ends at a second one without waiting for them. Its workers get
  :data:`PARENT_ENDED` when it ends, however that happens (``joint_train.__main__``): they save, as where torchrun was
  killed, or end at once if a Ctrl-C came before. The kernel sends it for each of torchrun's threads that a worker is
  handed on to, so it counts once its process is gone.
- torchrun signals a worker's whole process group. Data loader processes have to live until the step is done, and no
  longer than their rank: :func:`stand_apart`, and a hook for those that are just being forked.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
import torch.distributed as dist

from joint_train.command import INTERRUPTED, OVERRUN, PARENT_ENDED, PREEMPTED, end_with_parent
from joint_train.distributed.ranks import control_group

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, PARENT_ENDED)
MAY_BE_IGNORED = (signal.SIGINT, signal.SIGHUP)


def stand_apart(_worker_id: int = 0) -> None:
    """For ``DataLoader(worker_init_fn=…)``: signals to a rank's process group don't reach the loader's processes.

    Its own rank still can end them, and when that ends, they do.
    """
    os.setpgid(0, 0)
    end_with_parent()


class Preemption:
    """Watches for the signals while it is entered (in the main thread, once at a time).

    The countdown starts when the signal arrives, even if Python is inside a collective that hangs: after
    ``grace_seconds`` without :meth:`exit` the process ends with :data:`OVERRUN` and says so.
    """

    def __init__(self, grace_seconds: float, timeout_seconds: float = 1800):
        self.grace_seconds = grace_seconds
        self.timeout_seconds = timeout_seconds
        self._signalled = False
        self._interrupts = 0
        self._parent = os.getppid()
        self._saved = False
        self._at_once = False
        self._until: float | None = None
        self._called_off = threading.Event()
        self._group: dist.ProcessGroup | None = None

    def __enter__(self) -> "Preemption":
        # The interpreter writes each signal's number here from C, at once, whatever the main thread is doing.
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._previous_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        ignored = [number for number in MAY_BE_IGNORED if signal.getsignal(number) == signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS if number not in ignored}
        _active.add(self)
        threading.Thread(target=self._watch, name="preemption", daemon=True).start()
        return self

    def __exit__(self, *_exception) -> None:
        _active.discard(self)
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if self._saved else handler)  # torchrun signals who ends last
        if not self._saved:
            self._called_off.set()
        os.close(self._write)  # the watching thread, if it still reads, reads the end

    @contextmanager
    def ends_at_once(self) -> Iterator[None]:
        """While it is entered a signal ends the process at once, with :data:`PREEMPTED`: there is nothing to save."""
        self._at_once = True
        if self._signalled:
            self._end_at_once()
        try:
            yield
        finally:
            self._at_once = False

    def seconds_left(self) -> float | None:
        """What is left of the countdown; None without a signal."""
        return None if self._until is None else max(self._until - time.monotonic(), 0.0)

    def should_stop(self) -> bool:
        """Whether any rank was signalled: the same answer on all. Collective, once a step; the first call may make
        the control group."""
        if self._group is None:
            self._group = control_group(self.timeout_seconds)
        flag = torch.tensor(int(self._signalled))
        if self._group is not None:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        if flag and not self._signalled:
            self._signalled = True
            os.write(self._write, bytes([SIGNALS[0]]))  # the countdown runs on every rank
        return bool(flag)

    def exit(self) -> NoReturn:
        """End the process with :data:`PREEMPTED`: the run is saved. What is left of the countdown bounds the ending."""
        self._saved = True
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises where a loader's process is killed
        sys.exit(PREEMPTED)

    def _note(self, _number, _frame) -> None:
        self._signalled = True

    def _watch(self) -> None:
        while numbers := os.read(self._read, 64):
            for number in numbers:
                if number in SIGNALS:
                    self._arrived(number)
        os.close(self._read)

    def _arrived(self, number: int) -> None:
        self._signalled = True
        left = number == PARENT_ENDED and self._interrupts > 0 and os.getppid() != self._parent
        self._interrupts += number == signal.SIGINT or left
        if self._at_once:
            self._end_at_once()
        if self._interrupts > 1 and not self._saved:
            said = "interrupted again: the run ends here, and the newest complete checkpoint stands"
            print(said, file=sys.stderr, flush=True)
            os._exit(INTERRUPTED)
        if self._until is None:
            self._until = time.monotonic() + self.grace_seconds
            threading.Thread(target=self._count_down, name="grace", daemon=True).start()

    @staticmethod
    def _end_at_once() -> NoReturn:
        said = "signalled to stop: there is nothing to save yet, so the process ends here"
        print(said, file=sys.stderr, flush=True)
        os._exit(PREEMPTED)

    def _count_down(self) -> None:
        again = "; Ctrl-C again ends at once" if self._interrupts else ""
        print(f"signalled to stop: saving within {self.grace_seconds:g} s{again}", file=sys.stderr, flush=True)
        if self._called_off.wait(self.grace_seconds):
            return
        if not self._saved:
            print(
                f"not saved within checkpoint.grace_seconds={self.grace_seconds:g} s after the signal: giving up, the "
                "newest complete checkpoint stands. Raise it (and the launcher's own limits), or save faster",
                file=sys.stderr,
                flush=True,
            )
        os._exit(PREEMPTED if self._saved else OVERRUN)


_active: set[Preemption] = set()


_fork = threading.local()  # of the thread that is forking: what it had blocked, its process, whether it is the main one


def _before_fork() -> None:
    """A signal to the group waits until the child has left it: it would die, and the rank would take that for an
    error."""
    if _active:
        _fork.blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        _fork.process, _fork.main = os.getpid(), threading.current_thread() is threading.main_thread()


def _after_fork_in_parent() -> None:
    if _active:
        signal.pthread_sigmask(signal.SIG_SETMASK, _fork.blocked)


def _after_fork_in_child() -> None:
    """A forked child isn't the rank: it ends with it, dies of a signal as usual unless that is to the whole group, and
    may not write to its parent's pipe."""
    if _active:
        _active.clear()
        signal.set_wakeup_fd(-1)
        os.setpgid(0, 0)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # drops what came before
            signal.signal(number, signal.SIG_DFL)
        if _fork.main:
            end_with_parent(parent=_fork.process)
        signal.pthread_sigmask(signal.SIG_SETMASK, _fork.blocked)


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
