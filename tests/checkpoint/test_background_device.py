"""A background save on a GPU keeps to its own device and stream: the training's stream is never waited for."""

import torch
from fake_cuda import FakeCuda

from joint_train.checkpoint import state
from joint_train.checkpoint.background import BackgroundSave
from joint_train.distributed.ranks import Ranks

TENSORS, NUMBERS = 4, 3_000_000  # of 12 MB each: torch's writer waits for its stream after each large one


def test_nothing_waits_for_the_stream_of_the_training(tmp_path, monkeypatch):
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    torch.cuda.set_device(3)
    tensors = {f"weight {i}": torch.zeros(NUMBERS) for i in range(TENSORS)}
    ranks, devices = Ranks(60), []

    def write():
        devices.append(torch.cuda.current_device())
        state.save_tensors(tmp_path / "part", tensors, tensors, ranks, "part")

    save = BackgroundSave(7, write)
    save.join(60)
    save.reraise()
    assert save.status() == BackgroundSave.DONE and devices == [3]
    assert len(cuda.waits) >= TENSORS and {(device, stream) for _, device, stream in cuda.waits} == {(3, "own")}
    assert {thread for thread, *_ in cuda.waits} == {"save-7"}
    assert torch.cuda.current_stream().name == "default"  # the training's is as it was
