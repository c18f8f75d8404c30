"""A tensor of a model's folder, as its header tells, and what reads slices of it."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from joint_train.errors import WeightsError

# safetensors' names of the dtypes that a floating-point weight may be read from.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Slices(Protocol):
    """What reads slices of a tensor: safetensors' own, or of a quantised weight its values in float32."""

    def get_shape(self) -> Any: ...

    def __getitem__(self, part: Any) -> Tensor: ...


@dataclass(frozen=True)
class Stored:
    """A tensor in a folder, as the headers of its files tell: nothing of it is read.

    Attributes:
        file: that holds it; of a quantised weight that of its codes.
        shape: of the tensor; of a quantised weight as the model has it.
        dtype: safetensors' name, e.g. "BF16"; of a quantised weight "F32", as which it is read.
        key: its name in the file.
        weight: of a quantised weight what dequantises slices of it.
        parts: of a quantised weight the tensors that it is made of.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    key: str
    weight: Slices | None = None
    parts: tuple["Stored", ...] = ()

    def slices(self) -> Slices:
        """What reads slices of it."""
        return self.weight or opened(self.file).get_slice(self.key)

    def whole(self) -> Tensor:
        """All of it."""
        return self.weight[...] if self.weight else opened(self.file).get_tensor(self.key)


def opened(file: Path) -> Any:
    """A safetensors file, open for reading. It stays open: a quantised weight has its tensors in up to five places."""
    status = os.stat(file)
    return _opened(file, status.st_mtime_ns, status.st_size, status.st_ino)


def close_files() -> None:
    """Close what :func:`opened` opened."""
    _opened.cache_clear()


@functools.lru_cache(maxsize=64)
def _opened(file: Path, *_: int) -> Any:
    return safe_open(file, framework="pt")


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
