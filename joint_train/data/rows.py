"""The global sequence of rows: what is trained on, in which order, on however many ranks.

The sequence is a function of the sources' content, the seed and the ``data`` options alone. It is made window by
window: the documents of a window are drawn from the mixture, then packed into rows. Any window can be made without
those before it, so a position in the sequence is a window and a row of it.
"""

from collections.abc import Iterator

import numpy as np

from joint_train.data.order import permutation, uniform
from joint_train.data.packing import assemble, best_fit
from joint_train.data.pieces import MASKS, Pieces
from joint_train.data.streams import StreamPieces
from joint_train.data.template import IMAGE
from joint_train.errors import DataError

WINDOW = 4096
"""Documents that are packed together. More fill the rows better; it takes about 20 ms to pack these."""

# What the orders are for, in the keys of their hashes.
DRAWS, ROWS, DOCUMENTS = 1, 2, 3


class RowSequence:
    """The rows, window by window.

    Args:
        sources: what they are made of.
        weights: of the sources in an endless mixture, by examples.
        data: the ``data`` group.
        seed: of the order.
        mixture: ``endless`` or ``epoch``; a stream can only be in an endless one.
        shuffle: False keeps the order of the sources and their files.
    """

    def __init__(
        self, sources: list[Pieces | StreamPieces], weights: list[float], data, seed: int, mixture: str, shuffle: bool
    ):
        self.sources, self.seed, self.mixture, self.shuffle = sources, seed, mixture, shuffle
        self.max_length, self.packing, self.mask = data.max_length, data.packing, MASKS[data.train_on]
        self.bounds = np.cumsum(np.asarray(weights, dtype=np.float64) / np.sum(weights))
        if mixture == "epoch":
            self.starts = np.cumsum([0, *(len(source) for source in sources if isinstance(source, Pieces))])
            self.windows_an_epoch = -(-int(self.starts[-1]) // WINDOW)
        self._drawn_before = (0, np.zeros(len(sources), dtype=np.int64))
        self._made: dict[int, list[np.ndarray]] = {}

    def window(self, number: int) -> list[np.ndarray]:
        """The rows of a window, each ``[documents, 2]`` int64: source and piece. The last two are kept."""
        if number not in self._made:
            self._made = {**dict(list(self._made.items())[-1:]), number: self._make(number)}
        return self._made[number]

    def _make(self, window: int) -> list[np.ndarray]:
        documents = self._epoch_documents(window) if self.mixture == "epoch" else self._endless_documents(window)
        if not self.packing:
            return [documents[index : index + 1] for index in range(len(documents))]
        lengths = [self.sources[source].length_of(piece) for source, piece in documents.tolist()]
        rows = [documents[row] for row in best_fit(lengths, self.max_length, sort=self.shuffle)]
        if self.shuffle:  # best fit makes the rows of the longest documents first
            rows = [rows[index] for index in permutation(len(rows), self.seed, ROWS, window)]
        return rows

    def _epoch_documents(self, window: int) -> np.ndarray:
        epoch, window = divmod(window, self.windows_an_epoch)
        count = int(self.starts[-1])
        order = permutation(count, self.seed, DOCUMENTS, len(self.sources), epoch) if self.shuffle else np.arange(count)
        order = order[window * WINDOW : (window + 1) * WINDOW]
        source = np.searchsorted(self.starts, order, side="right") - 1
        return np.stack([source, order - self.starts[source]], axis=1)

    def _endless_documents(self, window: int) -> np.ndarray:
        drawn, before = self._draws(window * WINDOW, (window + 1) * WINDOW), self._counts_before(window)
        # A stream's record has no piece if it is bad, and several if it is split: so each source's pieces keep their
        # order, and stand where its draws do.
        where, documents = [], []
        for source, pieces in enumerate(self.sources):
            places = np.flatnonzero(drawn == source)
            if len(places):
                key = (self.seed, DOCUMENTS, source)
                piece = pieces.draw(int(before[source]), len(places), self.shuffle, *key)
                documents.append(np.stack([np.full(len(piece), source), piece], axis=1))
                where.append(places[np.minimum(np.arange(len(piece)), len(places) - 1)])
        if not any(map(len, documents)):
            raise DataError(f"{WINDOW} examples in a row have nothing to train on: see data.on_error and data.overlong")
        return np.concatenate(documents)[np.argsort(np.concatenate(where), kind="stable")]

    def _draws(self, first: int, last: int) -> np.ndarray:
        """The sources of the draws [first, last) of the endless sequence."""
        drawn = np.searchsorted(self.bounds, uniform(first, last, self.seed, DRAWS), side="right")
        return np.minimum(drawn, len(self.sources) - 1)

    def _counts_before(self, window: int) -> np.ndarray:
        """How often each source was drawn before a window. Goes on from the last one that was asked for."""
        known, counts = self._drawn_before
        if known > window:
            known, counts = 0, np.zeros_like(counts)
        for number in range(known, window):
            draws = self._draws(number * WINDOW, (number + 1) * WINDOW)
            counts = counts + np.bincount(draws, minlength=len(self.sources))
        self._drawn_before = (window, counts)
        return counts

    def rows_an_epoch(self) -> int:
        """Rows of the first epoch of an ``epoch`` mixture (later ones may differ by a few)."""
        return sum(len(self._make(window)) for window in range(self.windows_an_epoch))

    def row(self, documents: np.ndarray, length: int) -> dict[str, np.ndarray]:
        """A row's arrays, ``[length]`` int64 each (see :func:`joint_train.data.packing.assemble`)."""
        parts = []
        for source, piece in documents.tolist():
            tokens, flags = self.sources[source].read(piece)
            targets = (flags & IMAGE) == 0 if self.mask is None else (flags & self.mask) != 0
            parts.append((tokens, targets, source))
        return assemble(parts, length)

    def pictures(self, documents: np.ndarray) -> list[tuple[str | bytes, int, str]]:
        """The images of a row, in order: path or bytes, soft tokens, and ``file:line`` of the document."""
        return [found for source, piece in documents.tolist() for found in self.sources[source].pictures(piece)]

    def length_of(self, documents: np.ndarray) -> int:
        """Tokens of a row."""
        return sum(self.sources[source].length_of(piece) for source, piece in documents.tolist())


class Cursor:
    """Walks the sequence forward from a position, counting rows from there."""

    def __init__(self, sequence: RowSequence, window: int, row: int):
        self.sequence, self.start = sequence, (window, row)
        self._rewind()

    def _rewind(self) -> None:
        # Row number ``first`` of the walk is row 0 of ``window``.
        self.window, self.first = self.start[0], -self.start[1]

    def locate(self, index: int) -> tuple[int, int]:
        """The window, and the row in it, of the walk's row ``index``."""
        if index < self.first:
            self._rewind()
        while index - self.first >= (size := len(self.sequence.window(self.window))):
            self.window, self.first = self.window + 1, self.first + size
        return self.window, index - self.first

    def rows(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """The walk's rows [start, stop), as :meth:`RowSequence.window` gives them."""
        for index in range(start, stop):
            window, row = self.locate(index)
            yield self.sequence.window(window)[row]
