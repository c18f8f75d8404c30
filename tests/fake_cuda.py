"""``torch.cuda`` without a GPU, with what code gets wrong: the current device and stream belong to a thread.

A new thread has device 0 and its default stream, as with CUDA's runtime. ``waits`` are the streams that were
synchronised with, by thread.
"""

import threading
from contextlib import contextmanager

import torch


class FakeStream:
    def __init__(self, cuda: "FakeCuda", device: int, name: str):
        self.cuda, self.device_index, self.name = cuda, device, name

    def synchronize(self) -> None:
        self.cuda.waits.append((threading.current_thread().name, self.device_index, self.name))

    def __eq__(self, other) -> bool:
        return (self.device_index, self.name) == (other.device_index, other.name)

    __hash__ = None


class FakeCuda:
    def __init__(self, devices: int = 8):
        self._devices, self._local, self.waits = devices, threading.local(), []

    def install(self, monkeypatch) -> None:
        """Put it in the place of those parts of ``torch.cuda``."""
        for name in dir(self):
            if not name.startswith("_") and name not in ("install", "waits"):
                monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return self._devices

    def set_device(self, device) -> None:
        self._local.device = getattr(device, "index", device)

    def current_device(self) -> int:
        return getattr(self._local, "device", 0)

    def Stream(self, device=None, priority: int = 0) -> FakeStream:  # noqa: N802 - torch's name
        index = self.current_device() if device is None else getattr(device, "index", device)
        return FakeStream(self, index, "own")

    def current_stream(self, device=None) -> FakeStream:
        return getattr(self._local, "stream", None) or FakeStream(self, self.current_device(), "default")

    @contextmanager
    def stream(self, stream: FakeStream | None):
        before, self._local.stream = getattr(self._local, "stream", None), stream
        try:
            yield
        finally:
            self._local.stream = before

    def synchronize(self, device=None) -> None:
        self.waits.append((threading.current_thread().name, self.current_device(), "whole device"))
