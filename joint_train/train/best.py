"""The best validation of a run: what ``checkpoint.keep_best`` names, and when ``eval.patience`` is over."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from joint_train.checkpoint import Checkpointer, layout
from joint_train.config import Config
from joint_train.distributed.ranks import Ranks
from joint_train.pair.model import JointModel

log = logging.getLogger(__name__)


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
        self.step: int | None = None
        self.value: float | None = None
        self.waited = 0
        self.observed = -1  # the step of the last validation that counted
        if saved and saved["metric"] == metric:
            self.step, self.value, self.waited = (saved[name] for name in ("step", "value", "waited"))
            self.observed = saved.get("observed", -1)

    def observe(self, step: int, measured: Mapping[str, float]) -> None:
        """Take note of a validation; one with NaN or infinity, which no checkpoint keeps, is no better than others.
        One that hasn't the metric doesn't count, nor one that is repeated because a signal interrupted it."""
        name, sign = layout.metric_of(self.metric or "")
        if (value := measured.get(name)) is None or step <= self.observed:
            return
        self.observed = step
        if math.isfinite(value) and (self.value is None or sign * value < sign * self.value):
            self.step, self.value, self.waited = step, value, 0
        else:
            self.waited += 1

    @property
    def exhausted(self) -> bool:
        """Whether the run is to end."""
        return 0 < self.patience <= self.waited

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {name: getattr(self, name) for name in ("metric", "step", "value", "waited", "observed")}


def load_best(cfg: Config, checkpointer: Checkpointer, model: JointModel, step: int) -> tuple[int, dict[str, float]]:
    """The weights of the best checkpoint by ``checkpoint.keep_best``, in place of those of the last step. Collective.

    Args:
        step: of the weights that are there.

    Returns:
        The best checkpoint's step, and what was measured then.

    Raises:
        CheckpointError: no checkpoint has that metric.
    """
    metric = str(cfg.checkpoint.keep_best)
    ranks = Ranks(cfg.parallel.timeout_seconds)
    path, manifest = ranks.first(
        "looking for the best checkpoint", lambda: layout.find_best(checkpointer.folder, metric)
    )
    if manifest.step != step:
        checkpointer.load(path, model, config=cfg)
    log.info(
        "export of step %d, the best of the checkpoints by checkpoint.keep_best=%s: %.4g",
        manifest.step, metric, manifest.metrics[layout.metric_of(metric)[0]],
    )  # fmt: skip
    return manifest.step, manifest.metrics
