"""What ``--help`` and the documentation say of the configuration: read from the schema, so that it can't go stale."""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

from omegaconf import MISSING

from joint_train.config.schema import Config, SourceConfig
from joint_train.errors import ConfigError


def conf_dir() -> Path:
    """The folder of the configuration files, in a source tree and in an installed wheel."""
    here = Path(__file__).resolve().parent.parent
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


SOURCES = ("data.train", "data.val")  # keys that hold lists of sources
ADDED = ("experiment", "recipe")  # prepared settings of several groups, added to the others with a +
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
            yield field.name if group == RUN else f"{group}.{field.name}", _default(field), field.metadata["help"]
        elif schema is not Config:
            yield from keys(f"{group}.{field.name}", cast(type, field.type))


def source_keys() -> Iterator[tuple[str, str, str]]:
    """The keys of a source of ``data.train`` and ``data.val``: name, default and meaning."""
    for field in dataclasses.fields(SourceConfig):
        yield field.name, _default(field), field.metadata["help"]


def _default(field: dataclasses.Field) -> str:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return "(required)" if default == MISSING else "null" if default is None else str(default)


def choices() -> dict[str, list[str]]:
    """The files of ``conf/`` by group, as they are chosen on the command line."""
    found = {folder.name: sorted(f.stem for f in folder.glob("*.yaml")) for folder in sorted(conf_dir().iterdir())}
    return {"+" * (group in ADDED) + group: names for group, names in found.items() if names}


def help_text(wanted: list[str]) -> str:
    """The groups, or with `wanted` (names of groups, or ``all``) their keys, one line each.

    Raises:
        ConfigError: for a group that doesn't exist.
    """
    lines = []
    if not wanted:
        lines += [f"  {name:<26} {meaning}" for name, meaning in groups().items()]
        lines += ["", "Prepared settings, in conf/:"]
        for name, names in choices().items():
            some = names if len(names) < 10 else [names[-1], f"… ({len(names)}: --help {name.lstrip('+')})"]
            lines.append(f"  {name:<26} {' | '.join(some)}")
    for name in groups() if wanted == ["all"] else wanted:
        lines += ["", *_lines(name)]
    return "\n".join(lines)


def _lines(name: str) -> list[str]:
    """What ``--help NAME`` prints of a group, a key, or a list of sources."""
    if name in groups():
        return [f"{name}: {groups()[name]}", *_listed(keys(name))]
    found = [key for group in groups() for key in keys(group)]
    lines = [f"{key} (default: {default}): {meaning}" for key, default, meaning in found if key == name]
    if name in SOURCES:
        lines += ["a file, a list of files, or a list of sources with these keys:", *_listed(source_keys())]
    lines += _listed(key for key in found if key[0].startswith(f"{name}."))
    lines += [f"{group}={one}" for group, names in choices().items() if group.lstrip("+") == name for one in names]
    if not lines:
        close = difflib.get_close_matches(name, [key for key, _, _ in found], 1, 0.75)
        meant = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(f"There is no group or key {name}.{meant} Groups: {', '.join(groups())}, or all.")
    return lines


def _listed(found: Iterable[tuple[str, str, str]]) -> list[str]:
    return [f"  {name:<38} {default:<12} {meaning}" for name, default, meaning in found]


def _is_group(field: dataclasses.Field) -> bool:
    return dataclasses.is_dataclass(field.type)
