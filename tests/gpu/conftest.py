"""How the suite runs: what is most likely wrong comes first, and a test that hangs or crashes costs itself only.

The tests run in a child process, which imports nothing anew. One that takes longer than its limit is killed with its
child, and one that fails leaves a GPU that may be in any state: in both cases a new child goes on with the next test.
A test that would begin after the suite's time fails by name.
"""

import os
import pickle
import select
import signal
import struct
import time
from pathlib import Path

import pytest
from _pytest.reports import TestReport
from _pytest.runner import runtestprotocol

STARTED = time.monotonic()
SECONDS = float(os.environ.get("JOINT_TRAIN_GPU_SUITE_SECONDS", "inf"))
LIMIT = float(os.environ.get("JOINT_TRAIN_GPU_SUITE_TEST_SECONDS", "120"))
FIRST = (  # and then the others
    "test_steps_of_two_rows_are_finite_at_real_head_sizes",
    "test_a_run_is_finite_and_learns",
    "test_a_resumed_run_goes_on_as_the_uninterrupted_one",
    "test_every_attention_is_the_references",
    "test_sharded_equals_unsharded",
    "test_the_plan_is_what_the_allocator_gives",
)
LAST = ("test_ligers_kernels_are_the_references", "test_compiled_layers_are_the_references")


@pytest.fixture(autouse=True)
def time_is_left():
    if time.monotonic() - STARTED > SECONDS:
        pytest.fail(f"not run: the suite's {SECONDS:.0f} s (JOINT_TRAIN_GPU_SUITE_SECONDS) are over; -k chooses tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(FIRST)}
    order |= {name: 1000 + place for place, name in enumerate(LAST)}
    if alone(items):
        items.sort(key=lambda item: order.get(getattr(item, "originalname", ""), 500))


def alone(items: list[pytest.Item]) -> bool:
    """Whether only this suite runs: pytest asks a folder's conftest for the whole session."""
    return bool(items) and all(Path(__file__).parent in item.path.parents for item in items)


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    if (
        not alone(session.items)
        or hasattr(session.config, "workerinput")  # of pytest-xdist, which has a loop of its own
        or session.config.option.collectonly
        or session.testsfailed
        and not session.config.option.continue_on_collection_errors
    ):
        return None
    at = 0
    while at < len(session.items):
        at = Child(session, at).watch()
        for reason in (session.shouldfail, session.shouldstop):
            if reason:
                raise session.Interrupted(reason) if reason is session.shouldstop else session.Failed(reason)
    return True


class Child:
    """A process that runs the tests from number ``at`` on, until one fails."""

    def __init__(self, session: pytest.Session, at: int):
        self.session, self.config, self.at = session, session.config, at
        self.read, self.write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.close(self.read)
            try:
                self.run()
            finally:
                os._exit(0)
        os.close(self.write)

    def run(self) -> None:
        items = self.session.items
        for number in range(self.at, len(items)):
            after = items[number + 1] if number + 1 < len(items) else None
            reports = runtestprotocol(items[number], nextitem=after, log=False)
            data = [self.config.hook.pytest_report_to_serializable(config=self.config, report=r) for r in reports]
            message = pickle.dumps(data)
            os.write(self.write, struct.pack("q", len(message)))
            while message:
                message = message[os.write(self.write, message) :]
            if any(report.failed for report in reports):
                return

    def watch(self) -> int:
        """Report what the child finds; returns the number of the first test that is left."""
        items, number = self.session.items, self.at
        try:
            while number < len(items):
                item, started = items[number], time.monotonic()
                item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
                reports, ended = self.receive(started + LIMIT), False
                if reports is None:
                    late = time.monotonic() - started >= LIMIT
                    why = (
                        f"took longer than {LIMIT:.0f} s (JOINT_TRAIN_GPU_SUITE_TEST_SECONDS) and was ended"
                        if late
                        else ("ended its process: a crash in native code, or it was killed")
                    )
                    reports, ended = [self.failure(item, f"{item.nodeid} {why}", started)], True
                for report in reports:
                    item.ihook.pytest_runtest_logreport(report=report)
                item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
                number += 1
                if ended or any(report.failed for report in reports) or self.session.shouldfail:
                    break
        finally:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            os.waitpid(self.pid, 0)
            os.close(self.read)
        return number

    def receive(self, until: float) -> list | None:
        """The reports of a test; None if there are none by then, or the child is gone."""
        if (head := self.bytes(8, until)) is None or (data := self.bytes(*struct.unpack("q", head), until)) is None:
            return None
        hook = self.config.hook.pytest_report_from_serializable
        return [hook(config=self.config, data=report) for report in pickle.loads(data)]

    def bytes(self, count: int, until: float) -> bytes | None:
        found = b""
        while len(found) < count:
            if not select.select([self.read], [], [], max(0.0, until - time.monotonic()))[0]:
                return None
            if not (more := os.read(self.read, count - len(found))):
                return None
            found += more
        return found

    def failure(self, item: pytest.Item, text: str, started: float) -> TestReport:
        keywords = dict.fromkeys(item.keywords, 1)
        return TestReport(
            item.nodeid, item.location, keywords, "failed", text, "call", duration=time.monotonic() - started
        )
