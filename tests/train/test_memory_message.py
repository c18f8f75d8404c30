"""An out-of-memory ends a run with one sentence that says what to change."""

from types import SimpleNamespace

import pytest
import torch

from joint_train.errors import OutOfMemory
from joint_train.train import advice, trainer


def test_out_of_memory_is_an_explained_error(monkeypatch):
    class Full:
        cfg = plan = machine = None

        def __init__(self, *_):
            pass

        def train(self):
            raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(trainer, "Trainer", Full)
    monkeypatch.setattr(advice, "out_of_memory", lambda *given: f"out of memory: {given[-1]}")
    checkpoint = SimpleNamespace(grace_seconds=1)
    with pytest.raises(OutOfMemory, match="out of memory: no memory"):
        trainer.run(SimpleNamespace(checkpoint=checkpoint, parallel=SimpleNamespace(timeout_seconds=5)))
