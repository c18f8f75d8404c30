"""The health check's collectives run on each rank's own GPU: in a new thread CUDA's current device is the first."""

import threading

import pytest
import torch
import torch.distributed as dist
from fake_cuda import FakeCuda

from launch import preflight

RANKS = 2


class NCCL:
    """Collectives of ranks that are threads here, with NCCL's rule: each rank needs a GPU of its own."""

    PrefixStore = dist.PrefixStore

    def __init__(self, cuda: FakeCuda):
        self.cuda, self.local = cuda, threading.local()
        self.meeting, self.devices, self.bound = threading.Barrier(RANKS), {}, {}

    def is_initialized(self) -> bool:
        return False

    def init_process_group(self, backend: str, rank: int, world_size: int, device_id=None, **_) -> None:
        self.local.rank, self.bound[rank] = rank, (backend, device_id, self.cuda.current_device())

    def new_subgroups(self, size: int):
        return "node", None

    def get_world_size(self, group) -> int:
        return RANKS

    def all_reduce(self, tensor, group=None) -> None:
        self.devices[self.local.rank] = tensor.cuda_device
        self.meeting.wait(30)
        if len(set(self.devices.values())) < RANKS:
            raise RuntimeError("ncclInvalidUsage: Duplicate GPU detected")
        tensor.fill_(sum(rank + 1 for rank in range(RANKS)))
        self.meeting.wait(30)

    def barrier(self, group=None) -> None:
        self.devices["barrier", self.local.rank] = self.cuda.current_device()

    def all_gather_into_tensor(self, whole, part, group=None) -> None:
        self.devices["gather", self.local.rank] = whole.cuda_device

    reduce_scatter_tensor = all_gather_into_tensor

    def destroy_process_group(self) -> None:
        pass


class Torch:
    """torch, but that tensors on a GPU are on the CPU and know which it would be."""

    def __init__(self, cuda: FakeCuda):
        self.cuda = cuda

    def __getattr__(self, name: str):
        return getattr(torch, name)

    def _on(self, device, tensor):
        assert device.type == "cuda"
        tensor.cuda_device = self.cuda.current_device() if device.index is None else device.index
        return tensor

    def full(self, shape, value, device):
        return self._on(device, torch.full(shape, value))

    def zeros(self, length, dtype, device):
        return self._on(device, torch.zeros(length, dtype=dtype))


@pytest.mark.timeout(120)
def test_each_rank_of_a_host_uses_its_own_gpu(tmp_path, monkeypatch):
    cuda = FakeCuda()
    nccl = NCCL(cuda)
    monkeypatch.setattr(preflight, "torch", Torch(cuda))
    monkeypatch.setattr(preflight, "dist", nccl)
    monkeypatch.setattr(preflight, "versions", dict)
    monkeypatch.setattr(preflight, "check_device", lambda local_rank, ranks: cuda.set_device(local_rank))
    monkeypatch.setattr(preflight, "MEASURED", True)
    monkeypatch.setattr(preflight, "BANDWIDTH_BYTES", 1 << 12)
    monkeypatch.setenv("WORLD_SIZE", str(RANKS))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(RANKS))
    monkeypatch.setenv("SLURMD_NODENAME", "one")
    store, checks, found = dist.HashStore(), [], {}
    for rank in range(RANKS):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        checks.append(preflight.Preflight(store, tmp_path, None))

    ranks = [threading.Thread(target=lambda c=check: found.update({c.rank: c.run()})) for check in checks]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(100)
    assert found == {rank: [] for rank in range(RANKS)}
    for rank in range(RANKS):
        backend, device, current = nccl.bound[rank]
        assert (backend, device, current) == ("nccl", torch.device("cuda", rank), rank)
        assert {nccl.devices[key] for key in (rank, ("barrier", rank), ("gather", rank))} == {rank}
    assert checks[0].speeds.startswith("all-gather ")
