"""Checkpoints: atomic, exact, for any number of ranks, and optionally saved in the background.

:class:`Checkpointer` is a run's view; :func:`load_model`, :func:`locate` and :func:`read_manifest` are for those who
only read. ``python -m joint_train.checkpoint ls|verify|prune DIR`` for people. On disk: :mod:`.layout`.
"""

from typing import TYPE_CHECKING

from joint_train.lazy import lazy_names

if TYPE_CHECKING:
    from joint_train.checkpoint.checkpointer import Checkpointer
    from joint_train.checkpoint.layout import find_newest, locate, read_manifest, verify
    from joint_train.checkpoint.loading import load_model
    from joint_train.errors import CheckpointError

__all__ = ["CheckpointError", "Checkpointer", "find_newest", "load_model", "locate", "read_manifest", "verify"]

__getattr__ = lazy_names(
    __name__,
    {
        "Checkpointer": "joint_train.checkpoint.checkpointer",
        "load_model": "joint_train.checkpoint.loading",
        "find_newest": "joint_train.checkpoint.layout",
        "locate": "joint_train.checkpoint.layout",
        "read_manifest": "joint_train.checkpoint.layout",
        "verify": "joint_train.checkpoint.layout",
        "CheckpointError": "joint_train.errors",
    },
)
