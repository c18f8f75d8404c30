"""How far a measurement is: a bar on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LINE_SECONDS = 10.0  # between lines in a log


@contextmanager
def shown_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A function to call with what is being done, how many prompts of it are done, and of how many."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines()
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as bars:
        tasks = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield show


class Lines:
    """A line on stderr when something is done, and on the way every ten seconds."""

    def __init__(self) -> None:
        self.what, self.started, self.said = "", 0.0, 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self.what or not done:
            self.what, self.started, self.said = what, now, now
        if done == total or now - self.said >= LINE_SECONDS:
            self.said = now
            print(f"{what}: {done}/{total} prompts, {now - self.started:.0f} s", file=sys.stderr, flush=True)
