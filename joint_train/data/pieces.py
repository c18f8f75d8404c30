"""The pieces of a source that go into rows: its documents, cut and filtered by the ``data`` options."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from joint_train.config.values import unroll_limit
from joint_train.data.cache import Tokenised
from joint_train.data.template import ASSISTANT, LAST
from joint_train.data.tokenise import of_several
from joint_train.errors import DataError

logger = logging.getLogger(__name__)

Order = Callable[..., np.ndarray]

NO_TARGET = "no target: nothing in it was written by the assistant"
COSTLY = 3
"""That many times its tokens a conversation may cost before it is worth a warning."""
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
        return self.source.key

    def draw(self, first: int, count: int, order: Order | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pieces [first, first + count) of the source repeated without end, each time in an order of its own.

        Args:
            order: gives the order of a pass from the number of pieces and the pass's; None: as they stand.

        Returns:
            Which of the ``count`` each is, its pass, and the piece, ``[count]`` each.
        """
        laps, index = np.divmod(np.arange(first, first + count), len(self))
        if order is not None:
            for lap in np.unique(laps).tolist():
                inside = laps == lap
                index[inside] = order(len(self), lap)[index[inside]]
        return np.arange(count), laps, index

    def lengths_of(self, pieces: np.ndarray) -> np.ndarray:
        """Tokens of some pieces."""
        return self.length[pieces]

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
    keep = _unrolled(source, data)
    if mask is not None:
        empty = keep & (documents["targets"] == 0)
        if empty.any():
            message = f"{source.where(int(np.argmax(empty)))}: {NO_TARGET}"
            if data.on_error == "raise":
                raise DataError(message)
            logger.warning(
                "data source %r: %s documents without an answer are left out. The first of them:\n  %s",
                source.name,
                f"{np.count_nonzero(empty):,}",
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
            # The first token of a piece is never a target: nothing before it predicts it.
            flags = source.read(document, start + 1, size - 1)[1]
            if size > 1 and (mask is None or np.any(flags & mask)):
                pieces.append(np.array([[document, start, size]]))
            else:
                lost += 1
    if long.any():
        logger.warning(
            "data source %r: %s of %s documents (%s) are longer than data.max_length=%d and are %s (data.overlong=%s)"
            "%s",
            source.name,
            f"{np.count_nonzero(long):,}",
            f"{len(documents):,}",
            f"{np.count_nonzero(long) / len(documents):.1%}",
            data.max_length,
            {"truncate": "cut", "split": "split", "drop": "left out"}[data.overlong],
            data.overlong,
            f"; {lost:,} of the pieces have no answer in them and are left out" if lost else "",
        )
    table = np.concatenate(pieces)
    document, start, length = table[np.lexsort((table[:, 1], table[:, 0]))].T
    return Pieces(source, document, start, length, skipped=skipped)


def _unrolled(source: Tokenised, data) -> np.ndarray:
    """Which documents are kept, ``[N]`` bool, where the template makes several of a conversation, one for each answer.

    With ``data.train_on=assistant`` all are, or the last few that ``data.unroll`` says. Otherwise the last one has all
    that the earlier ones have.
    """
    documents = source.documents
    earlier = documents["earlier"]
    if data.train_on != "assistant":
        return ~earlier
    # How many documents of the same conversation come after each.
    last = np.flatnonzero(~earlier)
    after = last[np.searchsorted(last, np.arange(len(documents)))] - np.arange(len(documents))
    limit = unroll_limit(data.unroll)
    keep = np.ones(len(documents), dtype=bool) if limit is None else after < limit
    if earlier.any():
        lengths = documents["length"].astype(np.int64)
        several = of_several(documents)
        whole, kept = int(lengths[several & ~earlier].sum()), int(lengths[several & keep].sum())
        lost = np.count_nonzero(several & ~keep)
        logger.log(
            logging.WARNING if kept > COSTLY * whole or lost else logging.INFO,
            "data source %r: %d conversations are a document for each answer, since the template renders earlier turns "
            "otherwise than it prompts for them: %d documents of %d tokens, %.1f times the %d tokens of the "
            "conversations. %s",
            source.name,
            np.count_nonzero(several & ~earlier),
            np.count_nonzero(several & keep),
            kept,
            kept / whole,
            whole,
            f"The {lost} documents before the last {limit} of each are left out, with their answers (data.unroll)"
            if lost
            else "data.unroll='last N' trains only the last N answers of each",
        )
    return keep


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
