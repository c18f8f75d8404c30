"""What the ranks of a run compare before they train: their configuration and their data; weights when they load."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from joint_train.config import Config
from joint_train.data import BatchLoader
from joint_train.data.readers import local_files, sources_of
from joint_train.distributed.agreement import agree, differing
from joint_train.distributed.ranks import Ranks
from joint_train.errors import ConfigError

# Where a node has its files is its own affair: their contents are compared.
PLACES = {"pair", "model.base", "model.drafter", "model.cache_dir", "data.tokenizer", "data.cache_dir"}

ADAPTER = re.compile(r"model\.adapters?(\[\d+\])?(\.path)?")


def agree_on_configuration(cfg: Config, ranks: Ranks) -> None:
    """Compare every key but those that only say where a node has its files. Collective.

    Raises:
        ConfigError: on every rank, naming the keys, not their values: those may be secrets.
    """
    values = dict(_flat(dataclasses.asdict(cfg)))
    values = {key: value for key, value in values.items() if key not in PLACES and not ADAPTER.fullmatch(key)}
    values = {key: value for key, value in values.items() if not (key.startswith("data.") and key.endswith("].path"))}
    agree(ranks, "configuration", {key: _digest(json.dumps(value, default=str)) for key, value in values.items()})


def agree_on_data(cfg: Config, split: str, loader: BatchLoader, ranks: Ranks) -> None:
    """Compare the sources of a loader: contents, tokenizer and template. Collective.

    Raises:
        ConfigError: on every rank, naming the ranks and the files that differ.
    """
    specs = sources_of(cfg.data, split)
    names = [f"data.{split}[{index}] {name}" for index, name in enumerate(loader.source_names)]
    keys = [source.key for source in loader.dataset.sequence.sources]
    paths = {name: spec.path for name, spec in zip(names, specs, strict=True)}
    problems = differing(ranks, "data", dict(zip(names, keys, strict=True)), paths)
    if not problems:
        return
    digests, files = {}, {}
    for name, spec in zip(names, specs, strict=True):
        for number, file in enumerate(local_files(spec) if name in problems else ()):
            with open(file, "rb") as stream:
                digests[f"file {number} of {name}"] = hashlib.file_digest(stream, "sha256").hexdigest()
            files[f"file {number} of {name}"] = file
    agree(ranks, "data", digests, files)
    raise ConfigError(  # the files are the same
        f"the ranks were not started with the same data: {'; '.join(problems.values())}. Their files are the same, so "
        "the tokenizer, its chat template or the versions of transformers and tokenizers differ: install the same on "
        "every node"
    )


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in _flat(item, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list) and value:
        return [leaf for index, item in enumerate(value) for leaf in _flat(item, f"{prefix}[{index}]")]
    return [(prefix, str(value) if isinstance(value, Path) else value)]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
