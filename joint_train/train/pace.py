"""The speed of a run, without waiting for the device in each step, its share of what the device can do, and the memory
that it takes."""

import os
import resource

import torch
from torch import Tensor

from joint_train.distributed.ranks import Ranks

TFLOPS = {"B200": 2250.0, "H200": 989.0, "H100": 989.0, "A100": 312.0}  # dense bfloat16, by the vendor's data sheets


class Since:
    """Tokens and time of the steps since they were last read. The device runs behind the host: a step's own time is
    only known where its results are waited for, so it is that of all of them, a step."""

    def __init__(self, device: torch.device):
        self.device = device
        self.clear()

    def clear(self) -> None:
        self.steps, self.waited, self.seconds = 0, 0.0, 0.0
        self.tokens = torch.zeros((), dtype=torch.int64, device=self.device)

    def add(self, tokens: Tensor, waited: float, seconds: float) -> None:
        """Add a step; `tokens` is a scalar on the device."""
        self.steps, self.waited, self.seconds = self.steps + 1, self.waited + waited, self.seconds + seconds
        self.tokens += tokens

    def read(self) -> tuple[float, float, float]:
        """Tokens, seconds that were waited for data, and seconds; each of a step, in the mean."""
        means = self.tokens.item() / self.steps, self.waited / self.steps, self.seconds / self.steps
        self.clear()
        return means


def memory_gb(device: torch.device, everyone: Ranks) -> float:
    """Memory of the device, or on CPU this rank's share of the host's, in GiB: the least that any rank has."""
    if device.type == "cuda":
        mine = torch.cuda.get_device_properties(device).total_memory
    else:
        pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        mine = pages // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(everyone.each("reading the size of the memory", lambda: mine)) / 2**30


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: allocated on a GPU; of the whole process, with what Python and its libraries take, on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def utilisation(speed: float, recomputed: float, device: torch.device) -> dict[str, float]:
    """A rank's FLOPs a second, and their share of what its GPU can do, where that is known: with and without those that
    compute something again."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    most = next((peak for gpu, peak in TFLOPS.items() if gpu in name), None)
    shares = {"hfu": speed / 1e12 / most, "mfu": (speed - recomputed) / 1e12 / most} if most else {}
    return {"tflops_per_gpu": speed / 1e12, **shares}
