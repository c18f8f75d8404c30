"""From files to examples: readers that never hold more than a line, and one adapter for each format.

A record is what a file holds at one line; an example is what a template can render: ``{"messages": [...]}``, with
``tools`` and ``chat_template_kwargs`` where there are any, or ``{"text": ...}``.
"""

import bz2
import glob
import gzip
import itertools
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from joint_train.config import SourceConfig
from joint_train.data import images
from joint_train.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
FORMATS = ("auto", "messages", "prompt_response", "text", "sharegpt")
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
SKIP_BLOCK = 1 << 20


class Record(NamedTuple):
    """A line of JSON, a row already parsed, or what is wrong with it."""

    file: str
    line: int
    data: bytes | dict | None
    error: str | None = None


def source_name(source) -> str:
    """The source's name in the metrics: ``name``, or the file's stem, or the last part of a dataset's id."""
    return source.name or os.path.basename(os.path.normpath(source.path)).split(".")[0]


def local_files(source) -> list[str]:
    """The source's JSONL and Parquet files in a fixed order; empty if it is a dataset's id or folder instead.

    Raises:
        DataError: nothing is at the path, though it can only be a file.
    """
    path = os.path.expanduser(source.path)
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        return []
    files = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
    if files:
        return files
    is_file = any(character in path for character in "*?[") or _kind(path) or path.startswith(("/", "."))
    if is_file or path.count("/") > 1:
        raise DataError(f"no file at {source.path} (data source {source_name(source)!r})")
    return []


def _kind(path: str) -> str | None:
    stem, extension = os.path.splitext(path)
    if extension in OPENERS:
        extension = os.path.splitext(stem)[1]
    return {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}.get(extension)


def read_records(source, max_line_bytes: int) -> Iterator[Record]:
    """The source's records in the order of its files, at most ``source.limit`` of them."""
    files = local_files(source)
    if not files:
        records = _read_dataset(source)
    else:
        records = (record for file in files for record in _read_file(file, max_line_bytes))
    yield from itertools.islice(records, source.limit)


def _read_file(file: str, max_line_bytes: int) -> Iterator[Record]:
    kind = _kind(file)
    if kind == "parquet":
        yield from _read_parquet(file)
    elif kind == "jsonl":
        yield from read_jsonl(file, max_line_bytes)
    else:
        raise DataError(f"{file}: neither JSONL (.jsonl, .json; also .gz, .bz2, .xz) nor Parquet (.parquet)")


def read_jsonl(file: str, max_line_bytes: int) -> Iterator[Record]:
    """The lines of a JSONL file that aren't blank. A line over the limit is reported without being held in memory."""
    opener = OPENERS.get(os.path.splitext(file)[1], open)
    number = 0
    try:
        with opener(file, "rb") as stream:
            while line := stream.readline(max_line_bytes + 1):
                number += 1
                if len(line) > max_line_bytes and not line.endswith(b"\n"):
                    size = len(line)
                    while not line.endswith(b"\n") and (line := stream.readline(SKIP_BLOCK)):
                        size += len(line)
                    error = f"a line of {size:,} bytes, longer than data.max_line_bytes={max_line_bytes}"
                    yield Record(file, number, None, error)
                elif line.strip():
                    yield Record(file, number, line)
    except READ_ERRORS as error:
        yield Record(file, number + 1, None, f"can't be read: {error}")


def _need(package: str, what: str):
    try:
        return __import__(package)
    except ImportError as error:
        raise DataError(f"{what} needs the {package} package: pip install 'joint-train[data]'") from error


def _read_parquet(file: str) -> Iterator[Record]:
    _need("pyarrow", file)
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield Record(file, number, row)
    except (ArrowException, *READ_ERRORS) as error:
        yield Record(file, number + 1, None, f"can't be read: {error}")


def _saved(path: str) -> bool:
    return any(os.path.exists(os.path.join(path, name)) for name in ("dataset_info.json", "dataset_dict.json"))


def open_dataset(source):
    """The source's Hugging Face dataset; iterable if ``source.streaming``.

    Raises:
        DataError: it can't be opened.
    """
    datasets = _need("datasets", f"the data source {source.path}")
    path = os.path.expanduser(source.path)
    try:
        if _saved(path):
            loaded = datasets.load_from_disk(path)
            if isinstance(loaded, datasets.DatasetDict):
                loaded = loaded[source.split]
            return loaded.to_iterable_dataset() if source.streaming else loaded
        return datasets.load_dataset(path, source.subset, split=source.split, streaming=source.streaming)
    except Exception as error:  # the library raises errors of many kinds
        raise _not_opened(source, error) from error


def dataset_fingerprint(source) -> str:
    """A hash of a dataset's content, or of its files' revisions if it is streamed.

    Raises:
        DataError: it can't be opened.
    """
    if not source.streaming or _saved(os.path.expanduser(source.path)):
        return open_dataset(SourceConfig(path=source.path, split=source.split, subset=source.subset))._fingerprint
    datasets = _need("datasets", f"the data source {source.path}")
    try:
        builder = datasets.load_dataset_builder(os.path.expanduser(source.path), source.subset)
        files = builder.config.data_files[source.split]
    except Exception as error:  # the library raises errors of many kinds
        raise _not_opened(source, error) from error
    # The commits that the hub's files belong to, or the times that local ones were changed.
    return repr(files.origin_metadata)


def _not_opened(source, error: Exception) -> DataError:
    return DataError(
        f"the dataset {source.path} (subset {source.subset}, split {source.split}) can't be opened: "
        f"{type(error).__name__}: {error}"
    )


def _read_dataset(source) -> Iterator[Record]:
    for number, row in enumerate(open_dataset(source), start=1):
        yield Record(source.path, number, dict(row))


def parse(record: Record, source) -> dict[str, Any]:
    """The example of a record; its images, if there are any, in ``images``.

    Raises:
        DataError: what is wrong with it, with file and line.
    """
    try:
        if record.error is not None:
            raise DataError(record.error)
        row = _decode(record.data) if isinstance(record.data, bytes) else record.data
        if not isinstance(row, dict):
            raise DataError(f"a JSON object is expected, not {_kind_of(row)}")
        example = _adapt(row, source.format, dict(source.columns))
        if "messages" in example:
            listed = next((row[name] for name in images.LISTS if row.get(name)), None)
            example["messages"], found = images.take(example["messages"], listed, os.path.dirname(record.file))
            if found:
                example["images"] = found
        return example
    except DataError as error:
        raise DataError(f"{record.file}:{record.line}: {error}") from None


def _decode(line: bytes) -> Any:
    try:
        # Byte-order marks are what some editors put before the first line.
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"invalid UTF-8 at byte {error.start} of the line: {error.reason}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"malformed JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"malformed JSON: {error}") from None


def _kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _adapt(row: dict, format: str, columns: dict[str, str]) -> dict[str, Any]:
    def field(*names: str) -> Any:
        for name in names:
            value = row.get(columns.get(name, name))
            if value is not None:
                return value
        wanted = " or ".join(repr(columns.get(name, name)) for name in names)
        raise DataError(f"no field {wanted}; the record has {sorted(map(str, row))}")

    if format == "auto":
        format = detect_format(row, columns)
    if format == "text":
        return {"text": _text(field("text"), "text")}
    if format == "messages":
        messages = _messages(field("messages"))
    elif format == "sharegpt":
        messages = _sharegpt(field("conversations"))
    else:
        messages = _prompt_response(field("prompt"), field("response", "completion"), row.get("system"))
    example = {"messages": messages}
    if tools := _tools(row.get(columns.get("tools", "tools"))):
        example["tools"] = tools
    if options := row.get("chat_template_kwargs"):
        if not isinstance(options, dict):
            raise DataError(f"chat_template_kwargs is {_kind_of(options)}, not an object")
        example["chat_template_kwargs"] = options
    return example


def detect_format(row: dict, columns: dict[str, str]) -> str:
    """The format of a record by the fields that it has."""
    fields = {name for name in ("messages", "conversations", "prompt", "text") if columns.get(name, name) in row}
    for name, format in (
        ("messages", "messages"),
        ("conversations", "sharegpt"),
        ("prompt", "prompt_response"),
        ("text", "text"),
    ):
        if name in fields:
            return format
    raise DataError(
        f"no format fits the fields {sorted(map(str, row))}: set the source's format to one of {FORMATS[1:]}, "
        "and columns where its fields have other names"
    )


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} is {_kind_of(value)}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} has half a surrogate pair, which is no Unicode text") from None
    return value


def _messages(messages: Any) -> list[dict]:
    if not isinstance(messages, list):
        raise DataError(f"messages is {_kind_of(messages)}, not a list")
    if not messages:
        raise DataError("an empty conversation")
    return [_message(message, f"message {index}") for index, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict:
    if not isinstance(message, dict):
        raise DataError(f"{where} is {_kind_of(message)}, not an object")
    # Parquet and datasets fill the fields that a message doesn't have with null.
    message = {key: value for key, value in message.items() if value is not None}
    role = message.get("role")
    if role not in ROLES:
        raise DataError(f"{where} has the unknown role {role!r}; known are {', '.join(ROLES)}")
    if isinstance(content := message.get("content"), list):
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("type"), str):
                raise DataError(f"{where}: a part of its content has no type")
            if part["type"] == "text":
                _text(part.get("text"), f"{where}: a text part")
    elif content is not None:
        _text(content, f"{where}: content")
    elif not message.keys() - {"role", "content"}:
        raise DataError(f"{where} has no content")
    for key, value in message.items():
        if key != "content" and isinstance(value, str):
            _text(value, f"{where}: {key}")
    return message


def _sharegpt(turns: Any) -> list[dict]:
    if not isinstance(turns, list):
        raise DataError(f"conversations is {_kind_of(turns)}, not a list")
    messages = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise DataError(f"turn {index} is {_kind_of(turn)}, not an object")
        role = turn.get("from", turn.get("role"))
        if not isinstance(role, str) or role not in SHAREGPT_ROLES:
            raise DataError(f"turn {index} is from the unknown {role!r}; known are {', '.join(SHAREGPT_ROLES)}")
        messages.append({"role": SHAREGPT_ROLES[role], "content": turn.get("value", turn.get("content"))})
    return _messages(messages)


def _prompt_response(prompt: Any, response: Any, system: Any) -> list[dict]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    messages += response if isinstance(response, list) else [{"role": "assistant", "content": response}]
    return _messages(messages)


def _tools(tools: Any) -> list | None:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "null")
        except (ValueError, RecursionError) as error:
            raise DataError(f"tools is a string that isn't JSON: {error}") from None
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"tools is {_kind_of(tools)}, not a list")
    return tools
