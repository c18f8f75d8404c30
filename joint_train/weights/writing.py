"""Sharded tensors into files: one rank writes a file, whatever the others hold of it, and another reads it back.

On a network file system two nodes that write into one page overwrite each other's part of it. So a file has one writer;
the ranks that hold its tensors send it their parts, in pieces, and no rank ever holds a whole model.
"""

import itertools
import math
import os
import queue
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from joint_train.errors import WeightsError

PIECE_BYTES = 64 * 2**20
WAITING = 4  # pieces that may wait for the disk


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in a file."""

    file: Path
    offset: int  # bytes from the start of the file
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Written:
    """Bytes that were written, and their CRC-32."""

    file: Path
    offset: int
    size: int
    checksum: int


def write_tensors(tensors: Mapping[str, Tensor], slots: Mapping[str, Slot]) -> list[Written]:
    """Write tensors into their slots of files that exist. Collective: every rank with the same keys.

    Args:
        tensors: sharded over this process group, or whole on every rank.
        slots: by the same keys.

    Returns:
        What this rank has written, on disk by then.

    Raises:
        OSError: the first error of this rank's writes, once all tensors are through.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    by_file: dict[Path, list[str]] = {}
    for key in tensors:
        by_file.setdefault(slots[key].file, []).append(key)
    writers = {file: number % ranks for number, file in enumerate(sorted(by_file))}
    # File by file, one rank would write while all others wait for it.
    in_turn = (key for keys in itertools.zip_longest(*by_file.values()) for key in keys if key is not None)
    pen = _Pen()
    try:
        for key in in_turn:
            for offset, piece in _pieces(tensors[key], slots[key], writers[slots[key].file], rank):
                pen.write(slots[key].file, offset, piece)
    finally:
        written = pen.close()
    return written


def check_written(mine: list[Written]) -> None:
    """Read back what another rank has written, which may be another machine's. Collective.

    Raises:
        WeightsError: if it isn't what was written.
    """
    of_rank, rank = [mine], 0
    if dist.is_initialized():
        rank, of_rank = dist.get_rank(), [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(of_rank, mine)
    for part in of_rank[(rank + 1) % len(of_rank)]:
        with open(part.file, "rb") as file:
            file.seek(part.offset)
            if zlib.crc32(file.read(part.size)) != part.checksum:
                raise WeightsError(
                    f"{part.file} isn't what was written: bytes {part.offset} to {part.offset + part.size} differ. The "
                    "file system lost or changed them; the export is not put in place. Export again, to another disk"
                )


def _pieces(tensor: Tensor, slot: Slot, writer: int, rank: int) -> Iterator[tuple[int, Tensor]]:
    """(offset in the file, bytes) of a tensor's pieces, on the rank that writes them; the others send theirs."""
    row = math.prod(slot.shape[1:]) * slot.dtype.itemsize
    if not isinstance(tensor, DTensor):
        if rank == writer:
            flat = tensor.detach().reshape(-1)
            step = PIECE_BYTES // slot.dtype.itemsize
            for start in range(0, flat.numel(), step):
                yield slot.offset + start * slot.dtype.itemsize, _bytes(flat[start : start + step], slot.dtype).cpu()
        return
    local = tensor.to_local().detach()
    sharded = next(((i, p) for i, p in enumerate(tensor.placements) if isinstance(p, Shard)), None)
    if sharded is None:
        yield from _pieces(local, slot, writer, rank)
        return
    number, placement = sharded
    group = tensor.device_mesh.get_group(number)
    members = dist.get_process_group_ranks(group)
    if writer not in members:
        return  # another replica's ranks send this one
    size = slot.shape[placement.dim]
    shares = [placement.local_shard_size_and_offset(size, len(members), i) for i in range(len(members))]
    rows = max(share for share, _ in shares) if placement.dim == 0 else slot.shape[0]
    step = max(1, PIECE_BYTES // max(1, row if placement.dim else row * len(members)))
    for start in range(0, rows, step):
        shape = list(slot.shape)
        shape[0] = min(step, rows - start)
        if placement.dim:
            shape[placement.dim] = shares[0][0]  # it divides evenly
        mine = local.new_zeros(shape)
        held = local[start : start + shape[0]]
        mine[: len(held)] = held
        mine = _bytes(mine, slot.dtype)
        parts = [torch.empty_like(mine) for _ in members] if rank == writer else None
        dist.gather(mine, parts, dst=writer, group=group)
        if parts is None:
            continue
        if placement.dim:
            whole = torch.cat([part.view(slot.dtype).view(shape) for part in parts], dim=placement.dim)
            yield slot.offset + start * row, _bytes(whole, slot.dtype).cpu()
        else:
            for part, (share, first) in zip(parts, shares, strict=True):
                count = min(share - start, shape[0])
                if count > 0:
                    yield slot.offset + (first + start) * row, part[: count * row].cpu()


def _bytes(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).contiguous().view(-1).view(torch.uint8)


class _Pen:
    """Writes in a thread of its own, so that other ranks' files get on meanwhile. After an error it writes nothing."""

    def __init__(self) -> None:
        self.written: list[Written] = []
        self.error: Exception | None = None
        self._queue: queue.Queue[tuple[Path, int, Tensor] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._run, name="export", daemon=True)
        self._thread.start()

    def write(self, file: Path, offset: int, piece: Tensor) -> None:
        self._queue.put((file, offset, piece))

    def close(self) -> list[Written]:
        """Wait until all is on disk."""
        self._queue.put(None)
        self._thread.join()
        if self.error is not None:
            raise self.error
        return self.written

    def _run(self) -> None:
        files: dict[Path, object] = {}
        try:
            while (work := self._queue.get()) is not None:
                if self.error is None:
                    try:
                        self.put(files, *work)
                    except Exception as error:
                        self.error = error
        finally:
            for file in files.values():
                try:
                    sync(file)
                except OSError as error:
                    self.error = self.error or error

    def put(self, files: dict, file: Path, offset: int, piece: Tensor) -> None:
        if file not in files:
            files[file] = open(file, "r+b")  # noqa: SIM115 - closed by sync
        data = piece.numpy().data
        files[file].seek(offset)
        files[file].write(data)
        self.written.append(Written(file, offset, len(data), zlib.crc32(data)))


def sync(file) -> None:
    """Put a file that was written on disk, and close it."""
    with file:
        file.flush()
        os.fsync(file.fileno())
