"""Where a model's folder is, and what its ``config.json`` says: no weight is read here."""

import copy
import functools
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch.distributed as dist
from huggingface_hub import snapshot_download
from transformers import (
    CONFIG_MAPPING,
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedAssistantForCausalLM,
    Gemma4UnifiedForCausalLM,
    Gemma4UnifiedForConditionalGeneration,
    PreTrainedConfig,
)

from joint_train.config import Config
from joint_train.config.values import as_saved, grown_rows
from joint_train.distributed.ranks import run_on_all_ranks
from joint_train.errors import ConfigError
from joint_train.files import LFS_POINTER, is_lfs_pointer
from joint_train.pair.compatibility import check_pair
from joint_train.weights import placing, quantised

log = logging.getLogger(__name__)

BASES = {
    "gemma4": Gemma4ForConditionalGeneration,
    "gemma4_text": Gemma4ForCausalLM,
    "gemma4_unified": Gemma4UnifiedForConditionalGeneration,
    "gemma4_unified_text": Gemma4UnifiedForCausalLM,
}
DRAFTERS = {
    "gemma4_assistant": Gemma4AssistantForCausalLM,
    "gemma4_unified_assistant": Gemma4UnifiedAssistantForCausalLM,
}
# The text model alone of a base with towers.
TEXT_MODELS = {"gemma4": "gemma4_text", "gemma4_unified": "gemma4_unified_text"}
# Text settings that the configuration classes take apart when they are built, so that no attribute shows them.
TEXT_INPUTS = {"global_head_dim", "num_global_key_value_heads", "rope_theta"}
# Further options of a download; they are in no run's configuration, which is written to files.
HUB_OPTIONS = {"token", "local_files_only", "force_download"}
# What a training run needs of a hub repository: weights in other formats can be as large again.
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*", "NOTICE*"]
HUB_IGNORED = ["*/*.safetensors", "*/*.json"]  # a trainer's checkpoints, each as large as the model


WEIGHTS = re.compile(r"\.safetensors(\.index\.json)?$")


def resolve(
    path: str | os.PathLike,
    revision: str | None = None,
    cache_dir: str | None = None,
    hub: dict[str, Any] | None = None,
) -> Path:
    """The local folder of a model: the folder itself, or a hub repository's snapshot, downloaded if need be.

    Under a process group all ranks must call it: the first rank of each node downloads, the others wait for it.

    Args:
        hub: those of :data:`HUB_OPTIONS` that are given.

    Raises:
        ConfigError: for a folder that doesn't exist, or a repository that can't be had; on every rank alike.
        WeightsError: for a folder of an export that was never finished, or whose weights were changed since.
    """
    if Path(path).is_dir():
        placing.check(Path(path))
        return Path(path)
    name = os.fspath(path)
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise ConfigError(
            f"there is no folder {name}. Give an existing folder, or a hub id such as google/gemma-4-E2B-it."
        )
    options: dict[str, Any] = {
        "revision": revision,
        "cache_dir": cache_dir,
        "allow_patterns": HUB_FILES,
        "ignore_patterns": HUB_IGNORED,
    }
    first = not dist.is_initialized() or dist.get_node_local_rank(fallback_rank=0) == 0
    _say_download(name)
    try:
        run_on_all_ranks(lambda: snapshot_download(name, **options, **(hub or {})) if first else None)
    except Exception as e:
        raise ConfigError(
            f"there is no folder {name}, and it can't be had from the hub (revision {revision or 'main'}): "
            f"{_reason(e)}. Without network, give a local folder or a model.cache_dir that has the snapshot."
        ) from e
    folder = Path(snapshot_download(name, local_files_only=True, **options))
    placing.check(folder)
    return folder


def _reason(error: Exception) -> str:
    """What the hub's client says, without its advice."""
    said = str(error).strip().splitlines() or [type(error).__name__]
    return said[0].removeprefix("Got: ").rstrip(".:")[:300]


@functools.cache  # once
def _say_download(name: str) -> None:
    log.info("getting %s from the hub, unless the cache has it", name)


def model_type(folder: Path) -> str | None:
    """The ``model_type`` of a folder's config.json, if it has one that can be read."""
    try:
        return json.loads((folder / "config.json").read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def inner_folders(path: str | os.PathLike) -> str:
    """A sentence that names the folders of models inside a folder, as trainers leave them there; or nothing."""
    found = []
    for depth in ("*", "*/*", "*/*/*"):  # Trainer's checkpoint-500, NeMo's epoch_0_step_99/model/consolidated
        for config in sorted(Path(path).glob(f"{depth}/config.json")) if Path(path).is_dir() else ():
            if any(WEIGHTS.search(file.name) for file in config.parent.iterdir()):
                found.append(str(config.parent))
    return f" There are models in it: {', '.join(found[-5:])}." if found else ""


def other_weights(folder: Path) -> str:
    """A sentence on the weights in other formats that a folder without safetensors has, and what to do with them."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    advice = {
        r"pytorch_model.*\.bin$": "its pytorch_model.bin runs code when it is read. Save the model again from "
        "transformers, which writes safetensors: from_pretrained(…).save_pretrained(…)",
        r"pytorch_model_fsdp": "it has FSDP's shards: `accelerate merge-weights {inner} OUT` puts them together",
        r"global_step\d+$": "it has DeepSpeed's shards: its zero_to_fp32.py puts them together, with "
        "--safe_serialization",
        r"\.incomplete$": "{inner} was never downloaded to its end: download the model again",
        r"^model-\d+-of-\d+\.safetensors$": "it has shards, and no index that says what is in which: copy "
        "model.safetensors.index.json there from where they come from",
        r"\.safetensors$": "it has {inner}: call it model.safetensors if that is the model",
        r"\.distcp$": "it has torch.distributed.checkpoint's shards: export the model with the program that wrote them",
        r"mmproj.*\.gguf$": "it has a GGUF file of the towers alone (mmproj): give that of the language model",
    }
    if gone := next((folder / name for name in names if not (folder / name).exists()), None):
        return f" {gone} is a link to {os.readlink(gone)}, which isn't there: download the model again."
    for pattern, what in advice.items():
        if inner := next((name for name in names if re.search(pattern, name)), None):
            return f" Instead {what.format(inner=folder / inner)}.{inner_folders(folder)}"
    return inner_folders(folder)


def read_config(
    path: str | os.PathLike,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    text_config: dict[str, Any] | None = None,
    rows: int | None = None,
    quantized: bool | None = False,
) -> PreTrainedConfig:
    """Configuration of one model from its folder or hub id, without how its weights are quantised.

    Args:
        text_config: values that replace those of the folder's text configuration.
        rows: of the vocabulary's tables, where they are to be others than the folder's.
        quantized: whether its weights must be quantised (``model.quantization=as_saved``), or mustn't; None: either.

    Raises:
        ConfigError: if there is none, its weights are quantised where they mustn't be, or in a way that isn't known, or
            `text_config` has a key that Gemma 4's text configuration hasn't.
    """
    try:
        raw, _ = PreTrainedConfig.get_config_dict(path, revision=revision, cache_dir=cache_dir)
    except (OSError, TypeError, ValueError) as e:
        pointer = is_lfs_pointer(Path(path) / "config.json")
        raise ConfigError(f"no model configuration at {path}: {f'config.json: {LFS_POINTER}' if pointer else e}") from e
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} has a config.json that isn't an object.")
    if not raw:
        refuse_adapter(Path(path))
        raise ConfigError(
            f"{path} has no config.json: give a folder that save_pretrained wrote, or a hub id.{inner_folders(path)}"
        )
    kind = raw.get("model_type")
    if kind not in BASES and kind not in DRAFTERS:
        raise ConfigError(
            f"{path} is a {kind} model; a base is one of {', '.join(BASES)}, a drafter one of {', '.join(DRAFTERS)}."
        )
    raw = _without_quantization(raw, path, quantized)
    kind = raw["model_type"]
    if rows is not None:
        text_config = {**(text_config or {}), **vocabulary_settings(kind, rows)}
    config_class = CONFIG_MAPPING[kind]
    try:
        config = config_class.from_dict(copy.deepcopy(raw))
    except Exception as e:  # each class checks its values in its own way
        raise ConfigError(f"{path} has a config.json that transformers refuses: {' '.join(str(e).split())}") from e
    if text_config:
        text = config.get_text_config()
        if unknown := sorted(key for key in text_config if key not in TEXT_INPUTS and key not in text.to_dict()):
            raise ConfigError(f"model.text_config: {type(text).__name__} has no {', '.join(unknown)}.")
        (raw["text_config"] if "text_config" in raw else raw).update(text_config)
        try:
            config = config_class.from_dict(raw)
        except (ValueError, TypeError) as e:
            raise ConfigError(f"model.text_config={text_config} doesn't fit {path}: {e}") from e
    config._name_or_path = os.fspath(path)
    return config


def _without_quantization(raw: dict[str, Any], path: str | os.PathLike, wanted: bool | None) -> dict[str, Any]:
    """A configuration without how the weights are quantised; of a GGUF file, that of the text model, which it holds.

    Raises:
        ConfigError: if they are quantised and mustn't be, or the other way round, or in a way that isn't known.
    """
    raw = copy.deepcopy(raw)
    inner = raw.get("text_config") or {}
    found = [part.pop("quantization_config", None) for part in (raw, inner)]
    local = quantised.quantization_config(Path(path)) if Path(path).is_dir() else None
    config = next((part for part in (*found, local) if part), None)
    drafter = raw["model_type"] in DRAFTERS
    if config is None:
        if wanted and not drafter:
            raise ConfigError(
                f"model.quantization=as_saved, and {path} holds no quantised weights (its config.json has no "
                "quantization_config): leave out model.quantization, or give the quantised folder."
            )
        return raw
    if drafter or wanted is False:
        advice = (
            "give the bfloat16 folder that it was made from"
            if drafter
            else "set model.quantization=as_saved, with freeze.base=true or adapters (lora.r), to train its drafter; "
            "or give the bfloat16 folder that it was made from, and quantise the export after training"
        )
        raise ConfigError(
            f"{path} holds quantised weights ({quantised.describe(config)}), which can't be trained: {advice}."
        )
    quantised.check_format(config, path)
    if config["quant_method"] == "gguf" and raw["model_type"] in TEXT_MODELS:
        raw = {**inner, "model_type": TEXT_MODELS[raw["model_type"]]}
    return raw


def refuse_adapter(folder: Path) -> None:
    """Say what to set where a model's folder holds adapters alone.

    Raises:
        ConfigError: if it does.
    """
    if not (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
        return
    try:
        base = json.loads((folder / "adapter_config.json").read_bytes())["base_model_name_or_path"] or "BASE"
    except (OSError, ValueError, KeyError, TypeError):
        base = "BASE"
    raise ConfigError(
        f"{folder} holds adapters (PEFT) on {base}, and no model: set model.base={base} model.adapter={folder}. If "
        "that base has moved, model.base is where it is now."
    )


def vocabulary_settings(kind: str, rows: int) -> dict[str, int]:
    """The text settings of a model of this type whose vocabulary's tables have so many rows."""
    tables = ("vocab_size", "vocab_size_per_layer_input") if kind in BASES else ("vocab_size",)
    return dict.fromkeys(tables, rows)


def read_configs(
    base: str | os.PathLike,
    drafter: str | os.PathLike,
    *,
    revision: str | None = None,
    drafter_revision: str | None = None,
    cache_dir: str | None = None,
    text_config: dict[str, Any] | None = None,
    rows: int | None = None,
    quantized: bool | None = False,
) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """Configurations of a pair, checked to fit together; reads no weight.

    Args:
        rows: as for :func:`read_config`, of both.
        quantized: as for :func:`read_config`, of the base; a drafter's weights never are.

    Raises:
        ConfigError: for a model of another family, a drafter that was made for another base, and a drafter whose
            logits serving would cap.
    """
    base_config = read_config(
        base, revision=revision, cache_dir=cache_dir, text_config=text_config, rows=rows, quantized=quantized
    )
    drafter_config = read_config(drafter, revision=drafter_revision, cache_dir=cache_dir, rows=rows)
    for key, config, path, known in (
        ("model.base", base_config, base, BASES),
        ("model.drafter", drafter_config, drafter, DRAFTERS),
    ):
        if config.model_type not in {**BASES, **DRAFTERS}:
            raise ConfigError(f"{key}={path} is a {config.model_type} model; it must be one of {', '.join(known)}.")
    check_pair(base_config, drafter_config)
    if (cap := drafter_config.get_text_config().final_logit_softcapping) is not None:
        raise ConfigError(
            f"model.drafter={drafter}: its configuration has final_logit_softcapping={cap}, which vLLM and SGLang "
            "apply to its logits, and transformers' drafter and this training don't. Set it to null in the text_config "
            "of its config.json, as in the released drafters."
        )
    return base_config, drafter_config


def run_configs(cfg: Config) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """:func:`read_configs` of a run's pair, downloaded if need be. Collective under a process group."""
    m = cfg.model
    folders = resolve(m.base, m.revision, m.cache_dir), resolve(m.drafter, m.drafter_revision, m.cache_dir)
    return read_configs(*folders, text_config=m.text_config, rows=grown_rows(cfg), quantized=as_saved(cfg))
