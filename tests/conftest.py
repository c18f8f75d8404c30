"""What several test files use."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: test files run side by side, on small tensors

import pytest

from joint_train import starter

# A shell's background job starts with these ignored, and runs that the tests start would leave them so.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(scope="session")
def starter_dir(tmp_path_factory):
    """The starter pair and data, built once."""
    directory = tmp_path_factory.mktemp("starter") / "pair"
    starter.build(directory)
    return directory
