"""The limit of a template's time holds wherever the signal finds the program, and never outside of the rendering."""

import gc
import resource
import signal
import sys
import threading
import time

import pytest

from joint_train.data import limits


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 0.02)
    monkeypatch.setattr(limits, "TICK_SECONDS", 0.01)
    yield
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0) and gc.isenabled()


def spin(seconds: float) -> None:
    """Use processor time."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        sum(range(1000))


class Slow:
    """Takes half of the time in its finaliser, where Python swallows exceptions."""

    def __del__(self):
        spin(0.05)


def test_an_exception_that_is_swallowed_is_raised_again(monkeypatch):
    """In a finaliser, by whoever catches everything, in a callback of the garbage collector, in this order."""
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)

    def collect(phase, info):
        spin(0.05)

    def finalisers():
        while True:
            Slow()
            spin(0.05)

    def catches_once():
        try:
            spin(60)
        except BaseException:
            spin(60)

    def makes_cycles():
        while True:
            cycle = []
            cycle.append(cycle)

    monkeypatch.setattr(gc, "callbacks", [*gc.callbacks, collect])
    for work in (finalisers, catches_once, makes_cycles):
        start = time.process_time()
        with pytest.raises(limits.TooLong):
            limits.limited(work)
        assert time.process_time() - start < 30
    assert unraisable == []


def test_a_signal_that_arrives_late_does_nothing():
    """As one does that was sent while the last instruction of a rendering ran."""
    assert limits.limited(lambda: 1) == 1
    signal.raise_signal(signal.SIGVTALRM)
    handler = signal.getsignal(signal.SIGVTALRM)

    def at_the_end():
        # What the handler finds when the call has returned and the timer isn't off yet.
        handler(signal.SIGVTALRM, sys._getframe())

    at_the_end()
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.001, 0.001)
    spin(0.05)  # would raise here
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def test_everything_is_as_before_whatever_a_call_raises(monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_AS)

    def fails():
        assert resource.getrlimit(resource.RLIMIT_AS) != before and not gc.isenabled()
        raise KeyError

    for error, work in ((KeyError, fails), (limits.TooLong, lambda: spin(60)), (MemoryError, lambda: bytes(2**40))):
        with pytest.raises(error):
            limits.limited(work)
        assert resource.getrlimit(resource.RLIMIT_AS) == before and gc.isenabled()
    gc.disable()
    limits.limited(int)
    assert not gc.isenabled(), "as the caller had it"
    gc.enable()


def test_other_threads_are_neither_limited_nor_interrupted():
    found = []
    thread = threading.Thread(target=lambda: found.append(limits.limited(lambda: spin(0.1) or 1)))
    thread.start()
    thread.join(60)
    assert found == [1]
