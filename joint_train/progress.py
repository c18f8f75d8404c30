"""How far long work is: a bar on a terminal, plain lines in a log."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

log = logging.getLogger(__name__)
Item = TypeVar("Item")
Show = Callable[[str, int, int], None]
LINE_SECONDS = 10.0  # between lines in a log


@contextmanager
def shown_progress(unit: str, brief: bool = False) -> Iterator[Show]:
    """A function to call with what is being done, how much of it is done, and of how much. Ranks that log only errors
    show nothing, and threads beside the main one only lines: a terminal has one bar.

    Args:
        unit: what is counted, e.g. "prompts"; "bytes" are shown in GB.
        brief: the work may be quick, and leaves no bar; nor a line unless it takes ten seconds.
    """
    alone = threading.current_thread() is threading.main_thread()
    if alone and sys.stderr.isatty() and log.isEnabledFor(logging.INFO):
        with bars(unit, brief) as show:
            yield show
    else:
        yield Lines(unit, brief)


@contextmanager
def bars(unit: str, brief: bool) -> Iterator[Show]:
    """A bar on the terminal for each thing that is done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = TextColumn("{task.description}"), BarColumn(), count, TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=brief) as progress:
        tasks = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        yield show


class Lines:
    """A line in the log when something is done, and on the way every ten seconds."""

    def __init__(self, unit: str, brief: bool = False) -> None:
        self.unit, self.brief = unit, brief
        self.what, self.started, self.said = "", 0.0, 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self.what or not done:
            self.what, self.started, self.said = what, now, now
        finished = done == total and (not self.brief or now - self.started >= LINE_SECONDS)
        if finished or now - self.said >= LINE_SECONDS:
            self.said = now
            of = f"{done} of {total} {self.unit}"
            if self.unit == "bytes":
                of = f"{done / 1e9:.1f} of {total / 1e9:.1f} GB"
            log.info("%s: %s, %.0f s", what, of, now - self.started)


def tracked(what: str, items: Collection[Item], unit: str = "tensors") -> Iterator[Item]:
    """The items, with what is being done and how many of them are done, where that takes long."""
    with shown_progress(unit, brief=True) as show:
        for done, item in enumerate(items):
            show(what, done, len(items))
            yield item
        show(what, len(items), len(items))


def counted(what: str) -> Callable[[], None]:
    """A function to call before each part of long work, which logs now and then how many parts were begun."""
    count, began = 0, time.monotonic()
    logged = began

    def one_more() -> None:
        nonlocal count, logged
        count, now = count + 1, time.monotonic()
        if now - logged >= LINE_SECONDS:
            logged = now
            log.info("%s: %d in %.0f s", what, count, now - began)

    return one_more
