"""Errors that are reported to the user in one sentence, without a stack trace. Every command's ``main`` catches the
base class."""


class JointTrainError(Exception):
    """Something the user can put right. The message says what is wrong, where, and what to set instead."""


class ConfigError(JointTrainError, ValueError):
    """A configuration that can't work. The message names the key, the reason and what to set instead."""


class WeightsError(JointTrainError, ValueError):
    """A folder's weights don't fit the model: the message lists every one that is missing, unexpected or misshaped."""


class DataError(JointTrainError, ValueError):
    """Data that can't be trained on. The message names the file and the line (or the row, for Parquet and datasets)."""


class OtherData(DataError):
    """A data position that belongs to other data than the configuration's."""


class CheckpointError(JointTrainError, RuntimeError):
    """A checkpoint can't be written, read or found."""


class TooManyBadSteps(JointTrainError, RuntimeError):
    """The run is ended, because its gradient norms are no longer finite."""


class OutOfMemory(JointTrainError, RuntimeError):
    """A device has no memory left. The message says what the plan would change."""


class WriteError(JointTrainError, OSError):
    """A file can't be written. The message names it, the reason and what to do."""
