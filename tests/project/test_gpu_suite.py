"""The GPU suite on CPU: a few of its tests as `make test-gpu` runs them, all of them under `slow`."""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = str(ROOT / "tests/gpu/run.sh")


def run(*arguments: str, device: str = "cpu", python: str = sys.executable) -> subprocess.CompletedProcess:
    environment = os.environ | {"JOINT_TRAIN_GPU_SUITE_DEVICE": device, "PYTHON": python}
    environment.pop("PYTEST_ADDOPTS", None)
    environment.pop("JOINT_TRAIN_GPU_SUITE_SECONDS", None)
    command = [RUN, *arguments, "-p", "no:cacheprovider"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)


def test_some_of_it_on_cpu(tmp_path):
    wanted = "sharded_equals_unsharded and e2b or auto and small and packed or every_loss and mix and not compiled"
    done = run("-k", wanted, "--basetemp", str(tmp_path / "suite"))
    assert done.returncode == 0, done.stdout + done.stderr
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed >= 5 and " failed" not in done.stdout
    assert re.match(r"CPU; torch 2\.\d+\S*, transformers \d", done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_of_it_on_cpu(tmp_path):
    done = run("--basetemp", str(tmp_path / "suite"))
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert all(re.search("FlexAttention|liger|GPU", line) for line in skipped), skipped


def test_what_is_missing_is_said_and_nothing_is_installed(tmp_path):
    venv.create(tmp_path / "empty", symlinks=True)
    python = tmp_path / "empty/bin/python"
    before = sorted(tmp_path.rglob("*"))
    done = run(python=str(python))
    assert done.returncode == 2 and "'torch>=2.11' 'transformers==5.22.2'" in done.stderr
    assert "installs nothing" in done.stderr and sorted(tmp_path.rglob("*")) == before
    done = run(python="/nowhere/python")
    assert done.returncode == 2 and "there is none at /nowhere/python" in done.stderr


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is a GPU here")
def test_without_a_gpu_it_says_so():
    done = run(device="cuda")
    assert done.returncode == 2 and "needs a GPU, and torch" in done.stderr


WAYS_TO_END = """
import os, time, pytest
pytestmark = pytest.mark.gpu
def test_ligers_kernels_are_the_references(): pass
def test_hangs(): time.sleep(600)
def test_crashes(): os.abort()
def test_fails(): assert os.getpid() == 0
def test_passes(): pass
def test_a_run_is_finite_and_learns(): pass
"""


def test_one_that_hangs_or_crashes_costs_itself_only(tmp_path):
    (tmp_path / "conftest.py").write_text((ROOT / "tests/gpu/conftest.py").read_text())
    (tmp_path / "test_ways.py").write_text(WAYS_TO_END)
    environment = os.environ | {"JOINT_TRAIN_GPU_SUITE_TEST_SECONDS": "3"}
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", str(tmp_path), "-o", "timeout=0"]
    command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    found = re.findall(r"^\S*test_ways.py::(\w+) (PASSED|FAILED)", done.stdout, re.MULTILINE)
    assert found == [
        ("test_a_run_is_finite_and_learns", "PASSED"),
        ("test_hangs", "FAILED"),
        ("test_crashes", "FAILED"),
        ("test_fails", "FAILED"),
        ("test_passes", "PASSED"),
        ("test_ligers_kernels_are_the_references", "PASSED"),
    ], done.stdout + done.stderr
    assert "test_hangs took longer than 3 s" in done.stdout and "test_crashes ended its process" in done.stdout
    assert "3 failed, 3 passed" in done.stdout and done.returncode == 1
