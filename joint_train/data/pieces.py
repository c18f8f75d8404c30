"""What of a source goes into rows: its documents, cut and sorted out by the ``data`` options."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from joint_train.data.cache import Tokenised
from joint_train.data.order import permutation
from joint_train.data.template import ASSISTANT, LAST
from joint_train.errors import DataError

logger = logging.getLogger(__name__)

NO_TARGET = "no target: nothing in it was written by the assistant"
MASKS = {"assistant": ASSISTANT, "last_assistant": LAST, "all": None}


@dataclass
class Pieces:
    """Pieces of a source's documents.

    Attributes:
        source: the tokens.
        document, start, length: ``[N]`` of each piece; ascending in (document, start).
        skipped: how many of its records were bad or had no target.
    """

    source: Tokenised
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.document)

    @property
    def name(self) -> str:
        """Of the source, in the metrics."""
        return self.source.name

    @property
    def key(self) -> str:
        """A hash of the content."""
        return self.source.folder.name

    def draw(self, first: int, count: int, shuffle: bool, *key: int) -> np.ndarray:
        """The pieces [first, first + count) of the source repeated without end, each time in an order of its own."""
        epochs, index = np.divmod(np.arange(first, first + count), len(self))
        if shuffle:
            for epoch in np.unique(epochs).tolist():
                inside = epochs == epoch
                index[inside] = permutation(len(self), *key, epoch)[index[inside]]
        return index

    def length_of(self, piece: int) -> int:
        """Tokens of a piece."""
        return int(self.length[piece])

    def read(self, piece: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and flags of a piece, both ``[T]``."""
        return self.source.read(int(self.document[piece]), int(self.start[piece]), int(self.length[piece]))

    def pictures(self, piece: int) -> list[tuple[str | bytes, int, str]]:
        """The images of a piece: path or bytes, soft tokens, and ``file:line`` of the document."""
        document, source = int(self.document[piece]), self.source
        if not len(source.pictures):
            return []
        found = source.pictures_of(document, int(self.start[piece]), int(self.length[piece]))
        return [(source.picture(index), int(source.pictures["tokens"][index]), self.where(piece)) for index in found]

    def where(self, piece: int) -> str:
        """``file:line`` of a piece's document."""
        return self.source.where(int(self.document[piece]))


def cut(source: Tokenised, data) -> Pieces:
    """A source's pieces of at most ``data.max_length`` tokens, each with a target.

    Raises:
        DataError: a document has no target at all (``data.on_error=raise``).
    """
    documents, mask = source.documents, MASKS[data.train_on]
    skipped = source.skipped
    # Where the template makes several documents of a conversation, the last one has all that the earlier ones have.
    keep = np.ones(len(documents), dtype=bool) if data.train_on == "assistant" else ~documents["earlier"]
    if mask is not None:
        empty = keep & (documents["targets"] == 0)
        if empty.any():
            message = f"{source.where(int(np.argmax(empty)))}: {NO_TARGET}"
            if data.on_error == "raise":
                raise DataError(message)
            logger.warning(
                "data source %r: %d examples without a target skipped, the first: %s",
                source.name,
                np.count_nonzero(empty),
                message,
            )
            keep &= ~empty
            skipped += int(np.count_nonzero(empty))
    long = documents["length"] > data.max_length
    short = np.flatnonzero(keep & ~long)
    pieces = [np.stack([short, np.zeros_like(short), documents["length"][short]], axis=1)]
    lost = 0
    for document in np.flatnonzero(keep & long).tolist():
        for start, size in _parts(source, document, data):
            # The first token of a piece is nobody's target: nothing before it predicts it.
            flags = source.read(document, start + 1, size - 1)[1]
            if size > 1 and (mask is None or np.any(flags & mask)):
                pieces.append(np.array([[document, start, size]]))
            else:
                lost += 1
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
    table = np.concatenate(pieces)
    document, start, length = table[np.lexsort((table[:, 1], table[:, 0]))].T
    return Pieces(source, document, start, length, skipped=skipped)


def _parts(source: Tokenised, document: int, data) -> Iterator[tuple[int, int]]:
    """Start and length of what ``data.overlong`` leaves of a document that is too long. No image is cut in two."""
    if data.overlong == "drop":
        return
    length, start = int(source.documents["length"][document]), 0
    while start < length:
        end = min(start + data.max_length, length)
        if end < length:
            held = source.pictures[source.pictures_of(document, start, end - start)]
            for position, tokens in zip(held["position"].tolist(), held["tokens"].tolist(), strict=True):
                if position + tokens + 2 > end:
                    end = position
        if end == start:  # an image longer than a row
            return
        yield start, end - start
        if data.overlong == "truncate":
            return
        start = end
