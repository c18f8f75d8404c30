"""What the folders that a configuration names say of it, before a weight is read; and the changes that follow from it.

    cfg = with_adapter(cfg)                  # model.base, data.tokenizer and lora as the adapter's folder has them
    cfg = with_vocabulary(cfg, tokenizer)    # model.resize_vocabulary as a number of rows

A run writes the result to its ``config.yaml``: an export from one of its checkpoints needs no tokenizer for it.
"""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from joint_train.config import Config, SourceConfig, with_overrides
from joint_train.config.values import AdapterSpec, adapter_index, as_saved, grown_rows, parse_adapters, parse_served
from joint_train.distributed.ranks import Ranks
from joint_train.errors import ConfigError
from joint_train.weights.changes import Changes, file_digest, mean_rows
from joint_train.weights.folders import read_config, refuse_adapter, resolve
from joint_train.weights.loading import build_meta, check_weights, match, materialize, stored_tensors
from joint_train.weights.peft_folder import FILE, PeftFolder, read_folders
from joint_train.weights.served import read_served
from joint_train.weights.vocabulary import (
    drafter_ordering,
    highest_id,
    rows_needed,
    say_growth,
    table_rows,
    wanted_rows,
)

log = logging.getLogger(__name__)


def read_adapters(cfg: Config) -> list[PeftFolder]:
    """The adapters of ``model.adapter``, in turn. All ranks together.

    Raises:
        ConfigError, WeightsError: for one that can't be had, or is of another kind.
    """

    return read_folders(parse_adapters(cfg.model.adapter), cfg.model.cache_dir, "model.adapter")


def split_adapters(cfg: Config, adapters: list[PeftFolder]) -> tuple[list[PeftFolder], PeftFolder | None]:
    """Of :func:`read_adapters` those that are merged into the base, and the one that is trained on, if one is."""
    return (adapters[:-1], adapters[-1]) if cfg.model.continue_adapter else (adapters, None)


def merged_adapters(cfg: Config) -> list[PeftFolder]:
    """The adapters that are merged into the base, read. All ranks together."""
    return split_adapters(cfg, read_adapters(cfg))[0]


def with_adapter(cfg: Config) -> Config:
    """A configuration with what its adapters say: which base they are for, where it isn't set; the tokenizer that lies
    with the last one; and the rank, scale and layers of one that is trained on. With ``model.adapters`` sources name
    theirs by name, and the tokenizer is the base's.

    Raises:
        ConfigError, WeightsError: as :func:`read_adapters`; for an adapter as ``model.base``, one that names no base
            where that isn't set, and one that can't be trained on.
    """
    refuse_adapter(Path(cfg.model.base or "/no folder"))
    adapters = read_adapters(cfg) or read_served(cfg)
    if not adapters:
        return cfg
    changes: dict[str, Any] = {}
    last = adapters[-1]
    if not cfg.model.base:
        named = {adapter.base for adapter in adapters}
        if len(named) > 1 or None in named:
            raise ConfigError(
                "model.base is not set, and the adapters don't say which one it is: "
                + ", ".join(f"{adapter.folder} names {adapter.base or 'none'}" for adapter in adapters)
            )
        changes["model.base"] = last.base
        if revision := last.config.get("revision"):
            changes["model.revision"] = cfg.model.revision or revision
        log.info("model.base=%s%s, as the adapter says", last.base, f" ({revision})" if revision else "")
    if served := parse_served(cfg.model.adapters):
        for split in ("train", "val"):
            changes[f"data.{split}"] = [_with_name(source, served) for source in getattr(cfg.data, split)]
        return with_overrides(cfg, changes)
    spec = parse_adapters(cfg.model.adapter)[-1]
    if cfg.data.tokenizer is None and (last.folder / "tokenizer_config.json").is_file():
        changes["data.tokenizer"] = spec.path
        log.info("data.tokenizer=%s: the tokenizer and chat template that lie with the adapter", spec.path)
    if cfg.model.continue_adapter:
        changes |= _lora_of(cfg, last)
    return with_overrides(cfg, changes)


def _with_name(source: SourceConfig, served: Sequence[AdapterSpec]) -> SourceConfig:
    """A source that names its adapter by the adapter's name."""
    index = adapter_index(served, source.adapter)
    return dataclasses.replace(source, adapter=None if index < 0 else served[index].name)


def _lora_of(cfg: Config, adapter: PeftFolder) -> dict[str, Any]:
    """The ``lora`` group of an adapter that is trained on."""
    config = adapter.config
    wrong = [name for name in ("rank_pattern", "alpha_pattern", "modules_to_save") if config.get(name)]
    wrong += ["tables of its own"] * bool(adapter.table_rows and not config.get("modules_to_save"))
    wrong += [f"the weight {adapter.weight:g}"] * (adapter.weight != 1)
    if wrong:
        raise ConfigError(
            f"model.continue_adapter=true: {adapter.folder} has {', '.join(wrong)}, which can be merged and not "
            "trained on here. Set model.continue_adapter=false, and lora.r for adapters on top of it."
        )
    if cfg.lora.r not in (0, config["r"]):
        raise ConfigError(
            f"lora.r={cfg.lora.r}: model.continue_adapter=true trains on {adapter.folder}, whose rank is {config['r']}"
            ". Leave lora.r out; or set model.continue_adapter=false to merge it, and train new adapters on top."
        )
    found = {
        "lora.r": config["r"],
        "lora.alpha": float(config["lora_alpha"]),
        "lora.dropout": cfg.lora.dropout or float(config.get("lora_dropout") or 0),
        "lora.rank_stabilized": bool(config.get("use_rslora")),
        "lora.target_modules": adapter.targets,
    }
    log.info(
        "model.continue_adapter: lora.r=%d, lora.alpha=%g, lora.dropout=%g, on %d layers, as in %s",
        found["lora.r"], found["lora.alpha"], found["lora.dropout"], len(adapter.modules), adapter.folder,
    )  # fmt: skip
    return found


def with_vocabulary(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> Config:
    """A configuration with ``model.resize_vocabulary`` as a number of rows, or false where nothing grows.

    Raises:
        ConfigError: for a number that is too small.
    """
    m = cfg.model
    if m.resize_vocabulary is False:
        return cfg
    folder = resolve(m.base, m.revision, m.cache_dir)
    base = read_config(folder, text_config=m.text_config, quantized=as_saved(cfg))
    drafter = read_config(resolve(m.drafter, m.drafter_revision, m.cache_dir))
    used = highest_id(tokenizer) + 1
    needed = rows_needed(base, drafter, max([used, *(adapter.table_rows for adapter in merged_adapters(cfg))]))
    rows = wanted_rows(m.resize_vocabulary, needed)
    if {*table_rows(base), drafter.get_text_config().vocab_size} == {rows}:
        return with_overrides(cfg, {"model.resize_vocabulary": False})
    trained = not (cfg.freeze.base or cfg.freeze.embeddings or cfg.lora.r)
    say_growth(base, drafter, rows, used, trained)
    return with_overrides(cfg, {"model.resize_vocabulary": rows})


def changes_of_base(
    cfg: Config, base: PreTrainedModel, folder: Any, ranks: Ranks, adapters: list[PeftFolder]
) -> Changes:
    """What a settled configuration changes in the base's folder. Collective.

    Args:
        base: on any device, the meta device among them.
        adapters: that are merged into it, see :func:`merged_adapters`.

    Raises:
        WeightsError: for adapters that don't fit.
    """
    changes = Changes(rows=grown_rows(cfg))
    for adapter in adapters:
        deltas, wholes = adapter.changes(base)
        for name, delta in deltas.items():
            changes.deltas.setdefault(name, []).append(delta)
        if again := changes.wholes.keys() & wholes:
            raise ConfigError(f"model.adapter: two adapters hold a whole {min(again)}; only one of them can.")
        changes.wholes |= wholes
    stored = stored_tensors(folder, changes)
    names = match(base, stored, folder)
    if changes.rows is not None:
        wholes = {key: changes.wholes[name] for key, name in names.items() if name in changes.wholes}
        files = {key: stored[key] for key in names}
        mean = functools.partial(mean_rows, files, changes.rows, wholes)
        changes.new_rows = ranks.first(f"reading the tables of {folder}", mean)
    if adapters:
        log.info("merging into the base: %s", ", ".join(f"{a.folder} (weight {a.weight:g})" for a in adapters))
    changes.digest = _digest(changes.rows, adapters)
    return changes


def _digest(rows: int | None, adapters: list[PeftFolder]) -> str:
    if rows is None and not adapters:
        return ""
    of_each = [(file_digest(adapter.folder / FILE), sorted(adapter.scales().items())) for adapter in adapters]
    return hashlib.sha256(repr((rows, of_each)).encode()).hexdigest()


def changes_of_drafter(cfg: Config, drafter: PreTrainedModel, folder: Any, ranks: Ranks) -> Changes:
    """The same of the drafter: only its vocabulary may grow. Collective."""
    changes = Changes(rows=grown_rows(cfg))
    if changes.rows is None:
        return changes
    rows, stored = changes.rows, stored_tensors(folder, changes)
    names = match(drafter, stored, folder)

    def grow() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        means = mean_rows({key: stored[key] for key in names}, rows, {})
        ordering = drafter_ordering(folder, rows, next(iter(means.values()))) if means else {}
        return means, {names[key]: value for key, value in ordering.items()}

    changes.new_rows, changes.wholes = ranks.first(f"reading the tables of {folder}", grow)
    changes.digest = _digest(rows, [])
    return changes


def load_merged(cfg: Config, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    """The whole base of a configuration on one device, all its adapters merged; for generation.

    Its ``name_or_path`` also tells the adapters from others.
    """
    m = cfg.model
    cfg = with_overrides(cfg, {"model.continue_adapter": False})
    folder = resolve(m.base, m.revision, m.cache_dir)
    check_weights(folder)
    config = read_config(folder, text_config=m.text_config, rows=grown_rows(cfg), quantized=as_saved(cfg))
    model = build_meta(config, dtype)
    changes = changes_of_base(cfg, model, folder, Ranks(cfg.parallel.timeout_seconds), merged_adapters(cfg))
    materialize(model, folder, device, changes=changes)
    model.name_or_path = f"{folder} {changes.digest}"
    return model
