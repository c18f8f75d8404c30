"""Tokenised sources on disk, keyed by content.

A source is tokenised once, by worker processes, into a folder of flat arrays that every rank and worker maps into
memory. The folder's name is a hash of all that its content depends on (the files' bytes, the tokenizer, the template,
the format, and of pictures that are files where they are, their sizes and times), so nothing in it can be out of date.
It is written under another name, with a checksum of each file, and renamed when it is whole and on disk, so nobody sees
half of one; one that was damaged since is made again. A file lock makes one process build while the others of the
machine wait.

What the cache holds doesn't depend on ``max_length``, ``overlong``, ``packing``, ``train_on`` or the mixture.
"""

import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from joint_train.config import DataConfig, SourceConfig
from joint_train.data import notices, readers
from joint_train.data.cache_key import (
    META,
    cache_folder,
    cache_key,
    content_key,
    hashed,
    pictures_file,
    source_files,
    with_pictures,
)
from joint_train.data.digests import digest, remember
from joint_train.data.json_files import Record
from joint_train.data.locks import locked
from joint_train.data.seen import Seen
from joint_train.data.tokenise import DOCUMENT, PICTURE, tokenise
from joint_train.errors import DataError
from joint_train.files import replace

logger = logging.getLogger(__name__)

REPORTED = 20
ATTEMPTS = 3
FILES = ("tokens.bin", "flags.bin", "pictures.bin", "documents.npy", "pictures.npy")
MAPPED = ("documents", "pictures", "_tokens", "_flags")
LOG_SECONDS = 10


@dataclass
class Tokenised:
    """A source's tokens.

    Attributes:
        name: of the source, in the metrics.
        folder: of the arrays.
        key: a hash of the tokens and what is known of them, wherever they come from.
        files: what ``documents["file"]`` counts.
        skipped: how many records were bad.
        errors: the messages of the first of them.
    """

    name: str
    folder: Path
    key: str
    files: list[str]
    skipped: int
    errors: list[str]

    @cached_property
    def documents(self) -> np.ndarray:
        """``[N]`` DOCUMENT."""
        return _mapped(self.folder / "documents.npy")

    @cached_property
    def pictures(self) -> np.ndarray:
        """``[M]`` PICTURE, ascending in (document, position)."""
        return _mapped(self.folder / "pictures.npy")

    @cached_property
    def _tokens(self) -> np.ndarray:
        return np.memmap(self.folder / "tokens.bin", dtype=np.int32, mode="r")

    @cached_property
    def _flags(self) -> np.ndarray:
        return np.memmap(self.folder / "flags.bin", dtype=np.uint8, mode="r")

    def __getstate__(self) -> dict:
        # A memory map is pickled as a copy of the file.
        return {key: value for key, value in self.__dict__.items() if key not in MAPPED}

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


def _mapped(path: Path) -> np.ndarray:
    array = np.load(path, mmap_mode="r")
    return np.asarray(array)  # a plain array on the same memory: taking parts of it is quicker


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
    root = cache_folder(data)

    def build(folder: Path, progressed: Callable[[], None]) -> None:
        records = readers.read_records(source, data.max_line_bytes)
        key = content_key(source, data, tokenizer)
        write(
            folder,
            records,
            source,
            data,
            tokenizer,
            num_workers,
            progressed,
            pictures=pictures_file(root, key, source),
        )

    # Only when it is tokenised it shows whether a source has pictures, and so what its folder is called.
    for _ in range(ATTEMPTS):
        folder = root / cache_key(source, data, tokenizer)
        build_once(folder, partial(build, folder), timeout)
        if folder == root / cache_key(source, data, tokenizer):
            break
    else:
        raise DataError(f"data source {source.path}: its pictures change while it is tokenised: try again")
    cached = load(folder, source, data)
    if not len(cached.documents):
        why = f"{cached.skipped} bad records" if cached.skipped else "it is empty"
        raise DataError(f"data source {source.path}: no usable example in it ({why})")
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
            "data source %r: %s bad rows are left out (data.on_error=skip). The first of them:%s",
            name,
            f"{meta['skipped']:,}",
            "".join(f"\n  {error}" for error in meta["errors"][:3]),
        )
    if first:
        _report_columns(name, source, Seen.from_json(meta["seen"]))
    return Tokenised(name, folder, meta["content"], source_files(source), meta["skipped"], meta["errors"])


def _report_columns(name: str, source: SourceConfig, seen: Seen) -> None:
    if not seen.formats:
        return
    nowhere = sorted(set(source.columns.values()) - seen.columns)
    if nowhere:
        raise DataError(
            f"data source {name!r}: columns name {', '.join(map(repr, nowhere))}, which no record has; they have "
            f"{', '.join(sorted(seen.columns))}"
        )
    logger.info("data source %r: %s", name, seen.summary())
    for kind, sentence in seen.sentences():
        logger.log(
            logging.INFO if kind in notices.AS_IT_SHOULD else logging.WARNING, "data source %r: %s", name, sentence
        )


def build_once(folder: Path, build: Callable[[Callable[[], None]], None], timeout: float) -> None:
    """Let one process of the machine build ``folder``, or rebuild a damaged one, while the others wait.

    Args:
        folder: complete when it has a META file.
        build: builds the folder; has to call its argument whenever it makes progress.
        timeout: seconds without progress of another process, before giving up.

    Raises:
        TimeoutError: another process holds the lock and makes no progress.
    """
    if find_damage(folder, timeout) is None:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f"{folder.name}.lock"), timeout, "tokenising") as progressed:
        if (found := find_damage(folder, timeout)) is None:
            return
        for left in folder.parent.glob(f"{folder.name}.tmp-*"):  # by builders that died: we hold their lock
            shutil.rmtree(left, ignore_errors=True)
        if os.path.lexists(folder):
            logger.warning("%s is damaged (%s): its data is tokenised again", folder, found)
            away = folder.with_name(f"{folder.name}.tmp-damaged-{os.getpid()}")
            folder.rename(away)
            if away.is_dir() and not away.is_symlink():
                shutil.rmtree(away, ignore_errors=True)
            else:
                away.unlink()
        build(progressed)


def find_damage(folder: Path, timeout: float = 1800.0) -> str | None:
    """What is wrong with a folder of tokens, in words; None if it is what was written."""
    try:
        meta = json.loads((folder / META).read_text())
        if meta.pop("checksum") != hashed(meta):
            return f"the checksum of {META} differs"
        for name, (size, checksum) in meta["files"].items():
            if (now := (folder / name).stat().st_size) != size:
                return f"{name} has {now} bytes, not {size}"
            if digest(folder / name, folder.parent, timeout) != checksum:
                return f"the checksum of {name} differs"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{META}: {type(error).__name__}: {error}"
    return None


class _Checked:
    """A new file that is hashed while it is written, and synced to disk when it is closed."""

    def __init__(self, path: Path):
        self.stream, self.hash, self.size = open(path, "wb"), hashlib.sha256(), 0

    def write(self, data) -> int:
        self.hash.update(data)
        self.size += memoryview(data).nbytes
        return self.stream.write(data)

    def __enter__(self) -> "_Checked":
        return self

    def __exit__(self, *error: object) -> None:
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()


def write(
    folder: Path,
    records: Iterable[Record],
    source,
    data,
    tokenizer,
    num_workers: int,
    progressed: Callable[[], None],
    more: dict | None = None,
    pictures: Path | None = None,
) -> None:
    """Tokenise records into ``folder``: all of it, or nothing.

    Args:
        more: kept in META, too.
        pictures: where the pictures are listed that are files, if there are any; the folder has another name then, that
            of :func:`cache_key`.
    """
    temporary = folder.with_name(f"{folder.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    temporary.mkdir()
    try:
        files = {file: index for index, file in enumerate(source_files(source))}
        documents, places, errors, skipped, offset, count, picture_offset = [], [], list[str](), 0, 0, 0, 0
        paths: dict[str, None] = {}
        seen = Seen()
        logged = began = time.monotonic()
        with ExitStack() as stack:
            written = {name: stack.enter_context(_Checked(temporary / name)) for name in FILES}
            for chunk in tokenise(records, source, data, tokenizer, num_workers):
                if chunk.errors and data.on_error == "raise":
                    raise DataError(chunk.errors[0])
                written["tokens.bin"].write(chunk.tokens.tobytes())
                written["flags.bin"].write(chunk.flags.tobytes())
                chunk.documents["offset"] += offset
                chunk.documents["file"] = [files[file] for file in chunk.files]
                offset += len(chunk.tokens)
                written["pictures.bin"].write(chunk.picture_data)
                for picture in chunk.pictures[~chunk.pictures["embedded"]]:
                    first = int(picture["offset"])
                    paths[chunk.picture_data[first : first + int(picture["size"])].decode()] = None
                chunk.pictures["document"] += count
                chunk.pictures["offset"] += picture_offset
                picture_offset += len(chunk.picture_data)
                places.append(chunk.pictures)
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
            np.save(written["documents.npy"], np.concatenate(documents) if documents else np.empty(0, DOCUMENT))
            np.save(written["pictures.npy"], np.concatenate(places) if places else np.empty(0, PICTURE))
        sizes = {name: [file.size, file.hash.hexdigest()] for name, file in written.items()}
        # What rows are made of. Pictures may move, and what they take of a row is in the tokens.
        content = hashed([sizes[name] for name in ("tokens.bin", "flags.bin", "documents.npy")])
        meta = {"files": sizes, "content": content, "skipped": skipped, "errors": errors, "tokens": offset}
        meta |= {"seen": seen.as_json(), **(more or {})}
        replace(temporary / META, json.dumps(meta | {"checksum": hashed(meta)}))
        if paths and pictures is not None:
            replace(pictures, json.dumps(list(paths)))
            folder = folder.with_name(with_pictures(pictures))
        _rename(temporary, folder)
        for name, file in written.items():
            remember(folder / name, folder.parent, file.hash.hexdigest())
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename(temporary: Path, folder: Path) -> None:
    _sync(temporary)
    try:
        temporary.rename(folder)
    except OSError:
        # On a file system without locks another process may have been first: its content is the same.
        if find_damage(folder) is not None:
            raise
    _sync(folder.parent)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
