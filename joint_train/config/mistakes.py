"""What is wrong with the words of a command line, in one sentence each, before Hydra would say it in its own."""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from joint_train.config.help import ADDED, SOURCES, choices, groups, keys
from joint_train.config.schema import RENAMED, Config, SourceConfig
from joint_train.config.values import quoted
from joint_train.errors import ConfigError

# What axolotl, TRL (transformers) and LLaMA-Factory call a key of ours.
ELSEWHERE = {
    "base_model": "model.base",
    "model_name_or_path": "model.base",
    "attn_implementation": "model.attn_implementation",
    "flash_attention": "model.attn_implementation",
    "flash_attn": "model.attn_implementation",
    "adapter_name_or_path": "model.adapter",
    "lora_model_dir": "model.adapter",
    "resize_vocab": "model.resize_vocabulary",
    "resize_token_embeddings_to_32x": "model.resize_vocabulary",
    "datasets": "data.train",
    "dataset": "data.train",
    "train_file": "data.train",
    "eval_dataset": "data.val",
    "test_datasets": "data.val",
    "dataset_prepared_path": "data.cache_dir",
    "sequence_len": "data.max_length",
    "max_length": "data.max_length",
    "max_seq_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "sample_packing": "data.packing",
    "packing": "data.packing",
    "micro_batch_size": "data.micro_batch_size",
    "batch_size": "data.micro_batch_size",
    "per_device_train_batch_size": "data.micro_batch_size",
    "dataloader_num_workers": "data.num_workers",
    "gradient_accumulation_steps": "optim.grad_accum",
    "learning_rate": "optim.lr",
    "lr": "optim.lr",
    "lr_scheduler": "optim.schedule",
    "lr_scheduler_type": "optim.schedule",
    "warmup_steps": "optim.warmup_steps",
    "weight_decay": "optim.weight_decay",
    "max_grad_norm": "optim.max_grad_norm",
    "optimizer": "optim.name",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep_last",
    "resume_from_checkpoint": "resume",
    "eval_steps": "eval.every",
    "logging_steps": "tracking.log_every",
    "report_to": "tracking.wandb",
    "wandb_project": "tracking.project",
    "run_name": "tracking.name",
    "gradient_checkpointing": "activation_checkpointing.base",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
}
SOURCE_ELSEWHERE = {
    "file": "path",
    "file_name": "path",
    "data_files": "path",
    "hf_hub_url": "path",
    "type": "format",
    "formatting": "format",
    "ratio": "weight",
    "probability": "weight",
    "num_samples": "limit",
    "max_samples": "limit",
}
FILES = "given_file"  # the group under which Hydra finds the files of --config
MANY = 8  # names in one message
HOME = re.compile(r"^([^=]+=)(~(?:/.*)?)$")  # shells leave a ~ after the = as it is
EXPECTED = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}


def check_overrides(words: Sequence[str]) -> list[str]:
    """The overrides of a command line as Hydra takes them: a file alone becomes a source of ``data.train``.

    Raises:
        ConfigError: for a word that is no override, and for a key that doesn't exist.
    """
    checked = []
    for word in words:
        word = HOME.sub(lambda found: f"{found[1]}{quoted(Path(found[2]).expanduser())}", word)
        override = _parse(word)
        name = override.key_or_group
        if name.startswith("hydra") or override.package is not None:
            checked.append(word)
            continue
        if override.is_delete() and "." in name:
            raise ConfigError(f"{word}: a key can't be taken away; set it to another value, e.g. to its default")
        if name in SOURCES and not override.is_sweep_override():
            word = _with_sources(word, override)
        elif f"+{name}" in choices() and not override.is_add():
            raise ConfigError(f"{word}: a prepared setting that is added to the others begins with a +: +{word}")
        elif name not in choices() and not (override.is_add() and "." not in name):  # a group of the user's own
            _check_key(name)
        checked.append(word)
    return checked


def check_file(file: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The keys of a configuration file; a data file alone is a source, as on the command line.

    Raises:
        ConfigError: for a key that doesn't exist.
    """

    def check(node: dict, path: str) -> None:
        for name, value in list(node.items()):
            key = f"{path}{name}"
            try:
                if "." in str(name):
                    outer, _, inner = str(name).partition(".")
                    raise ConfigError(f"{key}: a file has groups in place of dots: `{outer}: {{{inner}: …}}`")
                _check_key(key)
                if value is None and key in groups():  # all its keys are commented out
                    del node[name]
            except ConfigError as error:
                raise ConfigError(f"--config {file}: {error}") from None
            if isinstance(value, dict):
                check(value, f"{key}.")

    given = {name: dict(value) if isinstance(value, dict) else value for name, value in given.items()}
    check(given, "")
    if isinstance(data := given.get("data"), dict):
        for split in (name.partition(".")[2] for name in SOURCES):
            if (sources := data.get(split)) is None:
                continue
            sources = sources if isinstance(sources, list) else [sources]
            for index, source in enumerate(sources):
                if isinstance(source, dict):
                    check(source, f"data.{split}.{index}.")
            data[split] = [{"path": source} if isinstance(source, str) else source for source in sources]
    return given


def explained(error: HydraException | OmegaConfBaseException) -> ConfigError:
    """An error of Hydra's composition as one sentence."""
    said, cause = str(error).splitlines(), error.__cause__ or error.__context__
    if isinstance(error, MissingConfigException) and (missing := re.search(r"Could not find '(.+?)/(.+)'", said[0])):
        return ConfigError(_no_choice(missing[1], missing[2], error.options or []))
    if isinstance(error, ConfigCompositionException) and said[0].startswith("Ambiguous value for argument"):
        argument = said[0].partition("'")[2].rstrip("'")
        return ConfigError(
            f"{argument}: one value is expected. A list is written KEY=[A,B], a text with a comma in quotes"
        )
    if isinstance(cause, OmegaConfBaseException):
        given = said[0].removeprefix("Error merging override ").rstrip(".")
        key, in_file = cause.full_key or "", ""
        if found := re.match(r"In '((.+?)/.+)':", said[0]):
            in_file = f"{found[1]}.yaml: "
            if key == found[2]:
                return ConfigError(f"{in_file}its keys are those of the whole configuration: begin it with the line "
                                   "`# @package _global_`")  # fmt: skip
            in_file = "the file of --config: " if found[2] == FILES else in_file
            value = re.match(r"Value '(.*)' of type", str(cause))
            given = f"{in_file}{key}={value[1] if value else 'null'}"
        if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
            return ConfigError(f"{in_file}{not_a_key(key)}")
        if (expected := _expected(key, cause.object_type)) is not None:
            where = "" if given.startswith(f"{in_file}{key}=") else f"{key}: "
            return ConfigError(f"{given}: {where}{expected} is expected")
        return ConfigError(f"{given}: {str(cause).splitlines()[0]}")
    if there := re.match(r"Could not append to config. An item is already at '(.+)'", said[0]):
        return ConfigError(f"+{there[1]}: this key is there already: leave out the +")
    return ConfigError(said[0])


def not_a_key(name: str, of: type = Config) -> str:
    """The sentence about a key that doesn't exist, with what may have been meant and where the keys are listed."""
    group, _, last = name.rpartition(".")
    if of is not Config:  # a source
        fields = [field.name for field in dataclasses.fields(of)]
        meant = SOURCE_ELSEWHERE.get(last) or _closest(last, fields)
        return f"{name} is not a key.{_hint(meant)} Known here: {', '.join(fields)}."
    known = {key for one in groups() for key, _, _ in keys(one)}
    meant = ELSEWHERE.get(last) if group in ("", *groups()) else None
    meant = meant or _closest(name, known if group else known | set(groups())) or _same_name(last, known)
    listed = group.partition(".")[0] if group.partition(".")[0] in groups() else "all"
    return f"{name} is not a key.{_hint(meant)} `--help {listed}` lists them."


def _hint(meant: str | None) -> str:
    return f" Did you mean {meant}?" if meant else ""


def _parse(word: str) -> Override:
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        pass
    if word.endswith((".yaml", ".yml")) and "=" not in word:
        raise ConfigError(f"{word} is not KEY=VALUE. A configuration file is given with --config: --config {word}")
    key, equals, value = word.partition("=")
    if word.startswith("-"):
        dashes = f", without dashes: {word.lstrip('-')}" if equals else ""
        raise ConfigError(f"{word} is not an option of this command; a setting is written KEY=VALUE{dashes}")
    if not equals:
        raise ConfigError(f"{word!r} is not KEY=VALUE, which every setting is, e.g. optim.lr=1e-5")
    if re.search(r"\s[\w.+]+=", value):
        raise ConfigError(f"{word!r} holds several settings in one word: quote each for itself, or none")
    if dotted := re.match(r"([\w.]+)\[(\d+)\]([\w.]*)$", key):
        raise ConfigError(f"{word}: items of a list are written with dots: {dotted[1]}.{dotted[2]}{dotted[3]}={value}")
    if value.count("[") + value.count("{") > value.count("]") + value.count("}"):
        raise ConfigError(
            f"{word}: a bracket isn't closed. If the shell took the setting apart at a space, put all of it in single "
            "quotes, as in 'data.train=[{path: train.jsonl}]'"
        )
    raise ConfigError(
        f"{key}={value}: Hydra can't read this value. A text with special characters needs quotes inside those of the "
        f"shell: '{key}=\"{value}\"'"
    ) from None


def _check_key(name: str) -> None:
    """Raise a ConfigError for a dotted key that is not in the schema."""
    of: Any = Config
    path = ""
    for part in name.split("."):
        path = f"{path}.{part}" if path else part
        if of is Any or get_origin(of) is dict or path in RENAMED:
            return
        if get_origin(of) is list:
            (of,) = get_args(of)
            continue
        fields = {field.name: field.type for field in dataclasses.fields(of)} if dataclasses.is_dataclass(of) else {}
        if part not in fields:
            path = re.sub(r"\.(\d+)", r"[\1]", path)
            raise ConfigError(not_a_key(path, SourceConfig) if of is SourceConfig else not_a_key(name))
        of = _without_none(fields[part])


def _with_sources(word: str, override: Override) -> str:
    """``data.train=FILE`` and ``data.train=[FILE,…]`` with each file as a source."""
    value: Any = override.value()
    given = value if isinstance(value, list) else [value]
    for index, source in enumerate(given):
        for name in source if isinstance(source, dict) else ():
            _check_key(f"{override.key_or_group}.{index}.{name}")
    if value is None or not all(isinstance(source, str) for source in given):
        return word
    plus = "++" if override.is_force_add() else "+" * override.is_add()
    return f"{plus}{override.key_or_group}=[{', '.join(f'{{path: {quoted(source)}}}' for source in given)}]"


def _no_choice(group: str, name: str, names: Sequence[str]) -> str:
    """`names`: those that Hydra found, those of a folder of the user's own among them."""
    hint = _hint(_closest(name, names))
    if group == "model":
        return (
            f"model={name}: model= takes a prepared name ({', '.join(names)}).{hint} For folders or hub ids give "
            "pair=DIR, or model.base=… and model.drafter=…"
        )
    if group == FILES:
        instead = name.replace("/", ": ")
        return f"--config: a file's defaults list doesn't find {name}: write `{instead}` without the list"
    if group == "data" and re.search(r"[./]", name):
        hint = f" For a file: data.train={name}."
    if not hint and len(names) > MANY:
        names = [known for known in names if known.startswith(name)] or names
        some = ", ".join(names[:MANY]) + (", …" if len(names) > MANY else "")
        return f"{group}={name}: there is no such prepared setting. Known are {some}; `--help {group}` lists all."
    known = "" if hint and len(names) > MANY else f" Known here: {', '.join(names) or 'none'}."
    own = f" --config-dir DIR adds your own, DIR/{group}/NAME.yaml." if group in ADDED else ""
    return f"{group}={name}: there is no such prepared setting.{hint}{known}{own}"


def _expected(key: str, of: Any) -> str | None:
    """What kind of value a key takes, in words; ``None`` for a key that isn't found."""
    path = re.sub(r"\[\d+\]", "", key)
    node: Any = SourceConfig if of is SourceConfig and "." not in path else Config
    for part in path.split("."):
        if get_origin(node) is list:
            (node,) = get_args(node)
        if not dataclasses.is_dataclass(node):
            return None
        node = _without_none({field.name: field.type for field in dataclasses.fields(node)}.get(part))
    if get_origin(node) is list and key.endswith("]") and path not in SOURCES:
        (node,) = get_args(node)
    if path in SOURCES:
        whole = "[" not in key
        return "a list of sources, e.g. [{path: train.jsonl}]," if whole else "a source, e.g. {path: train.jsonl},"
    if dataclasses.is_dataclass(node):
        return f"a group of keys ({path}.…, see `--help {path}`)"
    return {list: "a list", dict: "a dictionary, e.g. {a: 1},"}.get(get_origin(node) or node) or EXPECTED.get(node)


def _without_none(of: Any) -> Any:
    if get_origin(of) is UnionType:
        (of,) = (one for one in get_args(of) if one is not NoneType)
    return of


def _closest(name: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name.lower(), sorted(known), 1, 0.75)), None)


def _same_name(last: str, known: Iterable[str]) -> str | None:
    """A key whose own name is this one or nearly this one, whatever its group."""
    by_name = {key.rpartition(".")[2]: key for key in sorted(known, reverse=True)}
    return by_name.get(_closest(last, by_name) or "")
