"""Safetensors files that are laid out before they are written: sizes, headers, and where each tensor goes."""

import json
import math
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from joint_train.errors import ConfigError, WriteError
from joint_train.weights.writing import Slot

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SAFETENSORS_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}


def parse_size(size: str | int) -> int:
    """Bytes of "5GB", "500MB", "2GiB" or a plain number.

    Raises:
        ConfigError: if it isn't one.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", str(size).strip())
    unit = (found[2] or "B").upper() if found else None
    if found is None or unit not in UNITS or float(found[1]) <= 0:
        raise ConfigError(f"model.export.max_shard_size={size}: give a size such as 5GB, 500MB or 2GiB.")
    return int(float(found[1]) * UNITS[unit])


def plan_shards(layout: dict[str, tuple[tuple[int, ...], torch.dtype]], most: int) -> list[list[str]]:
    """Distribute tensors over files of at most `most` bytes, in the order given."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, (shape, dtype) in layout.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += nbytes
    return shards


def header(keys: Iterable[str], layout: dict) -> tuple[bytes, dict[str, int]]:
    """A safetensors header, and the offset of each tensor from the start of the file.

    Format: 8 bytes of little-endian length, then JSON, padded to 8 bytes; tensors of large elements first, so that each
    is aligned to its own (https://github.com/huggingface/safetensors#format).
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, position = {}, 0
    for key in sorted(keys, key=lambda k: (-layout[k][1].itemsize, k)):
        shape, dtype = layout[key]
        end = position + math.prod(shape) * dtype.itemsize
        entries[key] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        offsets[key], position = position, end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {key: start + offset for key, offset in offsets.items()}


def file_names(count: int) -> list[str]:
    """As transformers names so many files."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def slots_of(shards: list[list[str]], layout: dict, folder: Path) -> list[dict[str, Slot]]:
    """Where each tensor lies, for each file of ``folder``."""
    return [
        {key: Slot(folder / name, offset, *layout[key]) for key, offset in header(keys, layout)[1].items()}
        for name, keys in zip(file_names(len(shards)), shards, strict=True)
    ]


def write_headers(folder: Path, shards: list[list[str]], layout: dict) -> None:
    """Create each file at its final size with its header, and the index if there are several."""
    sizes = {key: math.prod(shape) * dtype.itemsize for key, (shape, dtype) in layout.items()}
    # The files get their blocks only when they are filled: where there are none, a mapped one ends the process.
    free, needed = shutil.disk_usage(folder).free, sum(sizes.values())
    if needed > free:
        raise WriteError(
            f"{folder} can't be written: it needs {needed / 1e9:.3g} GB, and {free / 1e9:.3g} are free. Free space "
            "there, or use another folder"
        )
    names = file_names(len(shards))
    for name, keys in zip(names, shards, strict=True):
        start, _ = header(keys, layout)
        with open(folder / name, "wb") as file:
            file.write(start)
            file.truncate(len(start) + sum(sizes[key] for key in keys))
    if len(names) > 1:
        index = {
            "metadata": {
                "total_size": sum(sizes.values()),
                "total_parameters": sum(math.prod(shape) for shape, _ in layout.values()),
            },
            "weight_map": {key: name for name, keys in zip(names, shards, strict=True) for key in sorted(keys)},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def mapped(slot: Slot) -> Tensor:
    """A tensor that is the slot's bytes on disk."""
    count = math.prod(slot.shape)
    if count == 0:
        return torch.empty(slot.shape, dtype=slot.dtype)
    array = np.memmap(slot.file, np.uint8, "r+", slot.offset, (count * slot.dtype.itemsize,))
    return torch.from_numpy(array).view(slot.dtype).reshape(slot.shape)
