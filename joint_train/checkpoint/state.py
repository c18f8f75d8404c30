"""Weights, optimizer state and random state: between live objects and files, by name.

Names are those of the modules without parallelism (``torch.compile`` and activation checkpointing leave no mark), so a
checkpoint fits any number of ranks. Tied parameters are stored once, under the name that comes first in the module.
"""

import io
import os
import random
import zlib
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from joint_train.checkpoint.layout import AVERAGE, hex_checksum
from joint_train.checkpoint.reader import Reader, Unreadable, load_alone
from joint_train.distributed.lora import ADAPTER
from joint_train.distributed.ranks import Ranks
from joint_train.distributed.replicas import Replicas
from joint_train.errors import CheckpointError
from joint_train.pair.model import JointModel


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters (the very objects that the optimizer holds) and persistent buffers; tied ones once.

    Of a model with adapters these alone: the rest is frozen, and on disk in the folder that it came from.
    """
    seen, tensors, state = set(), {}, module.state_dict(keep_vars=True)
    if any(map(ADAPTER.search, state)):
        state = {name: tensor for name, tensor in state.items() if ADAPTER.search(name)}
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")] = tensor
    return tensors


def base_tensors(model: JointModel) -> dict[str, Tensor]:
    """What a checkpoint holds of the base: nothing, or its adapters, if its weights stay those of its folder."""
    tensors = named_tensors(model.base)
    stays = getattr(model, "base_stays", False) and not any(map(ADAPTER.search, tensors))
    return {} if stays else tensors


def pair_tensors(model: JointModel) -> dict[str, dict[str, Tensor]]:
    """Tensors of the two halves, and of the drafter's average if there is one, by the folder that each is stored in."""
    tensors = {"base/model": base_tensors(model), "drafter/model": named_tensors(model.drafter)}
    average = getattr(model, "drafter_average", None)
    return tensors if average is None else tensors | {AVERAGE: average}


def parameter_names(model: JointModel) -> dict[Tensor, str]:
    """``base.…`` and ``drafter.…`` names of the parameters."""
    return {
        tensor: f"{part.partition('/')[0]}.{name}"
        for part, tensors in pair_tensors(model).items()
        for name, tensor in tensors.items()
        if isinstance(tensor, nn.Parameter)
    }


def optimizer_tensors(model: JointModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Tensors of the optimizer's state as ``<parameter>/<entry>``; a parameter that never had a gradient has none."""
    names = parameter_names(model)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # states in CPU memory may still be on their way from the last update
    return {
        f"{names[parameter]}/{entry}": value
        for parameter, state in optimizer.state.items()
        for entry, value in state.items()
    }


class CompactState(Protocol):
    """An optimizer that makes its own state, see :class:`joint_train.train.compact.CompactAdamW`."""

    name: str

    def entries(self, parameter: Tensor) -> dict[str, tuple[torch.Size, torch.dtype]]: ...

    def zeros(self, parameter: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor: ...


def new_optimizer_state(
    model: JointModel, optimizer: torch.optim.Optimizer, stored: Mapping[str, TensorStorageMetadata]
) -> dict[Tensor, dict[str, Tensor]]:
    """Empty state, sharded like the parameters, for each trained parameter of which state is stored."""
    entries: dict[str, list[str]] = {}
    for key in stored:
        name, _, entry = key.rpartition("/")
        entries.setdefault(name, []).append(entry)
    names = parameter_names(model)
    state: dict[Tensor, dict[str, Tensor]] = {}
    compact = cast("CompactState", optimizer) if hasattr(optimizer, "entries") else None
    for group in optimizer.param_groups:
        # AdamW keeps its step counter on the CPU, except where a fused or captured kernel reads it.
        counter_on_device = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            if not parameter.requires_grad or names[parameter] not in entries:
                continue
            found = {
                entry: stored[f"{names[parameter]}/{entry}"] for entry in entries[names[parameter]] if entry != "step"
            }
            low_precision = compact is not None and compact.name != "adamw"
            if compact is not None and low_precision:
                expected = compact.entries(parameter)
                fits = {entry: (meta.size, meta.properties.dtype) for entry, meta in found.items()} == expected
            else:
                fits = found.keys() == {"exp_avg", "exp_avg_sq"}
            if not fits:
                raise CheckpointError(
                    f"the checkpoint's optimizer state of {names[parameter]} ({', '.join(found)}) is another "
                    "optimizer's: set optim.name (and precision.params) to what the checkpoint was saved with."
                )
            state[parameter] = {}
            for entry in entries[names[parameter]]:
                meta = stored[f"{names[parameter]}/{entry}"]
                dtype = meta.properties.dtype if low_precision or entry == "step" else parameter.dtype
                if compact is not None and entry != "step":
                    state[parameter][entry] = compact.zeros(parameter, meta.size, dtype)
                elif entry != "step":
                    state[parameter][entry] = torch.empty_like(parameter, requires_grad=False)
                else:
                    device = parameter.device if counter_on_device else "cpu"
                    state[parameter][entry] = torch.empty(meta.size, dtype=dtype, device=device)
    return state


class Staging:
    """CPU copies of this rank's shards, in buffers that are kept: memory once touched is copied to 10 times faster."""

    def __init__(self):
        self._buffers: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        copies = {part: {name: self._copy(part, name, t) for name, t in ts.items()} for part, ts in tensors.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _copy(self, part: str, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get((part, name))
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            pin = torch.cuda.is_available()
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pin)
            self._buffers[part, name] = buffer
        return buffer.copy_(tensor, non_blocking=True)


def local_shards(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's part of each tensor, detached, not copied."""
    return {name: (t.to_local() if isinstance(t, DTensor) else t).detach() for name, t in tensors.items()}


def save_tensors(
    folder: Path, tensors: dict[str, Tensor], shards: dict[str, Tensor], ranks: Ranks, key: str
) -> dict[str, tuple[int, str]]:
    """Write a distributed checkpoint: the shapes and shardings of ``tensors``, the data of ``shards``. Collective.

    Every file is on disk when this returns. Returns size and checksum of each file that this rank wrote.

    Args:
        key: names what is saved; a later save with the same key, shapes and shardings isn't planned anew, which at 512
            ranks takes minutes.
    """
    writer = dcp.FileSystemWriter(folder, sync_files=False)
    writer.fs = files = _ChecksumFileSystem()
    with _without_zip_checksums():
        dcp.save(
            tensors,
            storage_writer=writer,
            planner=_ShardPlanner(shards, key),
            process_group=ranks.group,
            no_dist=ranks.group is None,
        )
    return {path.name: (file.size, hex_checksum(file.crc)) for path, file in files.written.items()}


def load_tensors(reader: Reader, tensors: dict[str, Tensor], ranks: Ranks | None = None) -> None:
    """Read a distributed checkpoint into these tensors, in place, in any sharding. Collective with ``ranks``.

    With HSDP one replica reads, and the others get it from there.

    Raises:
        Unreadable: on all ranks.
    """
    if not tensors:
        return
    replicas = Replicas(tensors.values()) if ranks else None

    def read() -> None:
        if replicas is not None and not replicas.reads:
            return
        try:
            # Each rank plans what it reads by itself; there is nothing to agree on.
            planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            load_alone(tensors, reader, planner)
        except CheckpointException as error:
            wrapped = "; ".join(str(failure) for failure, _ in error.failures.values())
            raise Unreadable(f"loading {reader.folder} failed: {wrapped}") from None
        except Exception as error:
            raise Unreadable(f"loading {reader.folder} failed: {type(error).__name__}: {error}") from error

    if ranks is None or replicas is None:
        read()
        return
    ranks.all(f"loading {reader.folder}", read)
    replicas.share(tensors.values())


def random_state() -> dict:
    """States of Python's, NumPy's and torch's generators (CPU and this rank's GPU), of plain types and tensors."""
    numpy = np.random.get_state(legacy=False)
    numpy["state"]["key"] = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
    state = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict) -> None:
    random.setstate(state["python"])
    numpy = {**state["numpy"], "state": dict(state["numpy"]["state"])}
    numpy["state"]["key"] = numpy["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state(numpy)
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def derive_random_state(seed: int, step: int, rank: int) -> None:
    """Seed all generators for a rank that has no saved state: the number of ranks has changed."""
    derived = zlib.crc32(f"{seed} {step} {rank}".encode())
    random.seed(derived)
    np.random.seed(derived)
    torch.manual_seed(derived)


class _ShardPlanner(dcp.DefaultSavePlanner):
    """Plans from the tensors' shardings, writes the shards it is given: those may be copies on the CPU."""

    def __init__(self, shards: dict[str, Tensor], key: str):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False, enable_plan_caching=True)
        self._shards = shards
        self._cached_plans_key = key  # by the class's name otherwise: each part has its own (torch 2.13)

    def lookup_object(self, index) -> Tensor:
        return self._shards[index.fqn]


class _ChecksumFile(io.FileIO):
    """Counts and checksums what is written, and is on disk once closed."""

    size = crc = 0

    def write(self, data) -> int:
        count = super().write(data)
        written = memoryview(data)[:count]
        self.size += count
        self.crc = zlib.crc32(written, self.crc)
        return count

    def close(self) -> None:
        if not self.closed:
            try:
                os.fsync(self.fileno())
            finally:
                super().close()


class _ChecksumFileSystem(FileSystem):
    """The local file system, remembering what was written through it."""

    def __init__(self):
        self.written: dict[Path, _ChecksumFile] = {}

    @contextmanager
    def create_stream(self, path, mode: str):
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        raw = self.written[Path(path)] = _ChecksumFile(path, "w")
        with io.BufferedWriter(raw, 1 << 20) as stream:
            yield stream

    def rename(self, path, new_path) -> None:
        super().rename(path, new_path)
        self.written[Path(new_path)] = self.written.pop(Path(path))


@contextmanager
def _without_zip_checksums():
    """torch.save's own CRC-32 is slow (0.6 against 3 GB/s, measured) and every file has ours."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
