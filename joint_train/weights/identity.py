"""What tells the weights of one folder from those of another, without reading all of them."""

import functools
import hashlib
import json
import os
from pathlib import Path

import torch

from joint_train.distributed.agreement import agree
from joint_train.distributed.ranks import Ranks
from joint_train.weights.changes import UNCHANGED, Changes
from joint_train.weights.loading import check_weights, stored_in_files, stored_tensors
from joint_train.weights.quantised import quantization_config
from joint_train.weights.stored import check_token_ordering

SAMPLE_BYTES = 4096


def check_folders(folders: dict[str, Path], ranks: Ranks | None) -> None:
    """Check the weights of a pair's folders, by part, and that all ranks have the same. Collective with `ranks`.

    Raises:
        WeightsError: for weights that aren't what their export wrote, and a token ordering that is none.
        ConfigError: if ranks have different weights.
    """
    for part, folder in folders.items():
        if ranks is not None:
            files = ranks.all(f"reading {folder}", functools.partial(fingerprints, folder))
            mine = {f"{part}/{name}": fingerprint for name, fingerprint in files.items()}
            agree(ranks, "weights", mine, {f"{part}/{name}": str(folder / name) for name in files})
        check_weights(folder, ranks)
        check_token_ordering(stored_tensors(folder), folder)


def fingerprints(folder: Path) -> dict[str, str]:
    """What tells the files of a model from others, by name: of weights the header, and bytes from the start, the middle
    and the end of every tensor; of ``config.json`` all."""
    found = {"config.json": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()}
    for path in sorted({entry.file for entry in stored_in_files(folder).values()}):
        if path.suffix == ".gguf":
            found[str(path.relative_to(folder))] = _samples(path)
            continue
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length)
            digest = hashlib.sha256(header)
            for key, entry in sorted(json.loads(header).items()):
                if key == "__metadata__":
                    continue
                start, end = entry["data_offsets"]
                for offset in sorted({start, (start + end) // 2, max(start, end - SAMPLE_BYTES)}):
                    file.seek(8 + length + offset)
                    digest.update(file.read(min(SAMPLE_BYTES, end - offset)))
        found[str(path.relative_to(folder))] = digest.hexdigest()
    return found


def _samples(path: Path, count: int = 1024) -> str:
    """A hash of a file's size and of pieces of it that lie evenly apart."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for number in range(count):
            file.seek(number * size // count)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def frozen_base(folder: str | os.PathLike, changes: Changes = UNCHANGED, quantization: str = "none") -> dict[str, str]:
    """A folder and what tells its weights from others: a checkpoint of adapters names them so.

    The hash is over the headers (names, shapes, dtypes) and the first row of every tensor, since fine-tuned models have
    the headers of what they were made from. How the tensors are spread over files doesn't count. Adapters that were
    merged into them do, rows that were added, and what the folder says of how its weights are quantised.

    Args:
        quantization: ``model.quantization``.
    """
    digest = hashlib.sha256(changes.digest.encode())
    if (config := quantization_config(Path(folder))) is not None:
        digest.update(json.dumps(config, sort_keys=True).encode())
    for key, entry in sorted(stored_in_files(folder).items()):
        digest.update(f"{key} {entry.shape} {entry.dtype}".encode())
        few = len(entry.shape) < 2
        row = entry.whole() if few else entry.slices()[(slice(0, 1),) * (len(entry.shape) - 1)]
        digest.update(row.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {"folder": os.fspath(folder), "hash": digest.hexdigest(), "quantization": quantization}
