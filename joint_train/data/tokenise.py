"""Records to tokens, in worker processes."""

import gc
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from joint_train.config import DataConfig, SourceConfig
from joint_train.data import formats, images, sources, template
from joint_train.data.answers import Text
from joint_train.data.formats import Adapted
from joint_train.data.json_files import Record
from joint_train.data.seen import Seen
from joint_train.errors import DataError

CHUNK_RECORDS = 64
CHUNK_BYTES = 1 << 20

DOCUMENT = np.dtype(
    [
        ("offset", np.int64),  # of its first token
        ("length", np.int32),
        ("targets", np.int32),  # tokens that an assistant wrote
        ("line", np.int64),
        ("file", np.int32),
        ("earlier", bool),  # a later document of the same record has more of the conversation
    ]
)


def of_several(documents: np.ndarray) -> np.ndarray:
    """Which documents (``[N]`` DOCUMENT) are of a record that has several, ``[N]`` bool."""
    several = documents["earlier"].copy()
    several[1:] |= documents["earlier"][:-1]
    return several


PICTURE = np.dtype(
    [
        ("document", np.int64),
        ("position", np.int32),  # in the document, of the token that begins it
        ("tokens", np.int32),  # soft tokens, without those that begin and end it
        ("offset", np.int64),  # of its path or its bytes
        ("size", np.int64),
        ("embedded", bool),  # bytes, not a path
    ]
)


@dataclass
class Chunk:
    """The tokens of some records, as the workers send them, and what was seen in them.

    Attributes:
        errors: of bad records; with ``data.on_error=raise`` there is at most one, and nothing after it.
        records: how many were read.
    """

    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    flags: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    documents: np.ndarray = field(default_factory=lambda: np.empty(0, DOCUMENT))
    files: list[str] = field(default_factory=list)
    pictures: np.ndarray = field(default_factory=lambda: np.empty(0, PICTURE))
    picture_data: bytes = b""
    errors: list[str] = field(default_factory=list)
    records: int = 0
    seen: Seen = field(default_factory=Seen)


class Tokenise(torch.utils.data.Dataset):
    """What a worker does: lists of records in, chunks out."""

    def __init__(self, source: SourceConfig, on_error: str, tokenizer):
        self.source, self.on_error, self.tokenizer = source, on_error, tokenizer

    def __getitem__(self, records: list[Record]) -> Chunk:
        encoded: list[template.Document] = []
        lines: list[int] = []
        pictures, picture_data = [], bytearray()
        chunk = Chunk(records=len(records))
        for record, rendered in self._rendered(records, chunk.seen):
            try:
                if isinstance(rendered, DataError):
                    raise rendered
                found = documents_of(record, rendered, self.tokenizer)
            except DataError as error:
                chunk.errors.append(str(error))
                if self.on_error == "raise":
                    break
                continue
            if rendered.notices:
                chunk.seen.count_notices(rendered.notices, f"{record.file}:{record.line}")
            for document, places in found:
                for position, count, reference in places:
                    data = reference.encode() if isinstance(reference, str) else reference
                    embedded = isinstance(reference, bytes)
                    pictures.append((len(lines), position, count, len(picture_data), len(data), embedded))
                    picture_data += data
                encoded.append(document)
                lines.append(record.line)
                chunk.files.append(record.file)
        lengths = np.array([len(document.tokens) for document in encoded], dtype=np.int64)
        chunk.documents = np.zeros(len(encoded), dtype=DOCUMENT)
        chunk.documents["offset"] = np.cumsum(lengths) - lengths
        chunk.documents["length"], chunk.documents["line"] = lengths, lines
        chunk.documents["targets"] = [np.count_nonzero(d.flags & template.ASSISTANT) for d in encoded]
        chunk.documents["earlier"] = [document.earlier for document in encoded]
        if encoded:
            chunk.tokens = np.concatenate([document.tokens for document in encoded])
            chunk.flags = np.concatenate([document.flags for document in encoded])
        chunk.pictures, chunk.picture_data = np.array(pictures, dtype=PICTURE), bytes(picture_data)
        return chunk

    def _rendered(self, records: list[Record], seen: Seen) -> list[tuple[Record, "Rendered | DataError"]]:
        """The records up to the first bad one, as texts. All are rendered before the first is tokenised: a processor
        whose caches hold one kind of work does it in two thirds of the time."""
        found: list[tuple[Record, Rendered | DataError]] = []
        for record in records:
            try:
                adapted = sources.understand(record, self.source)
                seen.count_record(adapted)
                found.append((record, render(record, adapted, self.tokenizer)))
            except DataError as error:
                found.append((record, error))
                if self.on_error == "raise":
                    break
        return found


@dataclass
class Rendered:
    """A record as texts.

    Attributes:
        example: that the record is.
        texts: that are trained on.
        notices: counts of what is worth knowing, by the kinds of :mod:`joint_train.data.notices`.
    """

    example: dict[str, Any]
    texts: list[Text]
    notices: Counter[str]


def encode_record(
    record: Record, source: SourceConfig, tokenizer, notices: Counter[str] | None = None
) -> list[tuple[template.Document, list[tuple[int, int, str | bytes]]]]:
    """The documents of a record, each with (position, soft tokens, path or bytes) of its images.

    Args:
        notices: counts what is worth knowing, see :mod:`joint_train.data.notices`.

    Raises:
        DataError: what is wrong with it, with file and line.
    """
    rendered = render(record, sources.understand(record, source), tokenizer)
    if notices is not None:
        notices.update(rendered.notices)
    return documents_of(record, rendered, tokenizer)


def render(record: Record, adapted: Adapted, tokenizer) -> Rendered:
    """A record as texts.

    Raises:
        DataError: what is wrong with it, with file and line.
    """
    counts = Counter[str]()
    with _named(record):
        formats.refuse_empty_answers(adapted.example)
        return Rendered(adapted.example, template.texts(adapted.example, tokenizer, counts), counts)


def documents_of(
    record: Record, rendered: Rendered, tokenizer
) -> list[tuple[template.Document, list[tuple[int, int, str | bytes]]]]:
    """See :func:`encode_record`."""
    with _named(record):
        return [
            images.expand(
                template.tokenise(text, tokenizer), images.of_messages(rendered.example, text.messages), tokenizer
            )
            for text in rendered.texts
        ]


@contextmanager
def _named(record: Record) -> Iterator[None]:
    """Errors with the file and the line of a record."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{record.file}:{record.line}: {error}") from None
    except Exception as error:  # whatever a template or a tokenizer makes of odd values deep inside an example
        raise DataError(f"{record.file}:{record.line}: {type(error).__name__}: {error}") from error


def tokenise(
    records: Iterable[Record],
    source: SourceConfig,
    data: DataConfig,
    tokenizer,
    num_workers: int,
    on_error: str | None = None,
) -> Iterator[Chunk]:
    """The tokens of records, chunk by chunk in their order.

    Args:
        num_workers: processes that work; 0: this one.
        on_error: instead of ``data.on_error``.
    """
    # A full collection looks through the half a million objects of the imported libraries, here and in each process
    # that is forked: a tenth of the time of tokenising.
    gc.freeze()
    try:
        yield from _loader(records, source, data, tokenizer, num_workers, on_error)
    finally:
        gc.unfreeze()


def _loader(
    records: Iterable[Record],
    source: SourceConfig,
    data: DataConfig,
    tokenizer,
    num_workers: int,
    on_error: str | None,
) -> Iterable[Chunk]:
    # DataLoader is the pool of processes: it reads ahead a bounded number of chunks, keeps their order, notices a
    # worker that dies, and raises a worker's error here.
    return torch.utils.data.DataLoader(
        Tokenise(source, on_error or data.on_error, tokenizer),
        batch_size=None,
        sampler=_batches(records),
        num_workers=num_workers,
        collate_fn=_identity,  # type: ignore[arg-type]  # with batch_size=None it gets one element, no list
    )


def _identity(chunk: Chunk) -> Chunk:
    return chunk


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch, size = [], 0
    for record in records:
        batch.append(record)
        size += len(record.data) if isinstance(record.data, bytes) else 0
        if len(batch) == CHUNK_RECORDS or size >= CHUNK_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
