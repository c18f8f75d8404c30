"""Tokenised sources on disk, keyed by content.

A source is tokenised once, by worker processes, into a folder of flat arrays that every rank and worker maps into
memory. The folder's name is a hash of all that its content depends on (the files' bytes, the tokenizer, the template,
the format), so nothing in it can be out of date. It is written under another name and renamed when it is whole, so
nobody sees half of one. A file lock makes one process build while the others of the machine wait; the kernel drops the
lock of a process that dies, and a holder that makes no progress ends the wait with an error.

What the cache holds doesn't depend on ``max_length``, ``overlong``, ``packing``, ``train_on`` or the mixture.
"""

import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import filelock
import numpy as np
import tokenizers
import transformers

from joint_train.config import DataConfig, SourceConfig
from joint_train.data import notices, readers
from joint_train.data.json_files import Record
from joint_train.data.seen import Seen
from joint_train.data.tokenise import DOCUMENT, PICTURE, tokenise
from joint_train.errors import DataError

logger = logging.getLogger(__name__)

VERSION = 5
META = "meta.json"
REPORTED = 20
LOG_SECONDS = 10


@dataclass
class Tokenised:
    """A source's tokens.

    Attributes:
        name: of the source, in the metrics.
        folder: of the arrays.
        documents: ``[N]`` DOCUMENT.
        pictures: ``[M]`` PICTURE, ascending in (document, position).
        files: what ``documents["file"]`` counts.
        skipped: how many records were bad.
        errors: the messages of the first of them.
    """

    name: str
    folder: Path
    documents: np.ndarray
    pictures: np.ndarray
    files: list[str]
    skipped: int
    errors: list[str]

    @cached_property
    def _tokens(self) -> np.ndarray:
        return np.memmap(self.folder / "tokens.bin", dtype=np.int32, mode="r")

    @cached_property
    def _flags(self) -> np.ndarray:
        return np.memmap(self.folder / "flags.bin", dtype=np.uint8, mode="r")

    def __getstate__(self) -> dict:
        # A memory map is pickled as a copy of the file.
        return {key: value for key, value in self.__dict__.items() if key not in ("_tokens", "_flags")}

    def read(self, document: int, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and flags, both ``[length]``, of a part of a document."""
        first = int(self.documents["offset"][document]) + start
        return self._tokens[first : first + length], self._flags[first : first + length]

    def pictures_of(self, document: int, start: int, length: int) -> np.ndarray:
        """The pictures (indices) that begin in a part of a document."""
        first, last = np.searchsorted(self.pictures["document"], [document, document + 1])
        position = self.pictures["position"][first:last]
        return first + np.flatnonzero((position >= start) & (position < start + length))

    def picture(self, index: int) -> str | bytes:
        """A picture's path or bytes."""
        picture = self.pictures[index]
        with open(self.folder / "pictures.bin", "rb") as stream:
            stream.seek(int(picture["offset"]))
            data = stream.read(int(picture["size"]))
        return data if picture["embedded"] else data.decode()

    def where(self, document: int) -> str:
        """``file:line`` of a document."""
        return f"{self.files[self.documents['file'][document]]}:{self.documents['line'][document]}"


def cache_folder(data: DataConfig) -> Path:
    """Where tokenised data is kept: ``data.cache_dir``."""
    return Path(data.cache_dir or Path.home() / ".cache" / "joint_train" / "data").expanduser()


def tokenised(source: SourceConfig, data: DataConfig, tokenizer, num_workers: int, timeout: float) -> Tokenised:
    """A source's tokens, from the cache or made now.

    Args:
        source: a ``SourceConfig``.
        data: the ``data`` group.
        tokenizer: with a chat template, unless the source is plain text.
        num_workers: worker processes that tokenise; 0: this process.
        timeout: seconds without progress of another process that builds the same, before giving up.

    Raises:
        DataError: a bad example (``data.on_error=raise``), or no good one.
        TimeoutError: another process holds the cache's lock and makes no progress.
    """
    folder = cache_folder(data) / cache_key(source, data, tokenizer)

    def build(progressed: Callable[[], None]) -> None:
        records = readers.read_records(source, data.max_line_bytes)
        write(folder, records, source, data, tokenizer, num_workers, progressed)

    once(folder, build, timeout)
    cached = load(folder, source, data)
    if not len(cached.documents):
        raise DataError(f"data source {source.path}: no usable example in it ({cached.skipped} bad records)")
    return cached


def load(folder: Path, source: SourceConfig, data: DataConfig, first: bool = True) -> Tokenised:
    """What :func:`write` wrote.

    Args:
        first: say what was seen in it; False for the later blocks of a stream.

    Raises:
        DataError: there were bad records and ``data.on_error=raise``, or ``columns`` name one that no record has.
    """
    meta = json.loads((folder / META).read_text())
    name = readers.source_name(source)
    if meta["skipped"]:
        if data.on_error == "raise":
            raise DataError(meta["errors"][0])
        logger.warning(
            "data source %r: %d bad records skipped (data.on_error=skip), the first: %s",
            name,
            meta["skipped"],
            "; ".join(meta["errors"][:3]),
        )
    documents = np.load(folder / "documents.npy")
    pictures = np.load(folder / "pictures.npy")
    if first:
        _say(name, source, Seen.from_json(meta["seen"]))
    return Tokenised(name, folder, documents, pictures, source_files(source), meta["skipped"], meta["errors"])


def _say(name: str, source: SourceConfig, seen: Seen) -> None:
    if not seen.formats:
        return
    nowhere = sorted(set(source.columns.values()) - seen.columns)
    if nowhere:
        raise DataError(
            f"data source {name!r}: columns name {', '.join(map(repr, nowhere))}, which no record has; they have "
            f"{', '.join(sorted(seen.columns))}"
        )
    counts = ", ".join(f"{count:,} {format}" for format, count in seen.formats.most_common())
    used = f"columns used: {', '.join(sorted(seen.used)) or 'none'}; unused: {', '.join(seen.unused) or 'none'}"
    logger.info("data source %r: %s; %s", name, counts, used)
    for kind, sentence in seen.sentences():
        logger.log(
            logging.INFO if kind in notices.AS_IT_SHOULD else logging.WARNING, "data source %r: %s", name, sentence
        )


def cache_key(source: SourceConfig, data: DataConfig, tokenizer) -> str:
    """A hash of everything that a source's tokens depend on."""
    parts = {
        "version": VERSION,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "content": _content(source),
        "format": source.format,
        "columns": dict(source.columns),
        "chat_template_kwargs": source.chat_template_kwargs,
        "limit": source.limit,
        "max_line_bytes": data.max_line_bytes,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def tokenizer_fingerprint(tokenizer) -> str:
    """A hash of the vocabulary, the rules and the chat template of a tokenizer."""
    state = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else dict(tokenizer.get_vocab())
    for volatile in ("truncation", "padding"):  # set by the last call, not part of what it does with a text
        state.pop(volatile, None)
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    # An image's number of tokens depends on its processor's configuration.
    processor = [
        file.read_text()
        for name in ("preprocessor_config.json", "processor_config.json")
        if (file := Path(tokenizer.name_or_path) / name).is_file()
    ]
    text = json.dumps([state, special, tokenizer.chat_template, processor], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def source_files(source: SourceConfig) -> list[str]:
    """What the records of a source name as their file."""
    return readers.local_files(source) or [source.path]


def _content(source: SourceConfig) -> list:
    files = readers.local_files(source)
    if not files:
        return [source.path, source.subset, source.split, readers.dataset_fingerprint(source)]
    digests = []
    for file in files:
        with open(file, "rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return digests


def once(folder: Path, build: Callable[[Callable[[], None]], None], timeout: float) -> None:
    """Have ``folder`` built by one process of the machine, while the others wait.

    Args:
        folder: complete when it has a META file.
        build: makes it; has to call its argument whenever it gets on.
        timeout: seconds without progress of another process, before giving up.

    Raises:
        TimeoutError: another process holds the lock and makes no progress.
    """
    if (folder / META).exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock_path = folder.with_name(f"{folder.name}.lock")
    with _locked(lock_path, timeout):
        if not (folder / META).exists():
            for left in folder.parent.glob(f"{folder.name}.tmp-*"):  # by builders that died: we hold their lock
                shutil.rmtree(left, ignore_errors=True)
            build(lambda: os.utime(lock_path))


@contextmanager
def _locked(path: Path, timeout: float) -> Iterator[None]:
    lock = filelock.FileLock(path)
    seen, since = None, time.monotonic()
    while True:
        try:
            lock.acquire(timeout=min(1.0, timeout))
            break
        except filelock.Timeout:
            # The builder touches the lock's file whenever it gets on. Whose clock wrote the time doesn't matter.
            touched = path.stat().st_mtime if path.exists() else None
            if touched != seen:
                seen, since = touched, time.monotonic()
            if time.monotonic() - since > timeout:
                raise TimeoutError(
                    f"another process holds {path} and hasn't got on with tokenising for {timeout:.0f} s. "
                    "If none is running, remove the file; or set data.cache_dir to a folder of your own"
                ) from None
    try:
        yield
    finally:
        lock.release()


def write(
    folder: Path,
    records: Iterable[Record],
    source,
    data,
    tokenizer,
    num_workers: int,
    progressed: Callable[[], None],
    more: dict | None = None,
) -> None:
    """Tokenise records into ``folder``: all of it, or nothing.

    Args:
        more: kept in META, too.
    """
    temporary = folder.with_name(f"{folder.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    temporary.mkdir()
    try:
        files = {file: index for index, file in enumerate(source_files(source))}
        documents, pictures, errors, skipped, offset, count, picture_offset = [], [], [], 0, 0, 0, 0
        seen = Seen()
        logged = began = time.monotonic()
        with (
            open(temporary / "tokens.bin", "wb") as tokens_file,
            open(temporary / "flags.bin", "wb") as flags_file,
            open(temporary / "pictures.bin", "wb") as pictures_file,
        ):
            for chunk in tokenise(records, source, data, tokenizer, num_workers):
                if chunk.errors and data.on_error == "raise":
                    raise DataError(chunk.errors[0])
                tokens_file.write(chunk.tokens.tobytes())
                flags_file.write(chunk.flags.tobytes())
                chunk.documents["offset"] += offset
                chunk.documents["file"] = [files[file] for file in chunk.files]
                offset += len(chunk.tokens)
                pictures_file.write(chunk.picture_data)
                chunk.pictures["document"] += count
                chunk.pictures["offset"] += picture_offset
                picture_offset += len(chunk.picture_data)
                pictures.append(chunk.pictures)
                documents.append(chunk.documents)
                count += len(chunk.documents)
                skipped += len(chunk.errors)
                seen.add(chunk.seen)
                errors = (errors + chunk.errors)[:REPORTED]
                progressed()
                if time.monotonic() - logged > LOG_SECONDS:
                    logged = time.monotonic()
                    rate = count / (logged - began)
                    logger.info("tokenising %s: %d examples, %.0f a second", source.path, count, rate)
            for stream in (tokens_file, flags_file, pictures_file):
                stream.flush()
                os.fsync(stream.fileno())
        np.save(temporary / "documents.npy", np.concatenate(documents) if documents else np.empty(0, DOCUMENT))
        np.save(temporary / "pictures.npy", np.concatenate(pictures) if pictures else np.empty(0, PICTURE))
        meta = {"skipped": skipped, "errors": errors, "tokens": offset, "seen": seen.as_json(), **(more or {})}
        (temporary / META).write_text(json.dumps(meta))
        _rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        # On a file system without locks another process may have been first: its content is the same.
        if not (folder / META).exists():
            raise
