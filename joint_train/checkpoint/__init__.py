"""Checkpoints: atomic, exact, for any number of ranks, and optionally saved in the background.

:class:`Checkpointer` is a run's view; :func:`load_model`, :func:`locate` and :func:`read_manifest` are for those who
only read. ``python -m joint_train.checkpoint ls|verify|prune DIR`` for people. On disk: :mod:`.layout`.
"""

from joint_train.checkpoint.checkpointer import Checkpointer, load_model
from joint_train.checkpoint.layout import find_newest, locate, read_manifest, verify
from joint_train.errors import CheckpointError

__all__ = ["CheckpointError", "Checkpointer", "find_newest", "load_model", "locate", "read_manifest", "verify"]
