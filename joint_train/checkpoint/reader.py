"""Reading a distributed checkpoint of untrusted origin: it can't run code, and no path leads out of its folder.

torch.distributed.checkpoint (2.13) keeps its ``.metadata`` as a pickle and reads it with ``pickle.load``, which runs
whatever the file says. Here only the classes that describe tensors are let in. Tensors it reads by ``torch.load`` with
``weights_only``; anything else that could be stored beside tensors isn't, and is refused.
"""

import io
import pathlib
import pickle
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as described
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from joint_train.checkpoint.layout import DamagedCheckpoint, hex_checksum, stays_inside
from joint_train.torch_private import pickled_in_checkpoints

ALLOWED: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    **pickled_in_checkpoints(),
    # A folder's own name in its metadata, of which nothing is made here.
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib", "WindowsPath"): pathlib.PureWindowsPath,
    ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,
}
for name in (
    "Metadata",
    "TensorStorageMetadata",
    "TensorProperties",
    "ChunkStorageMetadata",
    "MetadataIndex",
    "StorageMeta",
):
    ALLOWED["torch.distributed.checkpoint.metadata", name] = getattr(described, name)


class Unreadable(DamagedCheckpoint):
    """Reading tensors failed on some rank, and so on all of them."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no tensor")
        return ALLOWED[module, name]


def load_alone(
    tensors: dict[str, torch.Tensor], reader: "Reader", planner: dcp.DefaultLoadPlanner | None = None
) -> None:
    """Read tensors of a checkpoint in this process, whatever the others do, without torch's warning that it is so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        dcp.load(tensors, storage_reader=reader, planner=planner, no_dist=True)


class Reader(dcp.FileSystemReader):
    """Reads one distributed checkpoint's folder.

    Args:
        folder: with a ``.metadata`` and its files.
        metadata: what is in ``.metadata``, if it was read already.
        checksums: whether to take the checksums of what is read on the way (:meth:`whole_files`).
        progress: is called with how many bytes are read, and of how many.
    """

    def __init__(
        self,
        folder: Path,
        metadata: Metadata | None = None,
        checksums: bool = False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        super().__init__(folder)
        self.folder, self._metadata, self.checksums = Path(folder), metadata, checksums
        self._progress, self._done, self._total = progress, 0, 0
        self._read: dict[str, tuple[int, int]] = {}  # by file: how far it was read from its start, and the CRC-32 of it

    def read_data(self, plan: Any, planner: Any) -> Any:
        """In the order of the files, so that one that is read whole is read from its start to its end."""

        def place(item: Any) -> tuple[str, int]:
            stored = self.storage_data[item.storage_index]
            return stored.relative_path, stored.offset

        self._done, self._total = 0, sum(self.storage_data[item.storage_index].length for item in plan.items)
        return super().read_data(replace(plan, items=sorted(plan.items, key=place)), planner)

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        self._progress(self._done, self._total)
        self._done += sinfo.length
        if not self.checksums:
            return super()._slice_file(file, sinfo)
        file.seek(sinfo.offset)
        data = file.read(sinfo.length)
        end, crc = self._read.get(sinfo.relative_path, (0, 0))
        if end == sinfo.offset:  # else a gap, or read before
            self._read[sinfo.relative_path] = end + len(data), zlib.crc32(data, crc)
        return io.BytesIO(data)

    def whole_files(self, sizes: dict[str, int]) -> dict[str, str]:
        """Checksums (CRC-32 in hex) of those files that were read from the first byte to the last.

        Args:
            sizes: in bytes, by the file's path in this folder.
        """
        return {name: hex_checksum(crc) for name, (end, crc) in self._read.items() if end == sizes.get(name)}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises DamagedCheckpoint if it can't be read, holds anything but tensors, or a file outside the folder."""
        if self._metadata is None:
            try:
                with open(self.folder / ".metadata", "rb") as file:
                    self._metadata = self._checked(file)
            except OSError as error:
                raise DamagedCheckpoint(f"{self.folder / '.metadata'} can't be read: {error.strerror}") from None
        return self._metadata

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Sizes and dtypes of what it holds; raises as :meth:`read_metadata` does."""
        return cast(dict[str, TensorStorageMetadata], self.read_metadata().state_dict_metadata)

    def _checked(self, file: Any) -> Metadata:
        try:
            metadata = _Unpickler(file).load()
            stored = metadata.state_dict_metadata.values()
            if not all(isinstance(of_one, TensorStorageMetadata) for of_one in stored):
                raise ValueError("it holds other things than tensors")
            if outside := [
                of.relative_path for of in metadata.storage_data.values() if not stays_inside(of.relative_path)
            ]:
                raise ValueError(f"it names {outside[0]}, which is not in the folder")
        except Exception as error:  # a damaged pickle can raise anything
            raise DamagedCheckpoint(f"{self.folder / '.metadata'} is refused: {error}") from None
        return metadata


def stored_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Sizes and dtypes of the tensors in a distributed checkpoint."""
    return Reader(folder).tensors()
