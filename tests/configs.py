"""Configurations composed as a run's are: by Hydra, from the files of ``conf/`` and overrides."""

from collections.abc import Mapping
from typing import Any

from joint_train.config import Config, load


def literal(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(literal, value)) + "]"
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def overrides(settings: Mapping[str, Any]) -> list[str]:
    """``{"optim.lr": 1e-3}`` as overrides."""
    return [f"{key}={literal(value)}" for key, value in settings.items()]


def compose(settings: Mapping[str, Any] | None = None, check: bool = True) -> Config:
    """A run's configuration with these dotted keys set; the pair and the sources are names that nothing reads."""
    unused = {"model.base": "base", "model.drafter": "drafter", "data.train": [{"path": "unused"}]}
    return load(overrides(unused | dict(settings or {})), check=check)
