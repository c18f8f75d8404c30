"""The best validation of a run: what ``checkpoint.keep_best`` names, and when ``eval.patience`` is over."""

import math
from collections.abc import Mapping
from typing import Any


class Best:
    """Follows one metric over a run's validations, the same on every rank.

    Args:
        metric: ``checkpoint.keep_best``: the lowest value is the best, with a leading "-" the highest; None: there is
            no best.
        patience: ``eval.patience``: so many validations in a row without a better value end the run; 0: never.
        saved: what :meth:`state` was in the checkpoint that the run resumes from; of another metric it doesn't count.
    """

    def __init__(self, metric: str | None, patience: int, saved: Mapping[str, Any] | None = None) -> None:
        self.metric, self.patience = metric, patience
        known = saved if saved and saved["metric"] == metric else {"step": None, "value": None, "waited": 0}
        self.step: int | None = known["step"]
        self.value: float | None = known["value"]
        self.waited: int = known["waited"]

    def observe(self, step: int, measured: Mapping[str, float]) -> None:
        """Take note of a validation; one that hasn't the metric, or has NaN, is no better than the ones before."""
        if self.metric is None or (name := self.metric.removeprefix("-")) not in measured:
            return
        value, sign = measured[name], -1 if self.metric.startswith("-") else 1
        if not math.isnan(value) and (self.value is None or sign * value < sign * self.value):
            self.step, self.value, self.waited = step, value, 0
        else:
            self.waited += 1

    @property
    def exhausted(self) -> bool:
        """Whether the run is to end."""
        return 0 < self.patience <= self.waited

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"metric": self.metric, "step": self.step, "value": self.value, "waited": self.waited}
