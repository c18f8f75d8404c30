"""What a run changes in a folder's weights when it reads them: adapters that are merged, tables with more rows.

    W' = W + Σ scale · B A         in float32, rounded once, when it is written into the model's weight
    E' = [E; mean(E); mean(E); …]

Everything that reads a folder's tensors reads them through :meth:`Changes.view`, slice by slice: a rank merges the
slice that it holds, and no weight is ever whole. A folder that is read as it is has :data:`UNCHANGED`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from joint_train.weights.stored import Stored

# The ends of the names of the tensors that have a row for each token.
TABLES = ("embed_tokens.weight", "embed_tokens_per_layer.weight", "lm_head.weight", "token_ordering")


@dataclass(frozen=True)
class Delta:
    """scale · B A, which an adapter adds to a weight ``[out, in]``.

    Attributes:
        a: ``[r, in]`` of any floating-point dtype, or what reads slices of it.
        b: ``[out, r]``, the same.
    """

    a: Any
    b: Any
    scale: float

    def part(self, rows: slice, columns: slice) -> Tensor:
        """The part ``[rows, columns]`` in float32."""
        return self.scale * (self.b[rows, :].float() @ self.a[:, columns].float())


@dataclass
class Changes:
    """The changes of one model.

    Attributes:
        rows: of every table of :data:`TABLES`; None: as many as the folder has.
        new_rows: what each row beyond the folder's is, ``[H]`` float32, by the folder's key.
        deltas: what is added to a weight, in turn, by the model's name of it.
        wholes: what stands in the place of a tensor, by the model's name of it: a tensor, or what reads slices of one.
        digest: tells these changes from others; empty without any.
    """

    rows: int | None = None
    new_rows: dict[str, Tensor] = field(default_factory=dict)
    deltas: dict[str, list[Delta]] = field(default_factory=dict)
    wholes: dict[str, Any] = field(default_factory=dict)
    digest: str = ""

    def shape(self, key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that a tensor of the folder has in the model."""
        grows = self.rows is not None and key.endswith(TABLES) and shape[0] < self.rows
        return (self.rows or 0, *shape[1:]) if grows else shape

    def view(self, stored: Stored, key: str, name: str) -> "View":
        """What reads slices of a tensor as the model gets it.

        Args:
            stored: the tensor in the folder.
            key, name: the folder's name of the tensor as transformers writes it today, and the model's.
        """
        source = self.wholes[name] if name in self.wholes else stored.slices()
        return View(source, self.shape(key, shape_of(source)), self.deltas.get(name, []), self.new_rows.get(key))


UNCHANGED = Changes()


@dataclass(frozen=True)
class View:
    """Slices of a tensor with its changes. Of what is added to or appended, they are float32."""

    source: Any
    shape: tuple[int, ...]
    deltas: Sequence[Delta] = ()
    new_row: Tensor | None = None

    def __getitem__(self, part: tuple[slice, ...]) -> Tensor:
        # Each slice has both its ends.
        first, *rest = part
        there = shape_of(self.source)[0]
        if first.stop > there:
            if self.new_row is None:
                raise IndexError(f"rows {first.start} to {first.stop} of a tensor of {there}")
            old = [self[(slice(first.start, there), *rest)].float()] if first.start < there else []
            new = self.new_row[tuple(rest)]
            return torch.cat([*old, new.expand(first.stop - max(first.start, there), *new.shape)])
        found = self.source[tuple(part)]
        for delta in self.deltas:
            found = found.float() + delta.part(first, rest[0])
        return found

    def whole(self) -> Tensor:
        """All of it."""
        if not self.shape:
            return self.source[...]
        return self[tuple(slice(0, size) for size in self.shape)]


def shape_of(source: Any) -> tuple[int, ...]:
    """The shape of a tensor, or of what reads slices of one."""
    return tuple(source.shape if isinstance(source, Tensor) else source.get_shape())


def mean_rows(tables: Mapping[str, Stored], rows: int, wholes: Mapping[str, Any]) -> dict[str, Tensor]:
    """For each table with less than so many rows the mean of its rows, ``[H]`` float32, by its key.

    transformers draws new rows around that mean with a billionth of the rows' covariance (``mean_resizing``), which
    bfloat16 can't hold beside it.

    Args:
        tables: tensors of a folder, by key; others are passed over.
        wholes: what stands in the place of a table, by key.
    """
    means = {}
    for key, stored in tables.items():
        if not key.endswith(TABLES) or key.endswith("token_ordering"):
            continue
        table = wholes[key] if key in wholes else stored.slices()
        there, width = shape_of(table)
        if there >= rows:
            continue
        total, step = torch.zeros(width, dtype=torch.float64), max(1, 2**24 // width)
        for start in range(0, there, step):
            total += table[start : min(start + step, there)].double().sum(0)
        means[key] = (total / there).float()
    return means


def file_digest(file: Path) -> str:
    """sha256 of a file's contents."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
