"""How memory is allocated is set by the main job itself, so also under plain torchrun, before torch is imported."""

import os
import subprocess
import sys

import pytest

CODE = """
import sys
from joint_train import command
setting = command.set_allocator
def set_allocator():
    assert "torch" not in sys.modules
    setting()
command.set_allocator = set_allocator
import joint_train.__main__, os
print(os.environ.get("PYTORCH_ALLOC_CONF"))
"""


@pytest.mark.parametrize("given", [{}, {"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "x:1"}])
def test_the_main_job_sets_the_allocator(given):
    env = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name} | given
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, timeout=60)
    assert not done.returncode, done.stderr
    mine = "expandable_segments:True,pinned_max_round_threshold_mb:1"
    assert done.stdout.strip() == (given.get("PYTORCH_ALLOC_CONF", "None") if given else mine)
