"""The dataclasses of :mod:`joint_train.config.schema`, made of what was composed or saved, and written again."""

import copy
import dataclasses
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from joint_train.config.mistakes import not_a_key
from joint_train.config.schema import RENAMED, Config, SourceConfig, schema
from joint_train.errors import ConfigError

log = logging.getLogger(__name__)

Group = TypeVar("Group")


def to_dataclasses(composed: DictConfig, may_miss: Collection[str] = ("model.base", "model.drafter")) -> Config:
    """The dataclasses of a composed configuration, with interpolations resolved.

    Args:
        may_miss: keys that are the folders in ``pair`` where they aren't set, and empty without it; some commands need
            no pair.

    Raises:
        ConfigError: for a key that nothing reads, one that has to be set and isn't, and an interpolation that can't be
            resolved.
    """
    composed = copy.deepcopy(composed)
    OmegaConf.set_struct(composed, False)
    try:
        _check_keys(composed, Config)
        for old, new in RENAMED.items():
            group, _, name = old.rpartition(".")
            OmegaConf.set_struct(parent := OmegaConf.select(composed, group), False)
            if (value := parent.pop(name, None)) is not None:
                log.warning("%s is the earlier name of %s and still works; set %s instead.", old, new, new)
                OmegaConf.update(composed, new, value)
        text = OmegaConf.to_container(composed)
        for name in OmegaConf.missing_keys(composed):
            if name not in may_miss:
                raise ConfigError(f"{name} is not set, and has to be.")
            part = f"{composed.pair}/{name.removeprefix('model.')}" if composed.get("pair") else ""
            OmegaConf.update(composed, name, part)
        cfg = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        said = str(error).splitlines()[0]
        unset = re.search(r"Environment variable '(.+?)' not found", said)
        said = f"the environment variable {unset[1]}, which it reads, isn't set" if unset else said
        raise ConfigError(f"{error.full_key}: {said}") from error
    assert isinstance(cfg, Config)
    _expand_home(cfg)
    cfg.interpolations = dict(_interpolations(text, dataclasses.asdict(cfg)))
    return cfg


def _expand_home(node: Any) -> None:
    """Paths that begin with ``~/`` with the home folder: no shell has expanded those of a file, or after a ``=``."""
    items = vars(node).items() if dataclasses.is_dataclass(node) else enumerate(node)
    for key, value in [*items]:
        if isinstance(value, str) and value.startswith("~/"):
            expanded = str(Path(value).expanduser())
            setattr(node, key, expanded) if isinstance(key, str) else node.__setitem__(key, expanded)
        elif dataclasses.is_dataclass(value) or isinstance(value, list):
            _expand_home(value)


def _check_keys(composed: DictConfig, of: type, prefix: str = "") -> None:
    """Hydra lets ``+key=value`` add a key that nothing reads."""
    fields = {field.name: field.type for field in dataclasses.fields(of)}
    for name in map(str, composed):
        if name not in fields and f"{prefix}{name}" not in RENAMED:
            raise ConfigError(not_a_key(f"{prefix}{name}", of if of is SourceConfig else Config))
        inner = fields.get(name)
        if dataclasses.is_dataclass(inner):
            _check_keys(composed[name], cast(type, inner), f"{prefix}{name}.")
        elif get_origin(inner) is list and dataclasses.is_dataclass(item := get_args(inner)[0]):
            for index, source in enumerate(composed[name]):
                _check_keys(source, cast(type, item), f"{prefix}{name}[{index}].")


def config_to_save(cfg: Config | Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as it is written to disk, of plain types: interpolations as they were composed, unresolved."""
    if not isinstance(cfg, Config):
        return copy.deepcopy(dict(cfg))
    whole = dataclasses.asdict(cfg)
    for (*path, last), (text, value) in cfg.interpolations.items():
        try:
            parent: Any = whole
            for key in path:
                parent = parent[key]
            if parent[last] == value:  # not set to something else since
                parent[last] = text
        except (LookupError, TypeError):
            continue
    return whole


def _interpolations(text: Any, values: Any, path: tuple = ()) -> Iterator[tuple[tuple, tuple[str, Any]]]:
    """The places where `text`, unresolved, is an interpolation for what is in `values`."""
    if isinstance(text, str):
        if "${" in text:
            yield path, (text, values)
    elif isinstance(text, (dict, list)):
        for key, item in text.items() if isinstance(text, dict) else enumerate(text):
            yield from _interpolations(item, values[key], (*path, key))


def _to_dict(config: Any) -> dict[str, Any]:
    plain = OmegaConf.to_container(config)
    if not isinstance(plain, dict):
        raise ValueError("it holds no keys")
    return {str(key): value for key, value in plain.items()}


def to_yaml(cfg: Config) -> str:
    """:func:`config_to_save` as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(config_to_save(cfg)))


def read_written(file: Path) -> dict[str, Any]:
    """What :func:`to_yaml` wrote, also by an earlier version: by today's names of keys, interpolations unresolved.

    Raises:
        ConfigError: if it holds no configuration: bytes that aren't text, torn YAML.
        OSError: if the file can't be read.
    """
    try:
        return rename_keys(_to_dict(OmegaConf.load(file)))
    except (ValueError, RecursionError, AttributeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{file} can't be read as the configuration of a run: {error}") from None


def rename_keys(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration with the earlier names of keys replaced by today's."""
    saved = copy.deepcopy(saved)
    for old, new in RENAMED.items():
        group, _, name = old.rpartition(".")
        if name in (keys := saved.get(group) or {}):
            keys[new.rpartition(".")[2]] = keys.pop(name)
    return saved


def resolve_interpolations(saved: dict[str, Any], left_out: list[str] | None = None) -> dict[str, Any]:
    """A saved configuration with its interpolations resolved here.

    Args:
        left_out: takes the keys of those that can't be, which are left out then; without it they stay as they are.
    """

    def resolve(node: Any) -> Any:
        if not OmegaConf.is_config(node):
            return node
        whole: dict[Any, Any] = {}
        for key in node if isinstance(node, DictConfig) else range(len(node)):
            try:
                whole[key] = resolve(node[key])
            except OmegaConfBaseException:
                if left_out is None:
                    whole[key] = cast(Any, OmegaConf.to_container(node))[key]
                else:
                    left_out.append(node._get_full_key(key))
        return whole if isinstance(node, DictConfig) else list(whole.values())

    return resolve(OmegaConf.create(saved))


def read(file: Path) -> Config:
    """The configuration that a run wrote, also one of an earlier version: keys that it lacks have their defaults.

    Raises:
        ConfigError: for values that no configuration has.
        OSError: if the file can't be read.
    """
    saved, unresolved = read_written(file), list[str]()
    config = resolve_interpolations(saved, unresolved)
    if unresolved:
        log.warning("%s: %s can't be resolved here and counts as not set", file, ", ".join(unresolved))
    if unknown := _drop_unknown(config, Config):
        log.warning("%s has keys that this version doesn't know, and which are ignored: %s", file, ", ".join(unknown))
    try:
        composed = OmegaConf.merge(schema(), config)
        assert isinstance(composed, DictConfig)
        cfg = to_dataclasses(composed, OmegaConf.missing_keys(composed))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{file}: {error.full_key}: {str(error).splitlines()[0]}") from error
    return cfg


def _drop_unknown(saved: dict[str, Any], of: type, prefix: str = "") -> list[str]:
    fields = {field.name: field.type for field in dataclasses.fields(of)}
    unknown = [name for name in saved if name not in fields]
    for name in unknown:
        del saved[name]
    inner = {
        name: cast(type, of)
        for name, of in fields.items()
        if dataclasses.is_dataclass(of) and isinstance(saved.get(name), dict)
    }
    return [prefix + name for name in unknown] + [
        name for group, of in inner.items() for name in _drop_unknown(saved[group], of, f"{prefix}{group}.")
    ]


def group_of(of: type[Group], given: Group | Mapping[str, Any] | None) -> Group:
    """A group that a caller gave as its dataclass or as a dictionary; its defaults for None.

    Raises:
        ConfigError: for a key that the group doesn't have, or a value of a wrong type.
    """
    if isinstance(given, of):
        return given
    try:
        values = dict(cast(Mapping[str, Any], given or {}))
        group = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(of), values))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(group, of)
    return group


def select(cfg: Config, key: str) -> Any:
    """The value of a dotted key such as ``optim.lr``."""
    return reduce(getattr, key.split("."), cfg)


def with_overrides(cfg: Config, changes: Mapping[str, Any]) -> Config:
    """A copy of a configuration with other values for some dotted keys."""
    copied = copy.deepcopy(cfg)
    for key, value in changes.items():
        select(copied, key)  # AttributeError for a key that isn't one
        group, _, name = key.rpartition(".")
        setattr(select(copied, group) if group else copied, name, value)
    return copied
