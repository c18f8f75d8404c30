"""Hugging Face folders from sharded weights or from a distributed checkpoint, without any rank holding a model.

A safetensors file is a header that says at which byte each tensor lies, and then the bytes. So the header is written
first, and every rank then writes its own slices at their place, in pieces of at most 64 MiB:

    export_model(model.base, "google/gemma-4-E2B-it", "export/base")       # collective, in a run
    python -m joint_train.export OUTPUT_DIR/checkpoints/step_00000100 OUT --verify

Key names are those of the folder that the model was loaded from. What belongs to a model beside its weights (tokenizer,
processor, chat template, generation configuration, licence) is copied, so that an engine that loads the one loads the
other; everything else in that folder is left out, and named.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from joint_train.checkpoint.reader import Reader, load_alone
from joint_train.distributed.lora import Merged, adapted_modules, merged_weight
from joint_train.distributed.ranks import run_on_all_ranks
from joint_train.errors import WeightsError
from joint_train.files import naming
from joint_train.progress import shown_progress, tracked
from joint_train.weights.changes import UNCHANGED, Changes
from joint_train.weights.folders import read_config, resolve
from joint_train.weights.kv_shared import absent_copies
from joint_train.weights.loading import match, stored_tensors
from joint_train.weights.placing import MANIFEST, discard, place, staged
from joint_train.weights.run_files import (
    NOTHING,
    PROCESSOR_FILES,
    TOKENIZER_FILE,
    RunFiles,
    of_tokenizer,
    write_run_files,
)
from joint_train.weights.shards import (
    DTYPES,
    SAFETENSORS_NAMES,
    mapped,
    parse_size,
    plan_shards,
    slots_of,
    write_headers,
)
from joint_train.weights.stored import FLOATS, Stored
from joint_train.weights.writing import Slot, Written, check_written, write_tensors

log = logging.getLogger(__name__)

# What belongs to a model beside its weights, by name: a trainer's folder also holds logs, results, optimizer states,
# adapters and their configuration, which would make transformers look for a base.
MODEL_FILES = re.compile(
    rf"^((generation_)?config\.json|{TOKENIZER_FILE.pattern}|{'|'.join(map(re.escape, PROCESSOR_FILES))})$|"
    r"^(LICENSE|NOTICE|README|USE_POLICY|COPYING)(\.(md|txt))?$",
    re.IGNORECASE,
)
WEIGHT_FILES = re.compile(r"\.(safetensors|bin|pt|pth|gguf|msgpack|h5|onnx)$|\.index\.json$")
TEMPLATES = re.compile(r"\.jinja$")  # of a model's folders, only chat templates


# Exporting


@torch.no_grad()
def export_model(
    model: PreTrainedModel,
    source: str | os.PathLike,
    out: str | os.PathLike,
    max_shard_size: str | int = "5GB",
    dtype: torch.dtype = torch.bfloat16,
    num_assistant_tokens: int | None = None,
    kv_shared_weights: bool = False,
    in_place: bool = True,
    files: RunFiles = NOTHING,
    changes: Changes = UNCHANGED,
) -> None:
    """Write a model as a Hugging Face folder; under a process group, all ranks must call it, and share `out`'s disk.

    Adapters are added to the weights that they belong to, in float32, before these are rounded to `dtype`. Of weights
    that are kept in codes, those of `source` are taken.

    The folder is written beside `out` and renamed when it is complete: an older export in `out` stays whole until then.

    Args:
        source: the folder (or hub id in the cache) that the model was loaded from.
        max_shard_size: of a safetensors file, in bytes or as "5GB"; a larger tensor has a file of its own.
        dtype: of floating-point tensors.
        num_assistant_tokens: written to the generation configuration, for a drafter.
        kv_shared_weights: also write the keys' and values' weights of KV-shared layers where `source` has none, which
            nothing uses: copies of those that these layers reuse, see :mod:`joint_train.weights.kv_shared`.
        in_place: False leaves the complete folder staged, for :func:`joint_train.weights.placing.place`.
        files: what the run adds to the source's files.
        changes: what was changed in the weights of `source` when the model was loaded.

    Raises:
        WeightsError: if the model's tensors are not those of `source`.
        OSError: if the disk is full, …; on every rank alike.
    """
    source = resolve(source)
    stored, names = _contents(model, source, kv_shared_weights, changes)
    _say_absent(model, source, stored, "set model.export.kv_shared_weights=true")

    def read(key: str, part: tuple[slice, ...]) -> Tensor:
        return changes.view(stored[key], key, names[key])[part]

    tensors = Merged(model, names, read)

    def fill(slots: dict[str, Slot]) -> None:
        written: list[Written] = []
        run_on_all_ranks(lambda: written.extend(write_tensors(tensors, slots)))
        check_written(written)

    _export(model, source, stored, names, Path(out), max_shard_size, dtype, num_assistant_tokens, fill, in_place, files)


def export_checkpoint(
    checkpoint: str | os.PathLike,
    model: PreTrainedModel,
    source: str | os.PathLike,
    out: str | os.PathLike,
    max_shard_size: str | int = "5GB",
    dtype: torch.dtype = torch.bfloat16,
    num_assistant_tokens: int | None = None,
    kv_shared_weights: bool = False,
    in_place: bool = True,
    files: RunFiles = NOTHING,
    changes: Changes = UNCHANGED,
) -> None:
    """Write a distributed checkpoint of one model as a Hugging Face folder, in one process.

    Args:
        checkpoint: folder of the distributed checkpoint, e.g. ``step_00000100/base/model``.
        model: the model on the meta device, for the names of its tensors and their ties. If it has adapters, they are
            on the CPU and filled, and the other weights are those of `source`.
        source, out, max_shard_size, dtype, num_assistant_tokens, kv_shared_weights, in_place, files, changes: as
            for :func:`export_model`.

    Raises:
        WeightsError: if the checkpoint lacks a tensor of `source`, or has it in another shape.
    """
    source = Path(source)
    stored, names = _contents(model, source, kv_shared_weights, changes)
    _say_absent(model, source, stored, "export again with --kv-shared-weights")
    frozen = adapted_modules(model) or not Reader(Path(checkpoint)).read_metadata().state_dict_metadata
    saved = None if frozen else _saved_names(checkpoint, model, names)
    value = _values(checkpoint, model, source, stored, names, changes)

    def fill(slots: dict[str, Slot]) -> None:
        if saved is None:
            for key in tracked(f"writing {out}", names):
                mapped(slots[key]).copy_(value(key, slots[key].dtype))
            return
        # The checkpoint's reader copies into the tensors that it is given, converting their dtype: here, the files.
        files = {key: mapped(slots[key]) for key in saved}
        wanted = {name: files[key] for key, name in saved.items()}
        with shown_progress("bytes", brief=True) as show:
            load_alone(wanted, Reader(Path(checkpoint), progress=partial(show, f"writing {out}")))
        for key, name in saved.items():
            if files[key] is not wanted[name]:  # a tied tensor that the source holds under both names
                files[key].copy_(wanted[name])

    _export(model, source, stored, names, Path(out), max_shard_size, dtype, num_assistant_tokens, fill, in_place, files)


def compare_checkpoint(
    checkpoint: str | os.PathLike,
    model: PreTrainedModel,
    source: str | os.PathLike,
    out: str | os.PathLike,
    changes: Changes = UNCHANGED,
) -> list[str]:
    """The tensors of an export that don't have the checkpoint's values, each read again.

    Args:
        checkpoint, model, source, changes: as for :func:`export_checkpoint`.
        out: the exported folder.
    """
    stored, names = _contents(model, Path(source), False, changes)
    value, ours = _values(checkpoint, model, Path(source), stored, names, changes), stored_tensors(out)
    problems = []
    for key in tracked(f"comparing {out}", sorted(names.keys() & ours.keys())):
        found = ours[key].whole()
        wanted = value(key, found.dtype)
        if found.shape != wanted.shape or not torch.equal(_bytes(found), _bytes(wanted)):
            problems.append(f"values of {key}")
    return problems


def _bytes(tensor: Tensor) -> Tensor:
    """As they are stored: NaN equals itself."""
    return tensor.contiguous().flatten().view(torch.uint8)


def _values(
    checkpoint: str | os.PathLike,
    model: PreTrainedModel,
    source: Path,
    stored: dict[str, Stored],
    names: dict[str, str],
    changes: Changes,
) -> Callable[[str, torch.dtype], Tensor]:
    """A tensor of the checkpoint by the source's key, rounded to a dtype; with adapters, theirs added to the source's
    weight in float32; of a base that was frozen, the source's."""
    modules = {f"{name}.weight": module for name, module in adapted_modules(model).items()}
    if modules or not Reader(Path(checkpoint)).read_metadata().state_dict_metadata:
        copied = absent_copies(model.config, stored_tensors(source))

        def merge(key: str, dtype: torch.dtype) -> Tensor:
            source_key = copied.get(key, key)
            weight = changes.view(stored[source_key], source_key, names[key]).whole()
            return (merged_weight(modules[names[key]], weight) if names[key] in modules else weight).to(dtype)

        return merge
    saved, reader = _saved_names(checkpoint, model, names), Reader(Path(checkpoint))

    def read(key: str, dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(stored[key].shape, dtype=dtype)
        load_alone({saved[key]: tensor}, reader)
        return tensor

    return read


def _saved_names(checkpoint: str | os.PathLike, model: PreTrainedModel, names: dict[str, str]) -> dict[str, str]:
    """The checkpoint's name of each tensor, by the source's key: of tied ones, whichever it has."""
    saved = Reader(Path(checkpoint)).read_metadata().state_dict_metadata
    tensors = model.state_dict(keep_vars=True)
    aliases: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        aliases.setdefault(id(tensor), []).append(name)
    found = {key: _first(aliases[id(tensors[name])], saved) for key, name in names.items()}
    if missing := sorted(names[key] for key, name in found.items() if name is None):
        raise WeightsError(f"the checkpoint {checkpoint} lacks {len(missing)} tensors: {', '.join(missing[:20])}")
    return {key: name for key, name in found.items() if name is not None}


def verify(
    out: str | os.PathLike,
    source: str | os.PathLike,
    kv_shared_weights: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    changes: Changes = UNCHANGED,
) -> list[str]:
    """What differs between an export and the folder it comes from, in names, shapes, dtypes and other files.

    Args:
        dtype: of floating-point tensors in the export, whatever the source has.
        changes: what the run changed in the weights of `source` when it loaded them.
    """
    ours, theirs = stored_tensors(out), stored_tensors(source, changes)
    if kv_shared_weights:
        theirs |= {key: theirs[copied] for key, copied in absent_copies(read_config(source), theirs).items()}
    problems = [f"missing: {key}" for key in sorted(theirs.keys() - ours.keys())]
    problems += [f"not in the source: {key}" for key in sorted(ours.keys() - theirs.keys())]
    for key in sorted(ours.keys() & theirs.keys()):
        for what in ("shape", "dtype"):
            a, b = getattr(ours[key], what), getattr(theirs[key], what)
            if what == "dtype" and b in FLOATS:
                b = SAFETENSORS_NAMES[dtype]
            if a != b:
                problems.append(f"{what} of {key}: {a}, should be {b}")
    kept = [file for file in _other_files(source)[0] if not of_tokenizer(file)]  # the run's may be another one
    problems += [f"file missing: {file}" for file in kept if not (Path(out) / file).exists()]
    return problems


def _say_absent(model: PreTrainedModel, source: Path, stored: dict[str, Stored], how: str) -> None:
    """Log that the export of a base lacks tensors that older engines ask for, and how to have them written."""
    if (copies := absent_copies(model.config, stored)) and not (dist.is_initialized() and dist.get_rank()):
        log.info(
            "like %s, the export has no keys and values for the KV-shared layers, which nothing reads (%d tensors). To "
            "serve it with a vLLM before September 2026, which refuses such a folder, %s",
            source, len(copies), how,
        )  # fmt: skip


def _contents(
    model: PreTrainedModel, source: Path, kv_shared_weights: bool, changes: Changes
) -> tuple[dict[str, Stored], dict[str, str]]:
    """What the export holds, as the source's entries by key, and the model's name of those that the model has."""
    stored = stored_tensors(source, changes)
    names = match(model, stored, source)
    copies = absent_copies(model.config, stored)
    if kv_shared_weights:
        stored = stored | {key: stored[copied] for key, copied in copies.items()}
        names = names | {key: names[copied] for key, copied in copies.items()}
    return stored, names


def _export(
    model: PreTrainedModel,
    source: Path,
    stored: dict[str, Stored],
    names: dict[str, str],
    out: Path,
    max_shard_size: str | int,
    dtype: torch.dtype,
    num_assistant_tokens: int | None,
    fill: Callable[[dict[str, Slot]], None],
    in_place: bool,
    files: RunFiles,
) -> None:
    """Lay the files out, let `fill` write the model's tensors into them, add the rest, and put the folder in place."""
    partial = staged(out)
    layout = {
        key: (entry.shape, dtype if entry.dtype in FLOATS else DTYPES[entry.dtype]) for key, entry in stored.items()
    }
    shards = plan_shards(layout, parse_size(max_shard_size))
    slots = {slot_key: slot for shard in slots_of(shards, layout, partial) for slot_key, slot in shard.items()}

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_headers(partial, shards, layout)

    def finish() -> None:
        for key in stored.keys() - names.keys():  # unused, but in the source, and so in the export
            mapped(slots[key]).copy_(stored[key].whole())
        _copy_other_files(source, partial)
        _write_configs(model, source, partial, dtype, num_assistant_tokens)
        write_run_files(files, model.config, source, partial)
        sync_files(partial)

    def on_first(action: Callable[[], None]) -> None:
        with naming(out):
            if not dist.is_initialized() or dist.get_rank() == 0:
                action()

    try:
        run_on_all_ranks(lambda: on_first(begin))
        run_on_all_ranks(lambda: fill(slots))
        run_on_all_ranks(lambda: on_first(finish))
        if in_place:
            place([out])
    except BaseException:
        discard([out])
        raise


# The folder around them


def _other_files(source: str | os.PathLike) -> tuple[list[str], list[str]]:
    """Files of a model's folder besides its weights: the paths of those that belong to the model, the names of the
    others.

    A link counts only inside the folder, and into the blobs of the hub's cache: what else it may lead to is not the
    model's.
    """
    root = Path(os.path.realpath(source))
    homes = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    belonging, left_out = [], []
    for path in sorted(Path(source).iterdir()):
        inner = sorted(path.iterdir()) if path.is_dir() and not path.is_symlink() else [path]
        for file in inner:
            known = TEMPLATES if file is not path else MODEL_FILES
            if path.name.startswith(".") or file.name.startswith(".") or WEIGHT_FILES.search(file.name):
                continue
            at_home = any(home in Path(os.path.realpath(file)).parents for home in homes)
            if known.search(file.name) and at_home and file.is_file():
                belonging.append(str(file.relative_to(source)))
            elif file.name != MANIFEST:
                left_out.append(str(file.relative_to(source)))
    return belonging, left_out


def _copy_other_files(source: Path, folder: Path) -> None:
    belonging, left_out = _other_files(source)
    for name in belonging:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)  # follows the links of a hub snapshot
    if left_out:
        more = f" and {len(left_out) - 10} more" if len(left_out) > 10 else ""
        log.info("not copied to the export, since it isn't a model's: %s%s", ", ".join(left_out[:10]), more)


def _write_configs(
    model: PreTrainedModel, source: Path, folder: Path, dtype: torch.dtype, num_assistant_tokens: int | None
) -> None:
    """The source's configuration with what the run changed in it, and the generation configuration."""
    original = (source / "config.json").read_text()
    raw = json.loads(original)
    ours, theirs = (config.get_text_config().to_dict() for config in (model.config, read_config(source)))
    changed = {key for key in theirs if ours.get(key) != theirs[key]} - {"dtype", "_name_or_path"}
    raw.get("text_config", raw).update({key: ours[key] for key in changed})
    for part in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        for key in part.keys() & {"dtype", "torch_dtype"}:
            part[key] = str(dtype).removeprefix("torch.")
    if raw != json.loads(original) or not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")

    if num_assistant_tokens is not None:
        file = folder / "generation_config.json"
        if not file.exists():
            GenerationConfig.from_model_config(model.config).save_pretrained(folder)
        generation = json.loads(file.read_text()) | {"num_assistant_tokens": num_assistant_tokens}
        file.write_text(json.dumps(generation, indent=2) + "\n")


def sync_files(folder: Path) -> None:
    """Sync the files of a folder to disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())


def _first(names: list[str], known: Iterable[str]) -> str | None:
    return next((name for name in names if name in known), None)
