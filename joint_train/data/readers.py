"""From sources to records: files of every kind that is read, and Hugging Face datasets."""

import csv
import dataclasses
import glob
import io
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence

from joint_train.config import DataConfig, SourceConfig
from joint_train.data.json_files import (
    OPENERS,
    READ_ERRORS,
    Record,
    extension,
    need,
    open_file,
    read_json,
    read_lines,
)
from joint_train.errors import DataError
from joint_train.files import LFS_POINTER, is_lfs_pointer


def source_name(source: SourceConfig) -> str:
    """The source's name in the metrics: ``name``, or the file's stem, or the last part of a dataset's id."""
    return source.name or os.path.basename(os.path.normpath(source.path)).split(".")[0]


def sources_of(data: DataConfig, split: str) -> list[SourceConfig]:
    """The sources of a split, each with the ``chat_template_kwargs`` of all data under its own."""
    return [
        dataclasses.replace(spec, chat_template_kwargs=data.chat_template_kwargs | spec.chat_template_kwargs)
        for spec in (data.train if split == "train" else data.val)
    ]


def local_files(source: SourceConfig) -> list[str]:
    """The source's files in a fixed order; empty if it is a dataset's id or folder instead.

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
    if any(character in path for character in "*?["):
        raise DataError(f"no file matches {os.path.abspath(path)} (data source {source_name(source)!r})")
    if _kind(path) or path.startswith(("/", ".")) or path.count("/") > 1:
        raise DataError(f"there is no file at {os.path.abspath(path)} (data source {source_name(source)!r})")
    return []


MIXED = {".jsonl", ".parquet", ".csv", ".tsv"}
"""What a dataset's folder has one kind of; .json and .txt may also be about the data."""
EXTENSIONS = {
    ".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv",
    ".txt": "text",
}  # fmt: skip


def _kind(path: str) -> str | None:
    return EXTENSIONS.get(extension(path))


def check_files(source: SourceConfig) -> list[str]:
    """:func:`local_files`; raises a DataError where they aren't there, or are of a kind that isn't read."""
    files = local_files(source)
    for file in files:
        if not _kind(file):
            raise DataError(
                f"{file}: its name ends in none of {', '.join(EXTENSIONS)} (all but .parquet also with "
                f"{', '.join(OPENERS)} after it)"
            )
    return files


def read_records(source: SourceConfig, max_line_bytes: int) -> Iterator[Record]:
    """The source's records in the order of its files, at most ``source.limit`` of them."""
    files = check_files(source)
    if not files:
        records = _read_dataset(source)
    else:
        records = (record for file in files for record in _read_file(file, max_line_bytes))
    yield from itertools.islice(records, source.limit)


def _read_file(file: str, max_line_bytes: int) -> Iterator[Record]:
    kind = _kind(file)
    if is_lfs_pointer(file):
        yield Record(file, 1, None, LFS_POINTER)
    elif kind == "parquet":
        yield from _read_parquet(file)
    elif kind == "json":
        yield from read_json(file, max_line_bytes)
    elif kind == "csv":
        yield from _read_csv(file, max_line_bytes)
    else:
        yield from (_as_text(record) for record in read_lines(file, max_line_bytes))


def _as_text(record: Record) -> Record:
    if not isinstance(record.data, bytes):
        return record
    try:
        return record._replace(data={"text": record.data.decode("utf-8-sig").rstrip("\r\n")})
    except UnicodeDecodeError as error:
        return record._replace(data=None, error=f"invalid UTF-8 at byte {error.start} of the line: {error.reason}")


def _read_csv(file: str, max_line_bytes: int) -> Iterator[Record]:
    """The rows below the line of names. A cell without a character is null."""
    line = 1
    csv.field_size_limit(max_line_bytes)
    try:
        with open_file(file) as stream:
            # Line ends in quoted cells stay as they are.
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
            rows = csv.DictReader(text, delimiter="\t" if extension(file) == ".tsv" else ",", strict=True)
            line = 1 + (rows.fieldnames is not None)
            if twice := _two_of_a_name(rows.fieldnames or []):
                yield Record(file, 1, None, twice)
                return
            for row in rows:
                if None in row:
                    yield Record(file, line, None, f"more cells than the {len(rows.fieldnames or [])} names above them")
                else:
                    yield Record(file, line, {name: cell or None for name, cell in row.items()})
                line = rows.line_num + 1
    except UnicodeDecodeError as error:
        yield Record(file, line, None, f"invalid UTF-8: {error.reason}")
    except (csv.Error, *READ_ERRORS) as error:
        yield Record(file, line, None, f"can't be read: {error}")


def _two_of_a_name(columns: Sequence[str]) -> str | None:
    twice = next((name for name, count in Counter(columns).items() if name and count > 1), None)
    return f"two columns are called {twice!r}, and only one of them would be read" if twice else None


def _read_parquet(file: str) -> Iterator[Record]:
    need("pyarrow", file)
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        opened = parquet.ParquetFile(file)
        if twice := _two_of_a_name(opened.schema_arrow.names):
            yield Record(file, 1, None, twice)
            return
        for batch in opened.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield Record(file, number, row)
    except (ArrowException, *READ_ERRORS) as error:
        yield Record(file, number + 1, None, f"can't be read: {error}")


def _check_folder(path: str) -> None:
    """Refuse a folder of files of several kinds, of which ``load_dataset`` reads the most frequent alone.

    Raises:
        DataError: naming them.
    """
    found = {os.path.splitext(file)[1] for file in glob.glob(f"{glob.escape(path)}/*")} & MIXED
    if len(found) > 1:
        raise DataError(
            f"{path} has files of several kinds ({', '.join(sorted(found))}), of which only one would be read: give a "
            f"source for each, such as {path}/*{min(found)}"
        )


def _saved(path: str) -> bool:
    return any(os.path.exists(os.path.join(path, name)) for name in ("dataset_info.json", "dataset_dict.json"))


def open_dataset(source: SourceConfig):
    """The source's Hugging Face dataset; iterable if ``source.streaming``.

    Raises:
        DataError: it can't be opened.
    """
    datasets = need("datasets", f"the data source {source.path}")
    path = os.path.expanduser(source.path)
    try:
        if _saved(path):
            loaded = datasets.load_from_disk(path)
            if isinstance(loaded, datasets.DatasetDict):
                loaded = loaded[source.split]
            return loaded.to_iterable_dataset() if source.streaming else loaded
        _check_folder(path)
        return datasets.load_dataset(path, source.subset, split=source.split, streaming=source.streaming)
    except DataError:
        raise
    except Exception as error:  # the library raises errors of many kinds
        raise _not_opened(source, error) from error


def dataset_fingerprint(source: SourceConfig) -> str:
    """A hash of a dataset's content, or of its files' revisions if it is streamed.

    Raises:
        DataError: it can't be opened.
    """
    if not source.streaming or _saved(os.path.expanduser(source.path)):
        return open_dataset(SourceConfig(path=source.path, split=source.split, subset=source.subset))._fingerprint
    datasets = need("datasets", f"the data source {source.path}")
    try:
        builder = datasets.load_dataset_builder(os.path.expanduser(source.path), source.subset)
        files = builder.config.data_files[source.split]
    except Exception as error:  # the library raises errors of many kinds
        raise _not_opened(source, error) from error
    # The commits that the hub's files belong to, or the times that local ones were changed.
    return repr(files.origin_metadata)


def _not_opened(source: SourceConfig, error: Exception) -> DataError:
    here = "" if os.path.exists(os.path.expanduser(source.path)) else "there is no file or folder of this name, and "
    return DataError(
        f"data source {source.path}: {here}it can't be opened as a dataset (subset {source.subset}, split "
        f"{source.split}): {type(error).__name__}: {error}"
    )


def _read_dataset(source: SourceConfig) -> Iterator[Record]:
    for number, row in enumerate(open_dataset(source), start=1):
        yield Record(source.path, number, dict(row))
