"""The speed of a run, without waiting for the device in each step."""

import torch
from torch import Tensor


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
