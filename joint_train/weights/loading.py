"""A pair from Hugging Face folders: built on the meta device, sharded, then filled slice by slice.

    base_config, drafter_config = read_configs(base, drafter)     # refuses a pair that doesn't fit, before any weight
    base = build_meta(base_config, dtype)                         # no memory
    parallelize(...)                                              # FSDP2 decides which slice is whose
    materialize(base, resolve(base_path), device)                 # each rank reads its own slices

No rank ever holds a whole model. torch's ``HuggingFaceStorageReader`` isn't used for the last step: it reads every
safetensors file in the folder whatever the index says, and knows nothing of transformers' renamings and ties.
"""

import copy
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import (
    CONFIG_MAPPING,
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedAssistantForCausalLM,
    Gemma4UnifiedForCausalLM,
    Gemma4UnifiedForConditionalGeneration,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.utils.generic import ContextManagers

from joint_train.config import ConfigError

if TYPE_CHECKING:
    from joint_train.model import Gemma4WithDrafter

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
# Text settings that the configuration classes take apart when they are built, so that no attribute shows them.
TEXT_INPUTS = {"global_head_dim", "num_global_key_value_heads", "rope_theta"}
# What a training run needs of a hub repository: weights in other formats can be as large again.
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
READ_BYTES = 64 * 2**20
# safetensors' names of the dtypes that a floating-point weight may be read from.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class WeightsError(ValueError):
    """A folder's weights don't fit the model: the message lists every one that is missing, unexpected or misshaped."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file, as its header tells: nothing of it is read."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name, e.g. "BF16"


# Finding and checking a pair


def resolve(path: str | os.PathLike, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """The local folder of a model: the folder itself, or a hub repository's snapshot, downloaded if need be.

    Under a process group all ranks must call it: the first rank of each node downloads, the others wait for it.

    Raises:
        ConfigError: for a folder that doesn't exist, or a repository that can't be had; on every rank alike.
    """
    if Path(path).is_dir():
        return Path(path)
    name = os.fspath(path)
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise ConfigError(
            f"no such folder: {name}. Give a folder that exists, or a hub id such as google/gemma-4-E2B-it."
        )
    options = {"revision": revision, "cache_dir": cache_dir, "allow_patterns": HUB_FILES}
    first = not dist.is_initialized() or dist.get_node_local_rank(fallback_rank=0) == 0
    try:
        together(lambda: snapshot_download(name, **options) if first else None)
    except Exception as e:
        raise ConfigError(
            f"can't get {name} (revision {revision or 'main'}) from the hub: {e}\nWithout network, give a local folder "
            "or a model.cache_dir that has the snapshot."
        ) from e
    return Path(snapshot_download(name, local_files_only=True, **options))


def together(action: Callable[[], Any]) -> None:
    """Do something on every rank; if it fails on one, it fails on all of them, and none is left waiting.

    Raises:
        Exception: this rank's own; on the other ranks a RuntimeError with its text.
    """
    error = None
    try:
        action()
    except Exception as e:
        error = e
    if dist.is_initialized():
        texts: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(texts, error and f"{type(error).__name__}: {error}")
        for rank, text in enumerate(texts):
            if text and error is None:
                raise RuntimeError(f"rank {rank}: {text}")
    if error:
        raise error


def read_config(
    path: str | os.PathLike,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    text_config: dict[str, Any] | None = None,
) -> PreTrainedConfig:
    """Configuration of one model from its folder or hub id.

    Args:
        text_config: values that replace those of the folder's text configuration.

    Raises:
        ConfigError: if there is none, or `text_config` has a key that Gemma 4's text configuration hasn't.
    """
    try:
        raw, _ = PreTrainedConfig.get_config_dict(path, revision=revision, cache_dir=cache_dir)
    except OSError as e:
        raise ConfigError(f"no model configuration at {path}: {e}") from e
    if not raw:
        raise ConfigError(f"{path} has no config.json: give a folder that save_pretrained wrote, or a hub id.")
    kind = raw.get("model_type")
    if kind not in BASES and kind not in DRAFTERS:
        raise ConfigError(
            f"{path} is a {kind} model; a base is one of {', '.join(BASES)}, a drafter one of {', '.join(DRAFTERS)}."
        )
    config_class = CONFIG_MAPPING[kind]
    config = config_class.from_dict(copy.deepcopy(raw))
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


def read_configs(
    base: str | os.PathLike,
    drafter: str | os.PathLike,
    *,
    revision: str | None = None,
    drafter_revision: str | None = None,
    cache_dir: str | None = None,
    text_config: dict[str, Any] | None = None,
) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """Configurations of a pair, checked to fit together; reads no weight.

    Raises:
        ConfigError: for a model of another family, and for a drafter that was made for another base.
    """
    base_config = read_config(base, revision=revision, cache_dir=cache_dir, text_config=text_config)
    drafter_config = read_config(drafter, revision=drafter_revision, cache_dir=cache_dir)
    for key, config, path, known in (
        ("model.base", base_config, base, BASES),
        ("model.drafter", drafter_config, drafter, DRAFTERS),
    ):
        if config.model_type not in known:
            raise ConfigError(f"{key}={path} is a {config.model_type} model; it must be one of {', '.join(known)}.")
    check_pair(base_config, drafter_config)
    return base_config, drafter_config


def check_pair(base: PreTrainedConfig, drafter: PreTrainedConfig) -> None:
    """Refuse a drafter that was made for another base.

    Raises:
        ConfigError: listing every size that differs.
    """
    text, draft = base.get_text_config(), drafter.get_text_config()
    wrong = []

    def expect(what: str, of_drafter: Any, of_base: Any) -> None:
        if of_drafter != of_base:
            wrong.append(f"{what} is {of_drafter} in the drafter and {of_base} in the base")

    expect("hidden size of the base (backbone_hidden_size)", drafter.backbone_hidden_size, text.hidden_size)
    expect("vocab_size", draft.vocab_size, text.vocab_size)
    own = text.layer_types[: text.num_hidden_layers - text.num_kv_shared_layers]
    for kind in sorted(set(draft.layer_types)):
        if kind not in own:
            wrong.append(f"the drafter has {kind} layers, the base has none that computes keys and values")
            continue
        store = text.per_layer_config[len(own) - 1 - own[::-1].index(kind)]
        reader = draft.per_layer_config[draft.layer_types.index(kind)]
        expect(f"head_dim of {kind}", reader.head_dim, store.head_dim)
        expect(f"num_key_value_heads of {kind}", reader.num_key_value_heads, store.num_key_value_heads)
        for name in ("rope_type", "rope_theta", "partial_rotary_factor"):
            ropes = (config.rope_parameters[kind].get(name) for config in (draft, text))
            expect(f"{name} of {kind}", *ropes)
    if wrong:
        raise ConfigError(
            "model.drafter doesn't belong to model.base:\n  "
            + "\n  ".join(wrong)
            + "\nTake the drafter that was released with this base, or undo the model.text_config that changes it."
        )


def load_pair(cfg: DictConfig, mesh: DeviceMesh | None, device: torch.device | str) -> "Gemma4WithDrafter":
    """The pair of a configuration, sharded over `mesh` (whole without one) and filled from its folders.

    Raises:
        ConfigError: for a pair that can't be found or doesn't fit together.
        WeightsError: for weights that don't fit.
    """
    from joint_train.parallelize import DTYPES, parallelize

    m = cfg.model
    base_dir = resolve(m.base, m.revision, m.cache_dir)
    drafter_dir = resolve(m.drafter, m.drafter_revision, m.cache_dir)
    text_config = OmegaConf.to_container(m.text_config, resolve=True)
    configs = read_configs(base_dir, drafter_dir, text_config=text_config)
    model = meta_pair(cfg, *configs, DTYPES[cfg.precision.params])
    model.sources = (base_dir, drafter_dir)
    if mesh is not None:
        parallelize(model, mesh, cfg)
    materialize(model.base, base_dir, device)
    materialize(model.drafter, drafter_dir, device)
    if cfg.drafter.share_embedding_with_base:
        model.share_embedding()
    return model


def meta_pair(
    cfg: DictConfig, base_config: PreTrainedConfig, drafter_config: PreTrainedConfig, dtype: torch.dtype
) -> "Gemma4WithDrafter":
    """The pair of a configuration on the meta device: what is frozen, recomputed and compiled is decided."""
    from joint_train.model import Gemma4WithDrafter  # its from_pretrained uses this module
    from joint_train.parallelize import prepare

    model = Gemma4WithDrafter(
        build_meta(base_config, dtype, cfg.model.attn_implementation),
        build_meta(drafter_config, dtype, cfg.model.attn_implementation),
        drafter_loss_weight=cfg.drafter.loss_weight,
        drafter_num_steps=cfg.drafter.num_steps,
        freeze_base_for_drafter=cfg.freeze.base,
        share_embedding_with_base=cfg.drafter.share_embedding_with_base,
        pairing=cfg.drafter.pairing,
        rope_position=cfg.drafter.rope_position,
        loss=cfg.loss,
    )
    prepare(model, cfg)
    return model


# Building and filling a model


def build_meta(config: PreTrainedConfig, dtype: torch.dtype, attn_implementation: str | None = None) -> PreTrainedModel:
    """The model of a configuration on the meta device, weights tied, in eval mode.

    Args:
        dtype: of the weights to come, whatever the folder's is.
        attn_implementation: of the text layers; the towers take the fastest that they support.
    """
    config = copy.deepcopy(config)
    cls = (BASES | DRAFTERS)[config.model_type]
    if attn_implementation is not None:
        text_only = config.get_text_config() is config
        config._attn_implementation = attn_implementation if text_only else {"text_config": attn_implementation}
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if part is not None:
            part.dtype = dtype  # a part is built in its own configuration's dtype
    with ContextManagers(cls.get_init_context(dtype, False, False, None)):
        model = cls(config)
    model.tie_weights(recompute_mapping=False)
    return model.eval()


@torch.no_grad()
def materialize(model: PreTrainedModel, folder: str | os.PathLike, device: torch.device | str) -> None:
    """Fill a model of :func:`build_meta` from a folder's safetensors, on `device`.

    A model that is on a device already keeps its tensors, and only their values change. Of a sharded parameter only
    this rank's slice is read, in pieces of at most 64 MiB; what isn't sharded is read whole by every rank. There is no
    communication, so an error on one rank leaves none waiting here.

    Raises:
        WeightsError: before anything is allocated.
    """
    stored = stored_tensors(folder)
    names = match(model, stored, folder)
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device)
        model.tie_weights(recompute_mapping=False)  # to_empty gave each of them a tensor of its own
        _fill_computed_buffers(model)

    tensors = model.state_dict(keep_vars=True)
    filled = set()
    for file in sorted({stored[key].file for key in names}):
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 - not a dict
                target = tensors.get(names.get(key))
                if target is not None and id(target) not in filled:
                    _read_slice(weights, key, target)
                    filled.add(id(target))
    if (Path(folder) / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def load_model(
    path: str | os.PathLike,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A whole model on one device: what ``from_pretrained`` gives, with this module's checks."""
    folder = resolve(path)
    model = build_meta(read_config(folder), dtype, attn_implementation)
    materialize(model, folder, device)
    return model


def stored_tensors(folder: str | os.PathLike) -> dict[str, Stored]:
    """The tensors of a folder by name: of ``model.safetensors``, else of the files that the index names.

    Raises:
        WeightsError: if there is neither, a file of the index is missing, or a header can't be read.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        files = {"model.safetensors"}
    elif index.exists():
        files = set(json.loads(index.read_text())["weight_map"].values())
    else:
        raise WeightsError(f"{folder} has neither model.safetensors nor model.safetensors.index.json.")
    if absent := sorted(file for file in files if not (folder / file).exists()):
        raise WeightsError(f"{index} names files that aren't in the folder: {', '.join(absent)}.")
    stored = {}
    for file in sorted(files):
        try:
            with safe_open(folder / file, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118 - not a dict
                    view = weights.get_slice(key)
                    stored[key] = Stored(folder / file, tuple(view.get_shape()), view.get_dtype())
        except Exception as e:
            raise WeightsError(f"can't read {folder / file}: {e}") from e
    return stored


def match(model: PreTrainedModel, stored: dict[str, Stored], folder: str | os.PathLike) -> dict[str, str]:
    """The model's tensor for each of a folder's, by name, through transformers' own renamings.

    Left out are the keys that the format lets a folder hold for nothing, such as the k/v of KV-shared layers.

    Raises:
        WeightsError: listing what is missing, unexpected, misshaped or of the wrong kind.
    """
    tensors = model.state_dict(keep_vars=True)
    conversions = get_model_conversion_mapping(model)
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    renamings = [c for c in conversions if not isinstance(c, WeightConverter)]
    ignored = ignored_keys(model, stored)
    names, wrong = {}, {"missing": [], "unexpected": [], "misshaped": []}
    for key, entry in stored.items():
        name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, tensors)
        if name not in tensors and key in tensors:
            name = key
        if name in tensors:
            names[key] = name
            wrong["misshaped"] += _mismatch(key, entry, tensors[name])
        elif key not in ignored:
            wrong["unexpected"].append(f"{key} {list(entry.shape)} in {entry.file.name}")
    present = {id(tensors[name]) for name in names.values()}
    wrong["missing"] = [f"{name} {list(t.shape)}" for name, t in tensors.items() if id(t) not in present]
    if any(wrong.values()):
        raise WeightsError(
            f"the weights in {folder} don't fit {type(model).__name__}:"
            + "".join(f"\n  {kind} ({len(keys)}): " + _some(keys) for kind, keys in wrong.items() if keys)
        )
    return names


def ignored_keys(model: PreTrainedModel, keys: Iterable[str]) -> set[str]:
    """Those of a folder's keys that transformers lets it hold for nothing."""
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    return {key for key in keys if any(pattern.search(key) for pattern in patterns)}


def _mismatch(key: str, entry: Stored, tensor: Tensor) -> list[str]:
    if entry.shape != tuple(tensor.shape):
        return [f"{key} {list(entry.shape)}, should be {list(tensor.shape)}"]
    if tensor.is_floating_point() != (entry.dtype in FLOATS):
        return [f"{key} {entry.dtype}, can't be read as {tensor.dtype}"]
    return []


def _some(lines: list[str], most: int = 40) -> str:
    more = [f"… and {len(lines) - most} more"] if len(lines) > most else []
    return "".join(f"\n    {line}" for line in lines[:most] + more)


def _read_slice(weights: Any, key: str, target: Tensor) -> None:
    """Copy this rank's part of a stored tensor into `target`, converting its dtype."""
    view = weights.get_slice(key)
    if isinstance(target, DTensor):
        shape, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
        target = target.to_local()
    else:
        shape, offset = tuple(target.shape), (0,) * target.dim()
    if target.dim() == 0:
        target.copy_(weights.get_tensor(key))
        return
    if target.numel() == 0:
        return
    rest = tuple(slice(start, start + size) for start, size in zip(offset[1:], shape[1:], strict=True))
    step = max(1, READ_BYTES // (target[0].numel() * 8))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        target[start:stop].copy_(view[(slice(offset[0] + start, offset[0] + stop), *rest)])


def _fill_computed_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that no folder holds (rotary frequencies, embedding scales, …) as ``from_pretrained`` does.

    transformers' initialisation passes over tensors with this mark, and fills the rest.
    """
    tensors = set(model.state_dict(keep_vars=True).values())
    for tensor in tensors:
        tensor._is_hf_initialized = True
    model.initialize_weights()
    for tensor in tensors:
        del tensor._is_hf_initialized
