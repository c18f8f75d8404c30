"""The global sequence of rows: what is trained on, in which order, on however many ranks.

The sequence is a function of the sources' content, the seed and the ``data`` options alone. Each source is repeated
without end, every pass over it in another order, and the passes of all sources are interleaved by their weights. Rows
are packed from that one after the other, out of the next few dozen documents, so a position in the sequence is a place
in the interleaving and the documents before it that no row had space for.

Whatever is packed with what, each document of a source comes once before any comes again, and a row has a document
twice only if it has every other document of that source. In an ``epoch`` mixture that holds for all sources as one.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from joint_train.data.order import fractions, permutation
from joint_train.data.packing import LOOKAHEAD, assemble, fullest
from joint_train.data.pieces import MASKS, Pieces
from joint_train.data.streams import StreamPieces
from joint_train.data.template import IMAGE
from joint_train.errors import DataError

BLOCK = 1024
"""Documents of the interleaving that are made at a time."""
EMPTY_BLOCKS = 64
"""That many in a row without a document end a run whose streams have nothing to train on."""
CHOSEN = 4
"""How many documents of a row, by their mean length, are chosen to fill it; those before them come as they stand."""

# What the orders are for, in the keys of their hashes.
PLACES, DOCUMENTS = 1, 3


class Document(NamedTuple):
    """A document of the interleaving.

    Attributes:
        source: its index.
        lap: which pass over the source it belongs to.
        piece: of the source.
        length: in tokens.
    """

    source: int
    lap: int
    piece: int
    length: int


class RowSequence:
    """What the rows are made of.

    Args:
        sources: what they are made of.
        weights: of the sources in an endless mixture, by examples.
        data: the ``data`` group.
        seed: of the order.
        mixture: ``endless`` or ``epoch``, where sources have weights by their sizes; a stream can only be in an endless
            one.
        shuffle: False keeps the order of the sources and their files.
        epochs: where the sequence ends; None: it has no end.

    Attributes:
        size: pieces of all sources together, the documents of an epoch; None: a stream is among them.
        shares: ``[sources]`` of each source, by examples.
        documents: how many there are before the end; None: there is none.
    """

    def __init__(
        self,
        sources: list[Pieces | StreamPieces],
        weights: list[float],
        data,
        seed: int,
        mixture: str,
        shuffle: bool,
        epochs: float | None = None,
    ):
        self.sources, self.seed, self.mixture, self.shuffle = sources, seed, mixture, shuffle
        self.max_length, self.packing, self.mask = data.max_length, data.packing, MASKS[data.train_on]
        # A stream's length isn't known, or only on some machines: nothing depends on it.
        self.sizes = [len(source) if isinstance(source, Pieces) else None for source in sources]
        self.size = None if None in self.sizes else sum(size or 0 for size in self.sizes)
        parts = self.sizes if mixture == "epoch" else weights
        self.shares = np.asarray(parts, dtype=np.float64) / np.sum(np.asarray(parts, dtype=np.float64))
        self.documents: int | None = None
        if epochs is not None:
            assert self.size is not None, "a stream has no epochs"
            self.documents = max(1, round(epochs * self.size))
        self._orders: list[dict[tuple[int, ...], np.ndarray]] = [{} for _ in sources]
        # What is gone through as one, and how many documents each has.
        self.groups = [0] * len(sources) if mixture == "epoch" else list(range(len(sources)))
        self.group_sizes = [self.size] if mixture == "epoch" else self.sizes
        self._made: tuple[int, list[Document]] = (-1, [])

    def epoch(self, documents: int) -> float | None:
        """How many times all documents have been seen after so many of them; None for a stream."""
        return documents / self.size if self.size else None

    def passes(self, rows: int) -> list[tuple[str, float]]:
        """Name of each source that isn't a stream, and about how often so many rows go through it."""
        documents = rows * self.documents_a_row()
        return [
            (source.name, documents * share / size)
            for source, share, size in zip(self.sources, self.shares.tolist(), self.sizes, strict=True)
            if size
        ]

    def documents_a_row(self) -> float:
        """About how many documents a row has, by the mean length of those of the sources that aren't streams."""
        known = {i: size for i, size in enumerate(self.sizes) if size}
        if not (self.packing and known):
            return 1.0
        lengths = [float(self.sources[i].lengths_of(np.arange(size)).mean()) for i, size in known.items()]
        return self.max_length / float(np.average(lengths, weights=self.shares[list(known)]))

    def block(self, number: int) -> list[Document]:
        """The documents of a part of the interleaving, about ``BLOCK`` of them."""
        if self._made[0] != number:
            self._made = (number, self._make(number))
        return self._made[1]

    def _make(self, number: int) -> list[Document]:
        # Time runs so that all sources together have a document in a unit of it; the j-th document of a source with a
        # share w comes at a random moment of [j / w, (j + 1) / w). So its share holds to a document, at every moment.
        begin, end = number * BLOCK, (number + 1) * BLOCK
        times, parts = [], []
        for index, (source, share) in enumerate(zip(self.sources, self.shares.tolist(), strict=True)):
            low, high = max(0, int(begin * share) - 2), int(end * share) + 2
            count = np.arange(low, high)
            time = (count + (fractions(count, self.seed, PLACES, index) if self.shuffle else 0.5)) / share
            inside = (begin <= time) & (time < end)
            if not inside.any():
                continue
            count, time = count[inside], time[inside]
            order = (lambda size, *key, index=index: self._order(index, size, *key)) if self.shuffle else None
            drawn, lap, piece = source.draw(int(count[0]), len(count), order)
            times.append(time[drawn])
            parts.append(np.stack([np.full(len(piece), index), lap, piece, source.lengths_of(piece)], axis=1))
        if not parts:
            return []
        table = np.concatenate(parts)[np.argsort(np.concatenate(times), kind="stable")]
        return [Document(*row) for row in table.tolist()]

    def _order(self, source: int, size: int, *key: int) -> np.ndarray:
        """An order of a source's pass; the last two are kept, for each source."""
        kept = self._orders[source]
        if key not in kept:
            order = permutation(size, self.seed, DOCUMENTS, source, *key)
            self._orders[source] = kept = {**dict(list(kept.items())[-1:]), key: order}
        return kept[key]

    def count_rows(self) -> int:
        """Rows before the end of the sequence: quick without packing, about 20 s for a million rows with it."""
        assert self.documents is not None, "a sequence without an end has no number of rows"
        return sum(1 for _ in Walk(self)) if self.packing else self.documents

    def row(self, documents: Iterable[Document], length: int) -> dict[str, np.ndarray]:
        """A row's arrays, ``[length]`` int64 each (see :func:`joint_train.data.packing.assemble`)."""
        parts = []
        for document in documents:
            tokens, flags = self.sources[document.source].read(document.piece)
            targets = (flags & IMAGE) == 0 if self.mask is None else (flags & self.mask) != 0
            parts.append((tokens, targets, document.source))
        return assemble(parts, length)

    def pictures(self, documents: Iterable[Document]) -> list[tuple[str | bytes, int, str]]:
        """The images of a row, in order: path or bytes, soft tokens, and ``file:line`` of the document."""
        return [found for document in documents for found in self.sources[document.source].pictures(document.piece)]


class Walk(Iterator[list[Document]]):
    """Goes through the rows from a position, each a list of documents in the order of the interleaving's passes.

    Args:
        sequence: what the rows are made of.
        position: what :attr:`position` was; None: the start.

    Attributes:
        rows: how many rows there are before it, from the start of the sequence.
    """

    def __init__(self, sequence: RowSequence, position: dict[str, Any] | None = None):
        self.sequence = sequence
        position = position or {"rows": 0, "documents": 0, "block": 0, "offset": 0, "left": []}
        self.rows = position["rows"]
        self._pulled = position["documents"] + len(position["left"])
        self._block, self._offset = position["block"], position["offset"]
        lengths = [sequence.sources[source].lengths_of(np.array([piece])) for source, _, piece in position["left"]]
        self._pool = [
            Document(source, lap, piece, int(length[0]))
            for (source, lap, piece), length in zip(position["left"], lengths, strict=True)
        ]

    @property
    def position(self) -> dict[str, Any]:
        """The position, in plain types: rows and documents before it, the place in the interleaving, and what was left
        there."""
        return {
            "rows": self.rows,
            "documents": self._pulled - len(self._pool),
            "block": self._block,
            "offset": self._offset,
            "left": [list(document[:3]) for document in self._pool],
        }

    def __next__(self) -> list[Document]:
        self._pull(1)
        if not self._pool:
            raise StopIteration
        row = self._packed() if self.sequence.packing else [self._pool.pop(0)]
        self.rows += 1
        return row

    def _pull(self, count: int) -> None:
        """Take documents from the interleaving until ``count`` wait for a row, or there are no more."""
        end = self.sequence.documents
        if end is not None:
            count = min(count, len(self._pool) + end - self._pulled)
        empty = 0
        while len(self._pool) < count:
            block = self.sequence.block(self._block)
            taken = block[self._offset : self._offset + count - len(self._pool)]
            self._pool += taken
            self._offset += len(taken)
            self._pulled += len(taken)
            if self._offset == len(block) and len(self._pool) < count:
                self._block, self._offset = self._block + 1, 0
                empty = 0 if block else empty + 1
                if empty == EMPTY_BLOCKS:
                    raise DataError(
                        f"{empty * BLOCK} examples in a row have nothing to train on: see data.on_error and "
                        "data.overlong"
                    )

    def _packed(self) -> list[Document]:
        row: list[Document] = []
        space = self.sequence.max_length
        inside, copies = Counter[int](), Counter[tuple[int, int]]()

        def take(documents: list[Document]) -> None:
            nonlocal space
            for document in documents:
                row.append(document)
                space -= document.length
                inside[self.sequence.groups[document.source]] += 1
                copies[document.source, document.piece] += 1

        self._pull(LOOKAHEAD)
        reserve = CHOSEN * sum(document.length for document in self._pool) // len(self._pool)
        while True:
            taken = self._first(space - reserve, not row, inside, copies, take)
            self._pull(LOOKAHEAD)
            found = [at for at in self._open(inside, copies) if self._pool[at].length <= space]
            chosen = [found[index] for index in fullest([self._pool[at].length for at in found], space)]
            take([self._pool[at] for at in chosen])
            for at in reversed(chosen):
                del self._pool[at]
            if not space or not (taken or chosen):
                return row

    def _first(self, space: int, first: bool, inside, copies, take) -> bool:
        """Take documents as they stand, as far as there is space for them; one, at least, if the row has none."""
        left: list[Document] = []
        behind: dict[int, int] = {}
        at, taken = 0, False
        while len(left) <= LOOKAHEAD:
            if at == len(self._pool):
                self._pull(at + LOOKAHEAD)
                if at == len(self._pool):
                    break
            document = self._pool[at]
            group = self.sequence.groups[document.source]
            if behind.get(group, document.lap) != document.lap or self._is_repeated(document, inside, copies):
                behind.setdefault(group, document.lap)
                left.append(document)
            elif document.length <= space or first:
                take([document])
                space -= document.length
                first, taken = False, True
            else:
                break
            at += 1
        self._pool[:at] = left
        return taken

    def _open(self, inside, copies) -> Iterator[int]:
        """The places in the pool of what may go into the row now: the rest of one pass only, over each source."""
        laps: dict[int, int] = {}
        for at, document in enumerate(self._pool[: 2 * LOOKAHEAD]):
            group = self.sequence.groups[document.source]
            if laps.setdefault(group, document.lap) == document.lap and not self._is_repeated(document, inside, copies):
                yield at

    def _is_repeated(self, document: Document, inside, copies) -> bool:
        """Whether the row has a document already, and not yet every other one of its source as often."""
        group = self.sequence.groups[document.source]
        size = self.sequence.group_sizes[group]
        return copies[document.source, document.piece] > (inside[group] // size if size else 0)
