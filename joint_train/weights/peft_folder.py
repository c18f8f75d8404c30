"""PEFT's LoRA folders, as ``save_pretrained`` of the peft library and its relatives write them.

    adapter_config.json          r, lora_alpha, what the base is called, …
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight [r, in], ….lora_B.weight [out, r]

A module is named as in the class that the adapters were trained on: of a base with towers it is
``model.language_model.layers…``, of its language model alone ``model.layers…``. Only headers are read here;
:class:`~joint_train.weights.changes.Delta` reads slices.
"""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from joint_train.config.values import AdapterSpec
from joint_train.distributed.lora import REFUSED, folder_tensors
from joint_train.errors import ConfigError, WeightsError
from joint_train.files import LFS_POINTER, is_lfs_pointer
from joint_train.weights.changes import TABLES, Delta, shape_of
from joint_train.weights.folders import resolve
from joint_train.weights.loading import ignored_keys, renamer

log = logging.getLogger(__name__)

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = re.compile(r"^base_model\.model\.")
LORA = re.compile(r"(.+)\.lora_(A|B)\.(?:default\.)?weight")
# What peft's file holds beside whole tensors and LoRA's two matrices.
OTHERS = re.compile(r"lora_embedding_|lora_magnitude|trainable_tokens|lora_[A-Z]*\.(default\.)?bias|\.lora_(?![AB]\.)")
# These change the base's own weights when they begin, so that the saved matrices belong to another base.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters and no model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


@dataclass(frozen=True)
class PeftFolder:
    """One adapter.

    Attributes:
        folder: where it is.
        config: its ``adapter_config.json``.
        weight: factor on what it adds.
        key: that names it in the configuration.
    """

    folder: Path
    config: Mapping[str, Any]
    weight: float = 1.0
    key: str = "model.adapter"

    @property
    def base(self) -> str | None:
        """The base that it names."""
        return self.config.get("base_model_name_or_path") or None

    @cached_property
    def weights(self) -> Any:
        return safe_open(self.folder / FILE, framework="pt")

    @cached_property
    def keys(self) -> dict[str, str]:
        """The file's keys, by the names of tensors in the model that peft wrapped."""
        return {re.sub(PREFIX, "", key): key for key in self.weights.keys()}  # noqa: SIM118

    @property
    def table_rows(self) -> int:
        """The most rows of a table that it holds whole; 0 without one."""
        tables = (key for name, key in self.keys.items() if name.endswith(TABLES))
        return max((shape_of(self.weights.get_slice(key))[0] for key in tables), default=0)

    @property
    def targets(self) -> list[str]:
        """``lora.target_modules`` for the same layers."""
        config, modules = self.config, self.modules
        named = config.get("target_modules")
        narrowed = any(config.get(key) for key in ("layers_to_transform", "layers_pattern", "exclude_modules"))
        if isinstance(named, list) and not narrowed and not any("." in name for name in named):
            return sorted({module.rpartition(".")[2] for module in modules})
        return [re.sub(r".*\b(?=layers\.\d)", "", module) for module in modules]

    @property
    def modules(self) -> list[str]:
        """The linear layers that have an adapter."""
        return sorted({found[1] for name in self.keys if (found := LORA.fullmatch(name))})

    @property
    def numbers(self) -> int:
        """How many there are in its matrices."""
        parts = (self._slice(f"{module}.lora_{part}") for module in self.modules for part in "AB")
        return sum(math.prod(shape_of(part)) for part in parts if part is not None)

    def scales(self) -> dict[str, float]:
        """What the product of each layer's matrices is multiplied by."""
        return {module: self.scale(module, shape_of(self._slice(f"{module}.lora_A"))[0]) for module in self.modules}

    def scale(self, module: str, rank: int) -> float:
        """alpha / r of a layer, or alpha / sqrt(r), times the adapter's weight."""
        alpha = self._of(module, "alpha_pattern", "lora_alpha")
        return self.weight * alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _of(self, module: str, patterns: str, default: str) -> Any:
        """What the configuration says for a layer: by the first pattern that its name ends with, or for all."""
        found = (self.config.get(patterns) or {}).items()
        return next((value for key, value in found if re.fullmatch(rf"(.*\.)?({key})", module)), self.config[default])

    def changes(self, model: PreTrainedModel) -> tuple[dict[str, Delta], dict[str, Any]]:
        """What it adds to weights of a model, and what it has in the place of whole tensors, by the model's names.

        Raises:
            WeightsError: for layers that the model doesn't have, or that have another size there.
        """
        tensors = folder_tensors(model)
        names = Names(model, tensors)
        deltas, wholes, unknown, unused = {}, {}, list[str](), 0
        for module in self.modules:
            name = names.find(f"{module}.weight")
            found = {part: self._slice(f"{module}.lora_{part}") for part in "AB"}
            if None in found.values():
                raise WeightsError(f"{self.folder / FILE} has only one of the two matrices of {module}.")
            (rank, columns), (rows, _) = shape_of(found["A"]), shape_of(found["B"])
            if name is None and names.unused(f"{module}.weight"):
                unused += 1
            elif name is None:
                unknown.append(f"{module}, which the base doesn't have")
            elif rank != (said := self._of(module, "rank_pattern", "r")):
                unknown.append(f"{module} has the rank {rank}, and {CONFIG} says {said}: are they of one training?")
            elif tuple(tensors[name].shape) != (rows, columns):
                unknown.append(f"{module} is [{rows}, {columns}], and in the base {list(tensors[name].shape)}")
            else:
                deltas[name] = Delta(found["A"], found["B"], self.scale(module, rank))
        for key in self.keys:
            if LORA.fullmatch(key):
                continue
            if (whole := names.find(key)) is None:
                unknown.append(f"{key}, which the base doesn't have")
                continue
            view = self.weights.get_slice(self.keys[key])
            if shape_of(view)[1:] != tuple(tensors[whole].shape[1:]):
                unknown.append(f"{key} is {list(shape_of(view))}, and in the base {list(tensors[whole].shape)}")
            elif whole.endswith(TABLES) and shape_of(view)[0] > len(tensors[whole]):
                unknown.append(
                    f"{key} has {shape_of(view)[0]} rows, and in the base {len(tensors[whole])} (set "
                    "model.resize_vocabulary=true)"
                )
            elif not whole.endswith(TABLES) and shape_of(view) != tuple(tensors[whole].shape):
                unknown.append(f"{key} is {list(shape_of(view))}, and in the base {list(tensors[whole].shape)}")
            wholes[whole] = view
        if unknown:
            more = f"; and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise WeightsError(f"{self.key}: {self.folder} doesn't fit the base: {'; '.join(unknown[:5])}{more}.")
        self._check_ties(wholes, tensors)
        if unused:
            log.info("%s: %d layers whose keys and values nothing reads (KV sharing) are left out", self.folder, unused)
        return deltas, self._tied(wholes, tensors)

    def _slice(self, name: str) -> Any:
        key = self.keys.get(f"{name}.weight") or self.keys.get(f"{name}.default.weight")
        return key and self.weights.get_slice(key)

    def _check_ties(self, wholes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """A head that is tied to the embedding in the base has to be so in the adapter."""
        tied = {name: [n for n in tensors if tensors[n] is tensors[name]] for name in wholes}
        for name, names in tied.items():
            values = [wholes[other][:] for other in names if other in wholes]
            if len(values) < len(names) or any(not torch.equal(values[0], value) for value in values[1:]):
                raise WeightsError(
                    f"{self.key}: {self.folder} holds a trained {name} of its own, and the base ties "
                    f"{' and '.join(names)}: a folder with such a tie can't hold both. Merge it with peft into a base "
                    "without tie_word_embeddings, or train the adapter again with ensure_weight_tying=True."
                )

    def _tied(self, wholes: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {other: view for name, view in wholes.items() for other in tensors if tensors[other] is tensors[name]}


class Names:
    """The names of a model's tensors by those in an adapter's file."""

    def __init__(self, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
        self.model, self.tensors, self.rename = model, tensors, renamer(model, tensors)
        embedding = next(name for name in tensors if name.endswith("embed_tokens.weight"))
        self.text = embedding.removesuffix("embed_tokens.weight")

    def find(self, name: str) -> str | None:
        """The model's name; None if it has no such tensor."""
        inside = re.sub(r"^(model\.|language_model\.)*", "", name)  # of the language model alone
        return next((n for n in (name, self.rename(name), self.text + inside) if n in self.tensors), None)

    def adapter_key(self, key: str) -> str:
        """A key of an adapter's file as the model's own export has it; the same where the model has no such layer."""
        found = LORA.fullmatch(re.sub(PREFIX, "", key))
        name = found and self.find(f"{found[1]}.weight")
        return f"base_model.model.{name.removesuffix('.weight')}.lora_{found[2]}.weight" if found and name else key

    def unused(self, name: str) -> bool:
        """Whether the model knows such a tensor and never reads it."""
        return bool(ignored_keys(self.model, [name]))


def read_adapter(folder: Path, weight: float = 1.0, key: str = "model.adapter") -> PeftFolder:
    """An adapter's folder, its kind checked.

    Raises:
        ConfigError: if it is none, or of a kind that isn't plain LoRA on linear layers.
        WeightsError: if its file can't be read.
    """
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        kind = config.get("peft_type")
    except FileNotFoundError:
        inner = ", ".join(str(file.parent) for file in sorted(folder.glob(f"*/{CONFIG}")))
        raise ConfigError(
            f"{key}: {folder} has no {CONFIG}: give "
            + (f"one of the adapters in it: {inner}." if inner else "a folder that peft wrote.")
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{key}: {folder / CONFIG} can't be read: {error}") from None
    if kind != "LORA":
        raise ConfigError(f"{key}: {folder} is of the kind {kind}; only LORA can be merged or trained on.")
    for name in ("r", "lora_alpha"):
        if isinstance(config.get(name), bool) or not isinstance(config.get(name), int | float):
            raise ConfigError(f"{key}: {folder / CONFIG} has {name}={config.get(name)!r}, which isn't a number.")
    own = (*(name for name in REFUSED if name != "modules_to_save"),)  # whole tensors are taken as they are
    wrong = [f"{name}={config[name]!r}" for name in own if config.get(name)]
    wrong += [f"bias={config['bias']!r}"] * (config.get("bias", "none") != "none")
    how = config.get("init_lora_weights")
    wrong += [f"init_lora_weights={how!r}"] * (isinstance(how, str) and how.startswith(CHANGE_THE_BASE))
    if not (folder / FILE).is_file():
        pickled = " (adapter_model.bin is pickled: save it again with safe_serialization=True)"
        raise WeightsError(
            f"{key}: {folder} has no {FILE}{pickled if (folder / 'adapter_model.bin').exists() else ''}."
        )
    found = PeftFolder(folder, config, weight, key)
    try:
        wrong += sorted({match[0] for name in found.keys if (match := OTHERS.search(name))})
    except Exception as error:
        why = LFS_POINTER if is_lfs_pointer(folder / FILE) else error
        raise WeightsError(f"can't read {folder / FILE}: {why}") from error
    if wrong:
        raise ConfigError(
            f"{key}: {folder} has {', '.join(wrong)}: only plain LoRA on linear layers can be taken up here. "
            "Merge it with peft's merge_and_unload, and give the merged folder as model.base."
        )
    return found


def read_folders(specs: Sequence[AdapterSpec], cache_dir: str | None, key: str) -> list[PeftFolder]:
    """:func:`read_adapter` of each, downloaded if need be. All ranks together."""
    return [read_adapter(resolve(spec.path, spec.revision, cache_dir), spec.weight, key) for spec in specs]
