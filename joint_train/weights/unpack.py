"""Slices of packed tensors: what a format does to a matrix is a chain of the few steps below, each of which knows which
part of the step before it needs.

    codes = Bits(Transposed(qweight), 4)               # GPTQ: [in / 8, out] of int32 as [out, in] of 0 … 15
    Weight(codes, Grid(scales, codes.shape, (1, 128)), zeros)[rows, columns]

Everything has a ``shape`` and is indexed with a slice for each dimension, each with both its ends. A weight is
``(codes - zeros) * scales`` in float32: products of codes and scales are exact there, so that the only rounding is the
one to the dtype in which the model has the weight.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from joint_train.weights.stored import Stored

Part = tuple[slice, ...]
# Sign, two bits of exponent, one of mantissa: the 16 values of FP4 (OCP Microscaling Formats 1.0, E2M1).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# AWQ's kernels read the columns of a word in this order; its nibble i holds column AWQ_ORDER.index(i).
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


class Source(Protocol):
    """A tensor of which slices can be read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, part: Part) -> Tensor: ...


class Raw:
    """A tensor of the folder as it is there."""

    def __init__(self, stored: Stored):
        self.stored, self.shape = stored, stored.shape

    def __getitem__(self, part: Part) -> Tensor:
        return self.stored.slices()[part] if self.shape else self.stored.whole()


class Shaped:
    """A small tensor under another shape with as many elements: it is read whole."""

    def __init__(self, source: Source, shape: Sequence[int]):
        self.source, self.shape = source, tuple(shape)

    def __getitem__(self, part: Part) -> Tensor:
        return self.source[tuple(slice(0, n) for n in self.source.shape)].reshape(self.shape)[part]


class Transposed:
    """The last two dimensions swapped."""

    def __init__(self, source: Source):
        self.source, (*lead, rows, columns) = source, source.shape
        self.shape = (*lead, columns, rows)

    def __getitem__(self, part: Part) -> Tensor:
        *lead, rows, columns = part
        return self.source[(*lead, columns, rows)].transpose(-1, -2)


class Mapped:
    """A function of each element."""

    def __init__(self, source: Source, function: Any):
        self.source, self.function, self.shape = source, function, source.shape

    def __getitem__(self, part: Part) -> Tensor:
        return self.function(self.source[part])


class Bits:
    """Unsigned integers of a few bits, packed densely along the last dimension into uint8 or int32, the first in the
    lowest bits.

    Args:
        width: how many there are; by default as many as fit.
        order: for each value of a word, which one of its places holds it.
    """

    def __init__(self, source: Source, bits: int, width: int | None = None, order: Sequence[int] | None = None):
        self.source, self.bits, self.order = source, bits, order
        self.word = 8 if isinstance(source, Raw) and source.stored.dtype in ("U8", "I8") else 32
        *lead, words = source.shape
        self.shape = (*lead, words * self.word // bits if width is None else width)

    def __getitem__(self, part: Part) -> Tensor:
        *lead, columns = part
        first = columns.start * self.bits // self.word
        words = self.source[(*lead, slice(first, -(-columns.stop * self.bits // self.word)))]
        skipped = columns.start - first * self.word // self.bits  # values of the first word that aren't asked for
        count = columns.stop - columns.start
        if 8 % self.bits:
            return self._straddling(words, columns.start * self.bits - first * self.word, count)
        octets = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
        shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8)
        values = ((octets.unsqueeze(-1) >> shifts) & (2**self.bits - 1)).flatten(-2)
        if self.order is not None:
            places = torch.tensor(self.order)
            values = values.unflatten(-1, (-1, len(self.order)))[..., places].flatten(-2)
        return values[..., skipped : skipped + count]

    def _straddling(self, words: Tensor, bit: int, count: int) -> Tensor:
        """Values whose bits may lie in two words, from this bit on."""
        words = torch.nn.functional.pad(words.long() & (2**self.word - 1), (0, 1))
        starts = bit + self.bits * torch.arange(count)
        word, offset = starts // self.word, starts % self.word
        both = (words[..., word] >> offset) | (words[..., word + 1] << (self.word - offset))
        return (both & (2**self.bits - 1)).to(torch.uint8)


class Fp4:
    """Values of FP4, two in a byte, the first in the lower half."""

    def __init__(self, source: Source):
        self.codes = Bits(source, 4)
        self.shape = self.codes.shape

    def __getitem__(self, part: Part) -> Tensor:
        return torch.tensor(E2M1)[self.codes[part].long()]


class Grid:
    """A value for each block of a matrix ``[…, out, in]``, broadcast over the block.

    Args:
        source: ``[…, rows of blocks, columns of blocks]``; a dimension of 1 counts for all.
        shape: of the matrix.
        block: sizes of a block in its last two dimensions, where the shapes don't tell; with a dimension that it
            doesn't divide, the last block is smaller.
        groups: for each column the column of blocks that it belongs to, where they aren't consecutive.

    Raises:
        ValueError: if the blocks don't cover the matrix.
    """

    def __init__(
        self, source: Source, shape: Sequence[int], block: Sequence[int | None] = (), groups: Tensor | None = None
    ):
        self.source, self.shape, self.groups = source, tuple(shape), groups
        if len(source.shape) < len(shape):  # a scalar, or one for each row
            missing = (1,) * (len(shape) - len(source.shape))
            rows_first = source.shape[:1] == self.shape[:1]
            self.source = Shaped(source, (*source.shape, *missing) if rows_first else (*missing, *source.shape))
        given = [None] * (len(shape) - len(block)) + list(block)
        self.blocks = [self._block(n, there, b) for n, there, b in zip(shape, self.source.shape, given, strict=True)]

    def _block(self, size: int, there: int, given: int | None) -> int:
        if there in (1, size):
            return size // there
        block = given or (size // there if size % there == 0 else 0)
        if not block or (-(-size // block) != there and self.groups is None):
            raise ValueError(f"its {list(self.source.shape)} scales don't cover {list(self.shape)} values")
        return block

    def __getitem__(self, part: Part) -> Tensor:
        asked, groups = [], None
        for dim, (of, block, there) in enumerate(zip(part, self.blocks, self.source.shape, strict=True)):
            if dim == len(part) - 1 and self.groups is not None:
                groups = self.groups[of].long()
                asked.append(slice(0, there))
            elif there == 1:
                asked.append(slice(0, 1))
            else:
                asked.append(slice(of.start // block, -(-of.stop // block)))
        found = self.source[tuple(asked)].float()
        if groups is not None:
            found = found.index_select(-1, groups)
        for dim, (of, block, there) in enumerate(zip(part, self.blocks, self.source.shape, strict=True)):
            if there != 1 and block != 1 and not (groups is not None and dim == len(part) - 1):
                found = found.repeat_interleave(block, dim)
                found = found.narrow(dim, of.start % block, of.stop - of.start)
        return found


def ended(part: Any, shape: Sequence[int]) -> Part:
    """An index of slices with both ends of each, and a slice for each dimension."""
    given = () if part is ... else part if isinstance(part, tuple) else (part,)
    given += (slice(None),) * (len(shape) - len(given))
    return tuple(slice(*of.indices(size)[:2]) for of, size in zip(given, shape, strict=True))


class Weight:
    """``(codes - zeros) * scales`` in float32."""

    def __init__(self, codes: Source, scales: Source, zeros: Source | None = None):
        self.codes, self.scales, self.zeros, self.shape = codes, scales, zeros, codes.shape

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    def __getitem__(self, part: Any) -> Tensor:
        part = ended(part, self.shape)
        codes = self.codes[part].float()
        if self.zeros is not None:
            codes = codes - self.zeros[part]
        return codes * self.scales[part]


class Stacked:
    """The weights of experts, each with matrices of its own below one another, as one tensor ``[E, out, in]``.

    Args:
        experts: for each expert its matrices ``[out_i, in]``.
    """

    def __init__(self, experts: Sequence[Sequence[Stored]]):
        self.experts, first = experts, experts[0]
        self.shape = (len(experts), sum(matrix.shape[0] for matrix in first), first[0].shape[1])

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    def __getitem__(self, part: Any) -> Tensor:
        of, rows, columns = ended(part, self.shape)
        return torch.stack([self._rows(matrices, rows, columns) for matrices in self.experts[of]])

    def _rows(self, matrices: Sequence[Stored], rows: slice, columns: slice) -> Tensor:
        found, above = [], 0
        for matrix in matrices:
            start, stop = max(rows.start - above, 0), min(rows.stop - above, matrix.shape[0])
            if start < stop:
                found.append(matrix.slices()[slice(start, stop), columns].float())
            above += matrix.shape[0]
        return torch.cat(found)
