"""A pair from Hugging Face folders: built on the meta device, sharded, then filled slice by slice.

    base_config, drafter_config = read_configs(base, drafter)     # refuses a pair that doesn't fit, before any weight
    base = build_meta(base_config, dtype)                         # no memory
    parallelize(...)                                              # FSDP2 decides which slice is whose
    materialize(base, resolve(base_path), device)                 # each rank reads its own slices

No rank ever holds a whole model. torch's ``HuggingFaceStorageReader`` isn't used for the last step: it reads every
safetensors file in the folder whatever the index says, and knows nothing of transformers' renamings and ties.
"""

import copy
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights
from transformers.utils.generic import ContextManagers

from joint_train.checkpoint.layout import stays_inside
from joint_train.distributed.lora import folder_tensors
from joint_train.distributed.quantised import KINDS, Store, dequantise, quantise
from joint_train.distributed.ranks import Ranks, run_on_all_ranks
from joint_train.distributed.replicas import Replicas
from joint_train.errors import WeightsError
from joint_train.progress import tracked
from joint_train.torch_private import local_shape_and_offset
from joint_train.weights import placing, quantised
from joint_train.weights.changes import UNCHANGED, Changes, View
from joint_train.weights.folders import BASES, DRAFTERS, model_type, other_weights, read_config, resolve
from joint_train.weights.gguf_file import stored_in_gguf
from joint_train.weights.stored import FLOATS, Stored, close_files, opened

READ_BYTES = 64 * 2**20
COMPOSITES, TEXTS = ("gemma4", "gemma4_unified"), ("gemma4_text", "gemma4_unified_text")
WRAPPERS = re.compile(
    r"^(module\.|base_model\.model\.(?=model\.|lm_head\.))|_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\."
)
OLDER = re.compile(r"language_model\.model\.")
TEXT_ALONE = re.compile(r"model\.(layers|norm|embed_tokens|embed_tokens_per_layer|per_layer_\w+)\.")


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
    contexts = cast(type[PreTrainedModel], cls).get_init_context(dtype, False, False, None)
    with ContextManagers([*contexts, no_init_weights()]):  # on the meta device they take time, too
        model = cls(config)
    model.tie_weights(recompute_mapping=False)
    return model.eval()


@torch.no_grad()
def materialize(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    device: torch.device | str,
    shard_device: torch.device | str | None = None,
    changes: Changes = UNCHANGED,
) -> None:
    """Fill a model of :func:`build_meta` from a folder's safetensors, on `device`.

    A model that is on a device already keeps its tensors, and only their values change. Of a sharded parameter only
    this rank's slice is read, in pieces of at most 64 MiB; what isn't sharded is read whole by every rank.

    With HSDP one replica reads, and the others get it from there: all ranks together. Otherwise there is no
    communication, so an error on one rank leaves none waiting here.

    Args:
        shard_device: of sharded parameters, where it is another: the CPU with ``parallel.cpu_offload=all``.
        changes: of the folder's weights; each rank makes them in the slices that it reads.

    Raises:
        WeightsError: before anything is allocated.
        RuntimeError: with HSDP, if another rank failed.
    """
    replicas = Replicas(model.parameters())
    if replicas.mesh is None:
        _fill(model, folder, device, shard_device, changes)
    else:
        run_on_all_ranks(lambda: _fill(model, folder, device, shard_device, changes, replicas.reads))
        replicas.share({id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}.values())


def _fill(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    device: torch.device | str,
    shard_device: torch.device | str | None,
    changes: Changes,
    values: bool = True,
) -> None:
    """Check, allocate, and with ``values`` read."""
    stored = stored_tensors(folder, changes)
    names = match(model, stored, folder)
    check_token_ordering(stored, folder)
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=shard_device or device)
        if shard_device is not None:
            _move_whole_tensors(model, device)
        model.tie_weights(recompute_mapping=False)  # to_empty gave each of them a tensor of its own
        _fill_computed_buffers(model)

    tensors = folder_tensors(model)
    filled = set()
    in_files = sorted(names.items(), key=lambda item: stored[item[0]].file) if values else []
    for key, name in tracked(f"reading {folder}", in_files):
        target = tensors.get(name)
        if target is not None and id(target) not in filled:
            view, store = changes.view(stored[key], key, name), getattr(target, "store", None)
            _read_slice(view, target) if store is None else _quantise_slice(view, store)
            filled.add(id(target))
    close_files()
    if (Path(folder) / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def _move_whole_tensors(model: PreTrainedModel, device: torch.device | str) -> None:
    """Move buffers, and parameters that aren't sharded, to where the model computes."""
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def load_model(
    path: str | os.PathLike,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A whole model on one device: what ``from_pretrained`` gives, with this module's checks."""
    folder = resolve(path)
    check_weights(folder)
    model = build_meta(read_config(folder, quantized=None), dtype, attn_implementation)
    materialize(model, folder, device)
    return model


def stored_tensors(folder: str | os.PathLike, changes: Changes = UNCHANGED) -> dict[str, Stored]:
    """The tensors of a folder by name: of ``model.safetensors``, else of the files that the index names. Those of a
    quantised folder are what the model has before it is quantised, see :mod:`joint_train.weights.quantised`.

    Names that transformers wouldn't know are given as it writes them today, see :func:`current_name`.

    Args:
        changes: shapes are those that the tensors have with them.

    Raises:
        WeightsError: if there is neither, a file of the index is missing, a header can't be read, or two tensors have
            one name; if a quantised layer isn't what the folder's format says.
        ConfigError: if it is quantised in a way that isn't known.
    """
    stored = stored_in_files(folder)
    config = quantised.quantization_config(Path(folder))
    if config is not None and config.get("quant_method") != "gguf":
        stored = quantised.combine(config, stored, folder)
    shapes = {name: changes.shape(name, entry.shape) for name, entry in stored.items()}
    return {name: dataclasses.replace(entry, shape=shapes[name]) for name, entry in stored.items()}


def stored_in_files(folder: str | os.PathLike) -> dict[str, Stored]:
    """The tensors of a folder's files, safetensors or GGUF, by the names of :func:`stored_tensors`, quantised or not.

    Raises:
        WeightsError: as there.
    """
    folder = Path(folder)
    if files_of_gguf := quantised.gguf_files(folder):
        return stored_in_gguf(files_of_gguf)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        files = {"model.safetensors"}
    elif index.exists():
        files = _index(index)
    else:
        raise WeightsError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json.{other_weights(folder)}"
        )
    if absent := sorted(file for file in files if not (folder / file).exists()):
        raise WeightsError(f"{index} names files that aren't in the folder: {', '.join(absent)}.")
    kind, stored, twice = model_type(folder), dict[str, Stored](), list[str]()
    for file in sorted(files):
        try:
            weights = opened(folder / file)
            for key in weights.keys():  # noqa: SIM118 - not a dict
                view, name = weights.get_slice(key), current_name(key, kind)
                if name in stored and key != stored[name].key:
                    twice.append(f"{stored[name].key} and {key}")
                stored[name] = Stored(folder / file, tuple(view.get_shape()), view.get_dtype(), key)
        except Exception as e:
            raise WeightsError(f"can't read {folder / file}: {e}") from e
    if twice:
        raise WeightsError(f"{folder} has {len(twice)} tensors under two names, such as {twice[0]}: save one model")
    return stored


def current_name(key: str, kind: str | None) -> str:
    """The name that transformers gives a tensor today, for those names of other programs that it doesn't rename itself.

    Wrappers leave prefixes (torch.compile ``_orig_mod.``, DDP ``module.``, FSDP ``_fsdp_wrapped_module.``, peft
    ``base_model.model.``); transformers before 4.52 wrote ``language_model.model.`` of a multimodal model; and the text
    model alone has ``model.`` where it has ``model.language_model.`` as a part of the multimodal one.

    Args:
        kind: the ``model_type`` of the folder.
    """
    name = WRAPPERS.sub("", key)
    if kind not in COMPOSITES and kind not in TEXTS:
        return name
    name = name.replace("language_model.model.", "model.language_model.", 1) if OLDER.match(name) else name
    name = name.removeprefix("language_model.") if name.startswith("language_model.lm_head.") else name
    if kind in COMPOSITES and TEXT_ALONE.match(name):
        return name.replace("model.", "model.language_model.", 1)
    if kind in TEXTS and name.startswith("model.language_model."):
        return name.replace("model.language_model.", "model.", 1)
    return name


def check_token_ordering(stored: dict[str, Stored], folder: str | os.PathLike) -> None:
    """Refuse ordered embeddings whose order leaves tokens out: they could never be drafted.

    Raises:
        WeightsError: if ``token_ordering`` doesn't have each token once.
    """
    for name, entry in stored.items():
        if not name.endswith("token_ordering"):
            continue
        order = entry.whole().flatten()
        if not torch.equal(order.sort().values, torch.arange(order.numel(), dtype=order.dtype)):
            raise WeightsError(
                f"{name} in {entry.file} isn't a permutation of the {order.numel()} tokens: it has "
                f"{order.unique().numel()} different values, from {int(order.min())} to {int(order.max())}, and a "
                "token that it lacks could never be drafted. Take the drafter's folder as it was released"
            )


def _index(path: Path) -> set[str]:
    """The files that an index names.

    Raises:
        WeightsError: if it can't be read, or names a file outside its folder.
    """
    try:
        files = set(json.loads(path.read_bytes())["weight_map"].values())
        outside = [file for file in files if not stays_inside(file)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path} can't be read as an index of weights: {type(error).__name__}: {error}") from None
    if outside:
        raise WeightsError(f"{path} is refused: it names {min(outside)}, which is not in the folder.")
    return files


def check_weights(folder: Path, ranks: Ranks | None = None) -> None:
    """Compare an export's weights with its checksums, where it has them; with `ranks` each reads its share. Collective
    with them.

    Raises:
        WeightsError: naming each file whose contents are not what the export wrote, on every rank.
    """
    if ranks is None:
        problems = [placing.check_contents(folder)]
    else:
        rank, size = ranks.rank, ranks.size
        problems = ranks.each(f"verifying {folder}", lambda: placing.check_contents(folder, rank, size))
    placing.refuse_changed(folder, sorted(problem for of_rank in problems for problem in of_rank))


def match(model: PreTrainedModel, stored: dict[str, Stored], folder: str | os.PathLike) -> dict[str, str]:
    """The model's tensor for each of a folder's, by name, through transformers' own renamings.

    Keys that transformers ignores are left out, such as the k/v of KV-shared layers.

    Raises:
        WeightsError: listing what is missing, unexpected, misshaped or of the wrong kind.
    """
    tensors = folder_tensors(model)
    rename = renamer(model, tensors)
    ignored = ignored_keys(model, stored)
    names: dict[str, str] = {}
    wrong: dict[str, list[str]] = {"missing": [], "unexpected": [], "misshaped": []}
    for key, entry in stored.items():
        name = rename(key)
        if name not in tensors and key in tensors:
            name = key
        if name in tensors:
            names[key] = name
            wrong["misshaped"] += _mismatch(key, entry, tensors[name])
        elif key not in ignored:
            wrong["unexpected"].append(f"{key} {list(entry.shape)} in {entry.file.name}")
    present = {id(tensors[name]) for name in names.values()}
    wrong["missing"] = [f"{name} {list(t.shape)}" for name, t in tensors.items() if id(t) not in present]
    first: dict[int, str] = {}
    for key, name in names.items():
        other = first.setdefault(id(tensors[name]), key)
        if other != key and (stored[key].weight or stored[other].weight):
            raise WeightsError(
                f"{folder} has {other} and {key}, which are one tensor of {type(model).__name__} "
                "(tie_word_embeddings=true), and not in one quantisation: quantise again with lm_head ignored, or say "
                "tie_word_embeddings=false in its config.json if they were quantised apart"
            )
    if any(wrong.values()):
        raise WeightsError(
            f"the weights in {folder} don't fit {type(model).__name__}:"
            + "".join(f"\n  {kind} ({len(keys)}): " + _indent_first(keys) for kind, keys in wrong.items() if keys)
        )
    return names


def renamer(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> Callable[[str], str]:
    """transformers' own renamings of a folder's keys, as a function.

    Args:
        tensors: of the model, see :func:`folder_tensors`.
    """
    conversions = get_model_conversion_mapping(model)
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    known = dict(tensors)
    return lambda key: rename_source_key(key, renamings, converters, model.base_model_prefix, known)[0]


def ignored_keys(model: PreTrainedModel, keys: Iterable[str]) -> set[str]:
    """The keys of a folder that transformers ignores."""
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    return {key for key in keys if any(pattern.search(key) for pattern in patterns)}


def _mismatch(key: str, entry: Stored, tensor: Tensor) -> list[str]:
    if entry.shape != tuple(tensor.shape):
        return [f"{key} {list(entry.shape)}, should be {list(tensor.shape)}"]
    if tensor.is_floating_point() != (entry.dtype in FLOATS):
        return [f"{key} {entry.dtype}, can't be read as {tensor.dtype}"]
    return []


def _indent_first(lines: list[str], most: int = 40) -> str:
    more = [f"… and {len(lines) - most} more"] if len(lines) > most else []
    return "".join(f"\n    {line}" for line in lines[:most] + more)


def _read_slice(view: View, target: Tensor) -> None:
    """Copy this rank's part of a stored tensor into `target`, converting its dtype."""
    if isinstance(target, DTensor):
        shape, offset = local_shape_and_offset(target.shape, target.device_mesh, target.placements)
        target = target.to_local()
    else:
        shape, offset = tuple(target.shape), (0,) * target.dim()
    if target.dim() == 0:
        target.copy_(view.whole())
        return
    if target.numel() == 0:
        return
    rest = tuple(slice(start, start + size) for start, size in zip(offset[1:], shape[1:], strict=True))
    step = max(1, READ_BYTES // (target[0].numel() * 8))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        target[start:stop].copy_(view[(slice(offset[0] + start, offset[0] + stop), *rest)])


def _quantise_slice(view: View, store: Store) -> None:
    """Fill this rank's part of a weight that is kept in codes, quantised as it is read."""
    store.errors = torch.zeros(2, dtype=torch.float64)
    both = [_place(store.codes), _place(store.scales)]
    for group in ([0, 1],) if both[0][1][:-1] == both[1][1][:-1] else ([0], [1]):
        # Whole blocks, of the columns that either needs.
        per_byte = KINDS[store.kind].values, store.block / 4
        ends = [(both[i][1][-1].start * per_byte[i], both[i][1][-1].stop * per_byte[i]) for i in group]
        first = int(min(start for start, _ in ends)) // store.block * store.block
        last = min(store.shape[-1], math.ceil(max(stop for _, stop in ends) / store.block) * store.block)
        rows, *rest = both[group[0]][1][:-1]
        if any(both[i][0].numel() == 0 for i in group):
            continue
        width = math.prod(of.stop - of.start for of in rest) * (last - first)
        step = max(1, READ_BYTES // (width * 8))
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            numbers = view[(slice(start, stop), *rest, slice(first, last))].float().to(both[0][0].device)
            made = quantise(numbers, store.kind, store.block)
            for i in group:
                target, part = both[i]
                skipped = part[-1].start - int(first / per_byte[i])
                target[start - rows.start : stop - rows.start].copy_(made[i].narrow(-1, skipped, target.shape[-1]))
            if 0 in group:
                rounded = dequantise(*made, store.kind, store.block, torch.float32)
                store.errors += torch.stack([(rounded - numbers).square().sum(), numbers.square().sum()]).cpu()


def _place(tensor: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """This rank's part of a tensor, and where in it that lies."""
    if not isinstance(tensor, DTensor):
        return tensor, tuple(slice(0, size) for size in tensor.shape)
    shape, offset = local_shape_and_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(slice(first, first + size) for first, size in zip(offset, shape, strict=True))


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
