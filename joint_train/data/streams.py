"""Streamed datasets: tokenised as they come, in blocks that the ranks and workers of a machine share.

A block is the next ``BLOCK`` records of the stream. Whoever needs one first tokenises it into the cache, while the
others wait for that; so each record is read once on a machine, the sequence of rows is the same on any number of ranks
and workers, and a position in it is a number of records. A block keeps the dataset's own state at its end, and the next
one goes on from there, after a resume too.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from joint_train.data import cache, readers
from joint_train.data.cache_key import cache_key
from joint_train.data.json_files import Record
from joint_train.data.pieces import Order, Pieces, cut
from joint_train.errors import DataError
from joint_train.files import replace

BLOCK = 1024
IN_MEMORY = 16
"""Blocks that a process keeps mapped."""


class StreamPieces:
    """What of a stream goes into rows, in the order of its blocks, shuffled inside each.

    Args:
        source: a ``SourceConfig`` with ``streaming``.
        data: the ``data`` group.
        tokenizer: with a chat template, unless the source is plain text.
        timeout: seconds without progress of another process that tokenises a block.
    """

    def __init__(self, source, data, tokenizer, timeout: float):
        self.source, self.data, self.tokenizer, self.timeout = source, data, tokenizer, timeout
        self.name = readers.source_name(source)
        self.key = cache_key(source, data, tokenizer)
        self.root = cache.cache_folder(data) / f"{self.key}.stream"
        self._blocks: dict[int, tuple[int, Pieces]] = {}

    def draw(self, first: int, count: int, order: Order | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pieces of the stream's records [first, first + count), the stream repeated without end.

        Args:
            order: gives the order of a block's records from their number, the pass over the stream and the block; None:
                as they stand.

        Returns:
            Which of the ``count`` records each piece is of, the pass, and the piece: ``[N]`` each, since a record may
            have no piece, or several.
        """
        drawn: list[tuple[int, int, int]] = []
        position = first
        while position < first + count:
            lap, record = divmod(position, self.total or position + 1)
            number, offset = divmod(record, BLOCK)
            records, pieces = self.block(number)
            if offset >= records:  # the stream has ended: now ``total`` is known
                if self.total == 0:
                    raise DataError(f"data source {self.source.path}: the stream is empty")
                continue
            take = min(records - offset, first + count - position)
            lines = pieces.source.documents["line"][pieces.document]
            places = np.arange(records) if order is None else order(records, lap, number)
            for at, index in enumerate(places[offset : offset + take].tolist(), start=position - first):
                line = number * BLOCK + index + 1
                found = range(*np.searchsorted(lines, [line, line + 1]).tolist())
                drawn += [(at, lap, number << 32 | piece) for piece in found]
            position += take
        places, laps, piece = np.asarray(drawn, dtype=np.int64).reshape(-1, 3).T
        return places, laps, piece

    def lengths_of(self, pieces: np.ndarray) -> np.ndarray:
        """Tokens of some pieces."""
        return np.array([self.block(piece >> 32)[1].length[piece & 0xFFFFFFFF] for piece in pieces.tolist()], dtype=int)

    def read(self, piece: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and flags of a piece, both ``[T]``."""
        return self.block(piece >> 32)[1].read(piece & 0xFFFFFFFF)

    def pictures(self, piece: int) -> list[tuple[str | bytes, int, str]]:
        """The images of a piece: path or bytes, soft tokens, and ``file:line`` of the document."""
        return self.block(piece >> 32)[1].pictures(piece & 0xFFFFFFFF)

    def where(self, piece: int) -> str:
        """``file:line`` of a piece's document."""
        return self.block(piece >> 32)[1].where(piece & 0xFFFFFFFF)

    @property
    def skipped(self) -> int:
        """Records that were bad or had no target, in the blocks that this process holds."""
        return sum(pieces.skipped for _, pieces in self._blocks.values())

    @property
    def total(self) -> int | None:
        """Records of the stream, once its end has been seen."""
        try:
            return json.loads((self.root / "total.json").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _folder(self, number: int) -> Path:
        return self.root / f"{number:08}"

    def block(self, number: int) -> tuple[int, Pieces]:
        """How many records a block has, and the pieces of them."""
        if number not in self._blocks:
            cache.once(self._folder(number), lambda progressed: self._build(number, progressed), self.timeout)
            tokens, records = (
                cache.load(self._folder(number), self.source, self.data, number == 0),
                self._meta(number)["records"],
            )
            if records < BLOCK and self.total is None:
                # With no record the end was before this block, perhaps long before: after a resume without the cache.
                self._set_total(number * BLOCK + records if records else self._count())
            kept = dict(list(self._blocks.items())[1 - IN_MEMORY :])
            self._blocks = {**kept, number: (records, cut(tokens, self.data))}
        return self._blocks[number]

    def _meta(self, number: int) -> dict:
        return json.loads((self._folder(number) / cache.META).read_text())

    def _build(self, number: int, progressed: Callable[[], None]) -> None:
        dataset = readers.open_dataset(self.source)
        skipped = number
        if (self._folder(number - 1) / cache.META).exists():
            dataset.load_state_dict(self._meta(number - 1)["state"])
            skipped = 0
        # `iter(dataset)` would give a loader process only its share of the dataset's files.
        columns: dict[str, list] = next(itertools.islice(dataset.iter(batch_size=BLOCK), skipped, None), {})
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        state = dataset.state_dict()
        records = (Record(self.source.path, index, row) for index, row in enumerate(rows, start=number * BLOCK + 1))
        more = {"records": len(rows), "state": state}
        cache.write(self._folder(number), records, self.source, self.data, self.tokenizer, 0, progressed, more)

    def _count(self) -> int:
        return sum(1 for batch in readers.open_dataset(self.source).iter(batch_size=1))

    def _set_total(self, total: int) -> None:
        replace(self.root / "total.json", json.dumps(total))
