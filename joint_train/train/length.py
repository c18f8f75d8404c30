"""How many steps a run has: known once its data is tokenised, and the same on every rank."""

import logging

from joint_train.config import Config
from joint_train.config.values import parse_steps, run_length
from joint_train.data import BatchLoader
from joint_train.distributed.ranks import Ranks
from joint_train.errors import ConfigError

log = logging.getLogger(__name__)

MANY_PASSES = 10


def run_steps(cfg: Config, loader: BatchLoader, ranks: int, step: int) -> int:
    """The last step of a run: ``max_steps``, or the one that reaches the end of its ``epochs``. Collective.

    Args:
        loader: of the training data, at the position of ``step``.
        ranks: that share the data.
        step: the step that the run resumes from.

    Raises:
        ConfigError: ``profile.steps`` lie beyond it.
    """
    sequence, rows = loader.sequence, ranks * cfg.data.micro_batch_size * cfg.optim.grad_accum
    max_steps, epochs = run_length(cfg)
    if max_steps is None:
        whole = Ranks(cfg.parallel.timeout_seconds).first("counting the rows of the run's epochs", sequence.count_rows)
        # Counted from here: what was done may have been done in steps of another size.
        max_steps = step + max(0, -(-(whole - loader.position["rows"]) // rows))
        log.info(
            "%g epochs of %s documents are %s rows: the run has %d steps", epochs, f"{sequence.size:,}", f"{whole:,}",
            max_steps,
        )  # fmt: skip
    else:
        _warn_of_passes(sequence, max_steps, rows)
    traced = parse_steps(cfg.profile.steps)
    if traced and traced[-1] > max_steps:
        raise ConfigError(f"profile.steps={cfg.profile.steps}: the run ends at step {max_steps}.")
    return max_steps


def _warn_of_passes(sequence, max_steps: int, rows: int) -> None:
    """Log how many passes over the data ``max_steps`` makes, and warn of a source that is seen very often."""
    if (epoch := sequence.epoch(round(max_steps * rows * sequence.documents_a_row()))) is not None:
        passes = f"{epoch:.1f} epochs" if epoch >= 1 else f"{100 * epoch:.2g} % of an epoch"
        log.info("max_steps=%d: about %s of %s documents", max_steps, passes, f"{sequence.size:,}")
    for name, passes in sequence.passes(max_steps * rows):
        if passes > MANY_PASSES:
            log.warning(
                "max_steps=%d makes about %.0f passes over the data source %r, which the models may learn by heart. "
                "Set epochs instead of max_steps, or give the source a smaller weight",
                max_steps, passes, name,
            )  # fmt: skip


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens at this one."""
    return every > 0 and step % every == 0
