"""What ``--help`` and the documentation say of the configuration: read from the schema, so that it can't go stale."""

import dataclasses
from collections.abc import Iterator
from typing import cast

from omegaconf import MISSING

from joint_train.config.compose import conf_dir
from joint_train.config.schema import Config
from joint_train.errors import ConfigError

RUN = "run"  # what the keys that stand in no group are called here


def groups() -> dict[str, str]:
    """The groups of keys and their meaning, those of the run itself last."""
    named = {field.name: field.metadata["help"] for field in dataclasses.fields(Config) if _is_group(field)}
    return named | {RUN: "the run itself; these keys stand in no group"}


def keys(group: str, schema: type = Config) -> Iterator[tuple[str, str, str]]:
    """The keys of a group, also those of the groups inside it: name, default and meaning.

    Raises:
        ConfigError: for a group that doesn't exist.
    """
    if schema is Config and group not in groups():
        raise ConfigError(f"There is no group {group}: choose from {', '.join(groups())}, or all.")
    for field in dataclasses.fields(schema):
        if schema is Config and field.name == group:
            yield from keys(group, cast(type, field.type))
        elif not _is_group(field) and (schema is not Config or group == RUN):
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            default = "(required)" if default == MISSING else "null" if default is None else str(default)
            yield field.name if group == RUN else f"{group}.{field.name}", default, field.metadata["help"]
        elif schema is not Config:
            yield from keys(f"{group}.{field.name}", cast(type, field.type))


def choices() -> dict[str, list[str]]:
    """The files of ``conf/`` by group, as they are chosen on the command line."""
    found = {folder.name: sorted(f.stem for f in folder.glob("*.yaml")) for folder in sorted(conf_dir().iterdir())}
    return {"+" * (group == "experiment") + group: names for group, names in found.items() if names}


def help_text(wanted: list[str]) -> str:
    """The groups, or with `wanted` (names of groups, or ``all``) their keys, one line each.

    Raises:
        ConfigError: for a group that doesn't exist.
    """
    lines = []
    if not wanted:
        lines += [f"  {name:<26} {meaning}" for name, meaning in groups().items()]
        lines += ["", "Prepared settings, in conf/:"]
        lines += [f"  {name:<26} {' | '.join(names)}" for name, names in choices().items()]
    for group in groups() if wanted == ["all"] else wanted:
        lines += ["", f"{group}: {groups().get(group)}"]
        lines += [f"  {name:<38} {default:<12} {meaning}" for name, default, meaning in keys(group)]
    return "\n".join(lines)


def _is_group(field: dataclasses.Field) -> bool:
    return dataclasses.is_dataclass(field.type)
