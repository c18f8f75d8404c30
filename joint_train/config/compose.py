"""From the files of ``conf/`` and the command line to a checked configuration, and what ``--help`` says of it."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import MISSING, DictConfig

from joint_train.config.checks import validate
from joint_train.config.schema import Config


def conf_dir() -> Path:
    """The folder of the configuration files, in a source tree and in an installed wheel."""
    here = Path(__file__).resolve().parent.parent
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


def load(overrides: Sequence[str] = (), world_size: int | None = None) -> DictConfig:
    """Compose ``conf/config.yaml`` with command-line overrides, and validate the result.

    Raises:
        ConfigError: as :func:`validate`; Hydra's own errors for an unknown key or a wrong type.
    """
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", list(overrides))
    validate(cfg, world_size)
    return cfg


def choices_text() -> str:
    """The files of ``conf/``, as they are chosen on the command line."""
    groups = {folder.name: sorted(f.stem for f in folder.glob("*.yaml")) for folder in sorted(conf_dir().iterdir())}
    return "\n".join(
        f"  {'+' * (group == 'experiment')}{group}={' | '.join(names)}" for group, names in groups.items() if names
    )


def world_size_from_env() -> int:
    """The number of ranks that the launcher (torchrun) announced; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def help_text(schema: type = Config, prefix: str = "") -> str:
    """One line for each key: its name, default and meaning."""
    lines, fields = [], dataclasses.fields(schema)
    for before, field in zip((None, *fields), fields, strict=False):
        if dataclasses.is_dataclass(field.type):
            lines += ["", f"{prefix}{field.name}: {field.metadata['help']}"]
            lines.append(help_text(field.type, f"{prefix}{field.name}."))
        else:
            if before and dataclasses.is_dataclass(before.type):
                lines += ["", "the run"]
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            default = "(required)" if default == MISSING else "null" if default is None else str(default)
            lines.append(f"  {prefix + field.name:<38} {default:<12} {field.metadata['help']}")
    return "\n".join(lines)
