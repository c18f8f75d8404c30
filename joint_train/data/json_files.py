"""Files of lines and of JSON, compressed or not, read without holding more than one record.

A JSON file holds an object a line (JSON Lines), or objects over several lines, or a list of objects.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from joint_train.errors import DataError

READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
BLOCK = 1 << 20


class Record(NamedTuple):
    """A piece of JSON, a row already parsed, or what is wrong with it."""

    file: str
    line: int
    data: bytes | dict | None
    error: str | None = None


def need(package: str, what: str):
    """Import an optional package.

    Raises:
        DataError: it isn't installed.
    """
    try:
        return __import__(package)
    except ImportError as error:
        raise DataError(f"{what} needs the {package} package: pip install 'joint-train[data]'") from error


def _zstd(file: str, mode: str) -> IO[bytes]:
    need("pyarrow", file)
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"))


OPENERS: dict[str, Callable[[str, str], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}


def extension(file: str) -> str:
    """A file's extension in lower case, without that of its compression."""
    stem, last = os.path.splitext(file.lower())
    return os.path.splitext(stem)[1] if last in OPENERS else last


def open_file(file: str) -> IO[bytes]:
    """A file's bytes, decompressed if its name says so."""
    return OPENERS.get(os.path.splitext(file)[1].lower(), open)(file, "rb")


def read_json(file: str, max_line_bytes: int) -> Iterator[Record]:
    """The objects of a JSON file. Only one that is called .json may have them over several lines or in a list."""
    if extension(file) != ".json":
        yield from read_lines(file, max_line_bytes)
        return
    try:
        with open_file(file) as stream:
            while (start := stream.read(BLOCK)) and not start.strip():
                pass
            start = (start + stream.read(1 << 20)).removeprefix(b"\xef\xbb\xbf").lstrip()
            several_lines = start[:1] == b"{" and _goes_on(start)
    except READ_ERRORS:
        start, several_lines = b"", False  # the other reader says where
    if start[:1] == b"[" or several_lines:
        yield from _read_items(file, max_line_bytes)
    else:
        yield from read_lines(file, max_line_bytes)


def _goes_on(start: bytes) -> bool:
    """Whether the object that a file starts with ends on a later line. A line that was cut off is none such: the next
    one is an object again."""
    first, *following = [line for line in start.split(b"\n") if line.strip()]
    return bool(following) and not _is_object(first) and not _is_object(following[0])


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def read_lines(file: str, max_line_bytes: int) -> Iterator[Record]:
    """The lines of a file that aren't blank. A line over the limit is reported without being held in memory."""
    number = 0
    try:
        with open_file(file) as stream:
            while line := stream.readline(max_line_bytes + 1):
                number += 1
                if len(line) > max_line_bytes and not line.endswith(b"\n"):
                    size = len(line)
                    while not line.endswith(b"\n") and (line := stream.readline(BLOCK)):
                        size += len(line)
                    error = f"a line of {size:,} bytes, longer than data.max_line_bytes={max_line_bytes}"
                    yield Record(file, number, None, error)
                elif line.strip():
                    yield Record(file, number, line)
    except READ_ERRORS as error:
        yield Record(file, number + 1, None, f"can't be read: {error}")


# What changes the depth of JSON outside of strings, and what a string ends with or goes on after.
OUTSIDE, INSIDE = re.compile(rb'[{}\[\]"]'), re.compile(rb'["\\]')


class _Items:
    """Cuts a stream of bytes into the objects of a list, or of no list, and knows the line on which each begins."""

    def __init__(self, file: str, max_bytes: int):
        self.file, self.max_bytes = file, max_bytes
        self.depth = 0
        self.listed: bool | None = None  # whether a list is around the objects, once that is known
        self.inside, self.escaped = False, False
        self.line, self.begun = 1, 1
        self.held = bytearray()
        self.size = 0

    def feed(self, block: bytes) -> Iterator[Record]:
        """The objects that end in the next block."""
        done = position = 0
        if self.escaped:
            position, self.escaped = 1, False
        while match := (INSIDE if self.inside else OUTSIDE).search(block, position):
            at, byte = match.start(), match.group()
            position = at + 1
            if self.inside:
                if byte == b'"':
                    self.inside = False
                else:
                    position += 1
                    self.escaped = position > len(block)
                continue
            if byte == b'"':
                self.inside = True
            elif byte in b"{[":
                if self.depth == 0 and self.listed is None and byte == b"[":
                    self.listed = True
                    yield from self._between(block[done:at])
                    done = position
                    continue
                if self.depth == 0:
                    self.listed = bool(self.listed)
                    yield from self._between(block[done:at])
                    done, self.begun = at, self.line
                self.depth += 1
            elif self.depth:
                self.depth -= 1
                if self.depth == 0:
                    self._hold(block[done:position])
                    yield self._record()
                    done = position
            else:  # the end of the list
                yield from self._between(block[done:at])
                self.listed, done = False, position
        if self.depth:
            self._hold(block[done:])
        elif self.inside:
            self._hold(block[done:])
        else:
            yield from self._between(block[done:])

    def _hold(self, data: bytes) -> None:
        self.line += data.count(b"\n")
        self.size += len(data)
        if self.size <= self.max_bytes:
            self.held += data
        else:
            self.held.clear()

    def _record(self) -> Record:
        data, size = bytes(self.held), self.size
        self.held.clear()
        self.size = 0
        if size > self.max_bytes:
            error = f"an object of {size:,} bytes, longer than data.max_line_bytes={self.max_bytes}"
            return Record(self.file, self.begun, None, error)
        return Record(self.file, self.begun, data)

    def _between(self, data: bytes) -> Iterator[Record]:
        data, self.held = bytes(self.held) + data, bytearray()
        self.size = 0
        line, self.line = self.line, self.line + data.count(b"\n")
        if data.removeprefix(b"\xef\xbb\xbf").replace(b",", b"").strip():
            yield Record(self.file, line, None, "malformed JSON: something that isn't an object between the objects")

    def end(self) -> Iterator[Record]:
        """What is wrong with the end of the file."""
        if self.depth or self.inside:
            yield Record(self.file, self.begun, None, "malformed JSON: the file ends inside an object")
        elif self.listed:
            yield Record(self.file, self.line, None, "malformed JSON: the file ends inside the list of objects")


def _read_items(file: str, max_bytes: int) -> Iterator[Record]:
    items = _Items(file, max_bytes)
    try:
        with open_file(file) as stream:
            while block := stream.read(BLOCK):
                yield from items.feed(block)
            yield from items.end()
    except READ_ERRORS as error:
        yield Record(file, items.line, None, f"can't be read: {error}")
