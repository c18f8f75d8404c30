"""The configuration: the schema (every key once), what its values may be, and how a command composes it.

Nothing here imports torch, so that ``--help`` and a misspelt key answer at once.
"""

from joint_train.config.checks import validate
from joint_train.config.compose import conf_dir, load, world_size_from_env
from joint_train.config.help import choices, groups, help_text, keys
from joint_train.config.schema import (
    Config,
    DataConfig,
    DrafterConfig,
    LossConfig,
    SourceConfig,
)
from joint_train.config.values import (
    DIMENSIONS,
    KINDS,
    mesh_shape,
    parse_drafter_loss,
    parse_steps,
    round_weights,
    teacher_grad,
)
from joint_train.errors import ConfigError

__all__ = [
    "DIMENSIONS",
    "KINDS",
    "Config",
    "ConfigError",
    "DataConfig",
    "DrafterConfig",
    "LossConfig",
    "SourceConfig",
    "choices",
    "conf_dir",
    "groups",
    "help_text",
    "keys",
    "load",
    "mesh_shape",
    "parse_drafter_loss",
    "parse_steps",
    "round_weights",
    "teacher_grad",
    "validate",
    "world_size_from_env",
]
