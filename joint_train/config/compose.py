"""From the files of ``conf/`` and the command line to the typed, checked configuration."""

import os
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from joint_train.config.checks import validate
from joint_train.config.schema import Config
from joint_train.config.typed import to_dataclasses


def conf_dir() -> Path:
    """The folder of the configuration files, in a source tree and in an installed wheel."""
    here = Path(__file__).resolve().parent.parent
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


def load(
    overrides: Sequence[str] = (), world_size: int | None = None, node: int | None = None, check: bool = True
) -> Config:
    """Compose ``conf/config.yaml`` with command-line overrides, and validate the result.

    Args:
        overrides: as on the command line.
        world_size, node: as for :func:`validate`.
        check: whether to validate; a command that needs neither a drafter nor sources leaves it out.

    Raises:
        ConfigError: as :func:`to_dataclasses` and :func:`validate`; Hydra's own errors for an unknown key or a
            wrong type.
    """
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = to_dataclasses(compose("config", list(overrides)))
    if check:
        validate(cfg, world_size, node)
    return cfg


def composed_by_hydra(composed: DictConfig) -> Config:
    """What ``hydra.main`` hands over, as :func:`load` makes it: typed, and validated for the launcher's ranks."""
    cfg = to_dataclasses(composed)
    validate(cfg, world_size_from_env())
    return cfg


def world_size_from_env() -> int:
    """The number of ranks that the launcher (torchrun) announced; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))
