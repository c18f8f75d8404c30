"""The suite's time: a test that would begin after it fails by name, and what was found before is still reported."""

import os
import time

import pytest

STARTED = time.monotonic()
SECONDS = float(os.environ.get("JOINT_TRAIN_GPU_SUITE_SECONDS", "inf"))


@pytest.fixture(autouse=True)
def time_is_left():
    if time.monotonic() - STARTED > SECONDS:
        pytest.fail(f"not run: the suite's {SECONDS:.0f} s (JOINT_TRAIN_GPU_SUITE_SECONDS) are over; -k chooses tests")
