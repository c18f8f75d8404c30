"""Ratios of sums over prompts, with bootstrap intervals for the choice of prompts."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

RESAMPLES = 2000


def interval(columns: Sequence[Sequence[float]], statistic: Callable[..., Tensor], seed: int) -> dict[str, Any]:
    """A ratio of sums over prompts and its 95 % bootstrap interval.

    Args:
        columns: one list for each quantity, with one number for each prompt.
        statistic: of the columns' sums; elementwise on tensors.

    Returns:
        ``value``, ``low``, ``high``; ``None`` where there is none.
    """
    data = torch.tensor(columns, dtype=torch.float64)  # [quantities, prompts]
    count = data.shape[1]
    picks = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(seed))
    resampled = statistic(*data[:, picks].sum(-1))
    resampled = resampled[resampled.isfinite()]
    value = statistic(*data.sum(-1)).item()
    if not math.isfinite(value):
        return {"value": None, "low": None, "high": None}
    if count < 2 or len(resampled) < RESAMPLES // 2:
        return {"value": value, "low": None, "high": None}
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": value, "low": low, "high": high}
