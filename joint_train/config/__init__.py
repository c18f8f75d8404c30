"""The configuration: the schema (every key once), what its values may be, and how a command composes it.

Nothing here imports torch, so that ``--help`` and a misspelt key answer at once.
"""

from joint_train.config.checks import validate
from joint_train.config.compose import (
    checked_command_line,
    composed_by_hydra,
    join_options,
    load,
    world_size_from_env,
)
from joint_train.config.help import choices, conf_dir, groups, help_text, keys
from joint_train.config.mistakes import check_overrides, explained
from joint_train.config.schema import (
    ActivationCheckpointingConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DrafterConfig,
    EvalConfig,
    ExportConfig,
    FreezeConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    SourceConfig,
    TrackingConfig,
)
from joint_train.config.typed import (
    config_to_save,
    group_of,
    read,
    read_written,
    rename_keys,
    resolve_interpolations,
    select,
    to_yaml,
    with_overrides,
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
    "ActivationCheckpointingConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DrafterConfig",
    "EvalConfig",
    "ExportConfig",
    "FreezeConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "SourceConfig",
    "TrackingConfig",
    "check_overrides",
    "checked_command_line",
    "choices",
    "composed_by_hydra",
    "conf_dir",
    "explained",
    "group_of",
    "groups",
    "help_text",
    "join_options",
    "keys",
    "load",
    "mesh_shape",
    "parse_drafter_loss",
    "parse_steps",
    "read",
    "read_written",
    "rename_keys",
    "resolve_interpolations",
    "round_weights",
    "select",
    "teacher_grad",
    "to_yaml",
    "validate",
    "with_overrides",
    "world_size_from_env",
    "config_to_save",
]
