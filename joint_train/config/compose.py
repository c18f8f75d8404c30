"""From the files of ``conf/`` and the command line to the typed, checked configuration."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from joint_train.command import Parser
from joint_train.config.checks import validate
from joint_train.config.help import choices, conf_dir
from joint_train.config.mistakes import FILES, check_file, check_overrides, explained
from joint_train.config.schema import Config
from joint_train.config.typed import to_dataclasses
from joint_train.errors import ConfigError

# Hydra's own options: those that are followed by a value, and the others.
WITH_VALUE = ("-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir", "-p", "--package", "-c", "--cfg")
FLAGS = ("--hydra-help", "--resolve", "-r", "--run", "-sc", "--shell-completion", "-i", "--info")


def load(
    overrides: Sequence[str] = (), world_size: int | None = None, node: int | None = None, check: bool = True
) -> Config:
    """Compose ``conf/config.yaml`` with command-line overrides, and validate the result.

    Args:
        overrides: as on the command line, ``--config FILE`` and ``--config-dir DIR`` included.
        world_size, node: as for :func:`validate`.
        check: whether to validate; a command that needs neither a drafter nor sources leaves it out.

    Raises:
        ConfigError: for an unknown key or a wrong type; as :func:`to_dataclasses` and :func:`validate`.
    """
    parser = Parser(prog="joint_train", add_help=False, allow_abbrev=False)
    parser.add_argument("-cd", "--config-dir", type=Path, action="append", default=[])
    options, words = parser.parse_known_args(with_files(overrides))
    words = check_overrides(words)
    _check_folders(options.config_dir)
    if options.config_dir:
        words.append(f"hydra.searchpath=[{','.join(f'file://{folder.absolute()}' for folder in options.config_dir)}]")
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            composed = compose("config", words)
    except (HydraException, OmegaConfBaseException) as error:
        raise explained(error) from error
    cfg = to_dataclasses(composed)
    if check:
        validate(cfg, world_size, node)
    return cfg


def composed_by_hydra(composed: DictConfig) -> Config:
    """What ``hydra.main`` hands over, as :func:`load` makes it: typed, and validated for the launcher's ranks."""
    cfg = to_dataclasses(composed)
    validate(cfg, world_size_from_env())
    return cfg


def join_options(words: Sequence[str]) -> list[str]:
    """A command line with ``--config FILE`` and ``--config-dir DIR`` as one word each, ``--config=FILE``: a parser that
    doesn't know them leaves the whole to :func:`load`."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] in ("--config", "--config-dir"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def with_files(words: Sequence[str]) -> list[str]:
    """A command line where each ``--config FILE`` is the override by which Hydra finds that file, before all others: a
    file changes what is prepared, and single settings change the file.

    Raises:
        ConfigError: for a file that can't be read, and for its keys that don't exist.
    """
    parser = Parser(prog="joint_train", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path, action="append", default=[])
    options, words = parser.parse_known_args(list(words))
    for number, file in enumerate(options.config):
        _store(file, f"file{number}")
    given = ",".join(f"file{number}" for number in range(len(options.config)))
    return [*([f"+{FILES}=[{given}]"] if given else []), *words]


def checked_command_line(words: Sequence[str]) -> list[str]:
    """The command line of the main job for Hydra: overrides checked, Hydra's own options as they are."""
    words, options, checked = with_files(words), list[str](), list[str]()
    for index, word in enumerate(words):
        before, option = words[index - 1] if index else "", word.partition("=")[0]
        if word in ("-m", "--multirun"):
            raise ConfigError(
                "--multirun would train all its runs in one process and one output_dir. Start a command for each, "
                "e.g. `for lr in 1e-5 3e-5; do torchrun … -m joint_train optim.lr=$lr output_dir=outputs/lr-$lr; "
                "done`; on Slurm `python -m launch.submit --multirun … -- optim.lr=1e-5,3e-5` submits a job for each."
            )
        if before in ("-cd", "--config-dir") or option == "--config-dir":
            _check_folders([Path(word.partition("=")[2] or word)] if word != "--config-dir" else [])
        if option in (*WITH_VALUE, *FLAGS) or before in WITH_VALUE:
            options.append(word)
        else:
            checked += check_overrides([word])
    return [*options, *checked]  # its parser takes no override after an option that follows one


def _check_folders(folders: Sequence[Path]) -> None:
    """Raise a ConfigError for a folder of --config-dir that isn't there, which Hydra passes over."""
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"--config-dir {folder}: there is no such folder")


def _store(file: Path, name: str) -> None:
    try:
        given: Any = OmegaConf.to_container(OmegaConf.load(file))  # its YAML has 1e-5 as a number, and no key twice
    except OSError as error:
        why = error.strerror or "keys with values are expected, as in docs/configuration.md"
        raise ConfigError(f"--config {file}: {why}") from None
    except (ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        mark, said = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error).splitlines()[0]
        where = f"line {mark.line + 1}: " if mark else ""
        tab = " (indent with spaces, not with tabs)" if "'\\t'" in said else ""
        raise ConfigError(f"--config {file}: this is not YAML: {where}{said}{tab}") from None
    if not isinstance(given, dict) or not given:
        raise ConfigError(f"--config {file}: keys with values are expected, as in docs/configuration.md")
    defaults: list[Any] = given.pop("defaults", [])
    for group in choices():  # a prepared setting, e.g. model: gemma4_e4b
        if isinstance(given.get(name_in_file := group.lstrip("+")), str):
            defaults.append(
                {group.replace("+", "/") if "+" in group else f"override /{group}": given.pop(name_in_file)}
            )
    node = check_file(file, given) | {"defaults": [*defaults, "_self_"]}
    ConfigStore.instance().store(group=FILES, name=name, node=node, package="_global_")


def world_size_from_env() -> int:
    """The number of ranks that the launcher (torchrun) announced; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))
