"""The global sequence of rows: what is trained on, in which order, on however many ranks.

The sequence is a function of the sources' content, the seed and the ``data`` options alone. It is made window by
window: the documents of a window are drawn from the mixture, then packed into rows. Any window can be made without
those before it, so a position in the sequence is a window and a row of it.

The order comes from a hash of (seed, stream, index) and not from a random generator: it needs no state, and no release
of a library changes it.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from joint_train.data.cache import Tokenised
from joint_train.data.errors import DataError
from joint_train.data.packing import assemble, best_fit
from joint_train.data.template import ASSISTANT, LAST

logger = logging.getLogger(__name__)

WINDOW = 4096
"""Documents that are packed together. More fill the rows better; it takes about 10 ms to pack these."""

MASKS = {"assistant": ASSISTANT, "last_assistant": LAST, "all": None}


def hash64(index: np.ndarray, *key: int) -> np.ndarray:
    """A well-mixed 64-bit number for each index (splitmix64, Steele, Lea and Flood 2014, absorbing the key)."""
    state = np.uint64(0)
    for part in key:
        state = _mix(state ^ np.uint64(part % (1 << 64)))
    return _mix(index.astype(np.uint64) ^ state)


def _mix(x):
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def permutation(count: int, *key: int) -> np.ndarray:
    """An order of ``count`` things, ``[count]`` int64."""
    return np.argsort(hash64(np.arange(count), *key), kind="stable")


@dataclass
class Pieces:
    """What of a source goes into rows: all documents, cut and sorted out by ``data.overlong`` and ``data.train_on``.

    Attributes:
        source: the tokens.
        document, start, length: ``[N]`` of each piece.
    """

    source: Tokenised
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.document)


def cut(source: Tokenised, data) -> Pieces:
    """A source's pieces of at most ``data.max_length`` tokens, each with a target.

    Raises:
        DataError: a document has no target at all (``data.on_error=raise``), or nothing is left.
    """
    documents, mask = source.documents, MASKS[data.train_on]
    keep = np.ones(len(documents), dtype=bool)
    if mask is not None:
        keep = documents["targets"] > 0
        if not keep.all():
            message = f"{source.where(int(np.argmin(keep)))}: no target: nothing in it was written by the assistant"
            if data.on_error == "raise":
                raise DataError(message)
            logger.warning(
                "data source %r: %d examples without a target skipped, the first: %s",
                source.name,
                np.count_nonzero(~keep),
                message,
            )
    long = documents["length"] > data.max_length
    short = np.flatnonzero(keep & ~long)
    pieces = [np.stack([short, np.zeros_like(short), documents["length"][short]], axis=1)]
    lost = 0
    for document in np.flatnonzero(keep & long).tolist():
        length = int(documents["length"][document])
        starts = {"drop": [], "truncate": [0], "split": range(0, length, data.max_length)}[data.overlong]
        for start in starts:
            size = min(data.max_length, length - start)
            # The first token of a piece is nobody's target: nothing before it predicts it.
            flags = source.read(document, start + 1, size - 1)[1]
            if size > 1 and (mask is None or np.any(flags & mask)):
                pieces.append(np.array([[document, start, size]]))
            else:
                lost += 1
    table = np.concatenate(pieces)
    if long.any():
        logger.warning(
            "data source %r: %d of %d examples are longer than data.max_length=%d (data.overlong=%s)%s",
            source.name,
            np.count_nonzero(long),
            len(documents),
            data.max_length,
            data.overlong,
            f"; {lost} pieces of them without a target are left out" if lost else "",
        )
    if not len(table):
        raise DataError(
            f"data source {source.name!r}: nothing is left of its {len(documents)} examples with "
            f"data.max_length={data.max_length}, data.overlong={data.overlong}, data.train_on={data.train_on}"
        )
    table = table[np.lexsort((table[:, 1], table[:, 0]))]
    return Pieces(source, *table.T)


class RowSequence:
    """The rows, window by window.

    Args:
        sources: what they are made of.
        weights: of the sources in an endless mixture, by examples.
        data: the ``data`` group.
        seed: of the order.
        mixture: ``endless`` or ``epoch``.
        shuffle: False keeps the order of the sources and their files.
    """

    def __init__(self, sources: list[Pieces], weights: list[float], data, seed: int, mixture: str, shuffle: bool):
        self.sources, self.seed, self.mixture, self.shuffle = sources, seed, mixture, shuffle
        self.max_length, self.packing, self.mask = data.max_length, data.packing, MASKS[data.train_on]
        self.bounds = np.cumsum(np.asarray(weights, dtype=np.float64) / np.sum(weights))
        self.starts = np.cumsum([0, *map(len, sources)])
        self.windows_an_epoch = -(-int(self.starts[-1]) // WINDOW)
        # Per process, and not a decorator: a cache of the class would keep every sequence alive.
        self.window = lru_cache(maxsize=2)(self._window)
        self._order = lru_cache(maxsize=2 * len(sources) + 2)(self._make_order)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("window", "_order")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.window = lru_cache(maxsize=2)(self._window)
        self._order = lru_cache(maxsize=2 * len(self.sources) + 2)(self._make_order)

    def _window(self, window: int) -> list[np.ndarray]:
        """The rows of a window, each ``[documents, 2]``: source and piece."""
        documents = self._epoch_documents(window) if self.mixture == "epoch" else self._endless_documents(window)
        if not self.packing:
            return [documents[index : index + 1] for index in range(len(documents))]
        lengths = [int(self.sources[source].length[piece]) for source, piece in documents.tolist()]
        rows = [documents[row] for row in best_fit(lengths, self.max_length, sort=self.shuffle)]
        if self.shuffle:  # otherwise the rows are in the order of their first document: full ones first, here
            rows = [rows[index] for index in permutation(len(rows), self.seed, 2, window)]
        return rows

    def _epoch_documents(self, window: int) -> np.ndarray:
        epoch, window = divmod(window, self.windows_an_epoch)
        order = self._order(len(self.sources), epoch)[window * WINDOW : (window + 1) * WINDOW]
        source = np.searchsorted(self.starts, order, side="right") - 1
        return np.stack([source, order - self.starts[source]], axis=1)

    def _endless_documents(self, window: int) -> np.ndarray:
        drawn = self._draws(window * WINDOW, (window + 1) * WINDOW)
        before = np.zeros(len(self.sources), dtype=np.int64)
        for first in range(0, window * WINDOW, 1 << 20):
            draws = self._draws(first, min(first + (1 << 20), window * WINDOW))
            before += np.bincount(draws, minlength=len(self.sources))
        piece = np.empty(WINDOW, dtype=np.int64)
        for source, pieces in enumerate(self.sources):
            where = np.flatnonzero(drawn == source)
            epochs, index = np.divmod(before[source] + np.arange(len(where)), len(pieces))
            for epoch in np.unique(epochs).tolist():
                inside = epochs == epoch
                piece[where[inside]] = self._order(source, epoch)[index[inside]]
        return np.stack([drawn, piece], axis=1)

    def _draws(self, first: int, last: int) -> np.ndarray:
        """The sources of the documents [first, last) of the endless sequence."""
        uniform = (hash64(np.arange(first, last), self.seed, 1) >> np.uint64(11)) * 2.0**-53
        return np.minimum(np.searchsorted(self.bounds, uniform, side="right"), len(self.sources) - 1)

    def _make_order(self, source: int, epoch: int) -> np.ndarray:
        """The order of a source's pieces in an epoch; of all sources' for ``source == len(sources)``."""
        count = int(self.starts[-1]) if source == len(self.sources) else len(self.sources[source])
        return permutation(count, self.seed, 3, source, epoch) if self.shuffle else np.arange(count)

    def rows_an_epoch(self) -> int:
        """Rows of the first epoch of an ``epoch`` mixture (later ones may differ by a few)."""
        return sum(len(self._window(window)) for window in range(self.windows_an_epoch))

    def row(self, documents: np.ndarray, length: int) -> dict[str, np.ndarray]:
        """A row's arrays, ``[length]`` int64 each (see :func:`joint_train.data.packing.assemble`)."""
        parts = []
        for source, piece in documents.tolist():
            pieces = self.sources[source]
            tokens, flags = pieces.source.read(
                int(pieces.document[piece]), int(pieces.start[piece]), int(pieces.length[piece])
            )
            targets = np.ones(len(tokens), dtype=bool) if self.mask is None else (flags & self.mask) != 0
            parts.append((tokens, targets, source))
        return assemble(parts, length)

    def length_of(self, documents: np.ndarray) -> int:
        """Tokens of a row."""
        return sum(int(self.sources[source].length[piece]) for source, piece in documents.tolist())


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
