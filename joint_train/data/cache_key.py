"""What a source's cached tokens depend on, as one hash: the name of the folder that holds them."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import tokenizers
import transformers

from joint_train.config import DataConfig, SourceConfig
from joint_train.data import readers
from joint_train.data.digests import digest
from joint_train.weights.run_files import tokenizer_parts

VERSION = 8
META = "meta.json"


def cache_folder(data: DataConfig) -> Path:
    """Where tokenised data is kept: ``data.cache_dir``."""
    return Path(data.cache_dir or Path.home() / ".cache" / "joint_train" / "data").expanduser()


def cache_key(source: SourceConfig, data: DataConfig, tokenizer) -> str:
    """A hash of everything that a source's tokens depend on.

    Where the source turned out to have pictures that are files, as far as this cache knows, these are part of it: where
    they are, and their sizes and times.
    """
    key, root = content_key(source, data, tokenizer), cache_folder(data)
    listed = pictures_file(root, key, source)
    if (root / key / META).exists() or not listed.exists():
        return key
    return with_pictures(listed)


def with_pictures(listed: Path) -> str:
    """The key of a source whose pictures are listed in a file, as they are now."""
    parts: list[Any] = [listed.name]
    for picture in json.loads(listed.read_text()):
        try:
            found = os.stat(picture)
            parts.append([picture, found.st_size, found.st_mtime_ns])
        except OSError:
            parts.append([picture, None])
    return hashed(parts)


def pictures_file(root: Path, key: str, source: SourceConfig) -> Path:
    """Where the pictures of a source are listed: relative paths in its rows mean others in another folder."""
    folders = sorted({os.path.realpath(os.path.dirname(file)) for file in source_files(source)})
    return root / f"{hashed([key, folders])}.pictures"


def hashed(parts: Any) -> str:
    """A short hash of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def content_key(source: SourceConfig, data: DataConfig, tokenizer) -> str:
    """:func:`cache_key` without pictures."""
    parts = {
        "version": VERSION,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "content": _content(source, cache_folder(data)),
        "format": source.format,
        "columns": dict(source.columns),
        "chat_template_kwargs": source.chat_template_kwargs,
        "ignore": sorted(source.ignore),
        "limit": source.limit,
        "max_line_bytes": data.max_line_bytes,
    }
    return hashed(parts)


def tokenizer_fingerprint(tokenizer) -> str:
    """A hash of the vocabulary, the rules and the chat template of a tokenizer."""
    # An image's number of tokens depends on its processor's configuration.
    processor = [
        file.read_text()
        for name in ("preprocessor_config.json", "processor_config.json")
        if (file := Path(tokenizer.name_or_path) / name).is_file()
    ]
    text = json.dumps([*tokenizer_parts(tokenizer).values(), processor], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def source_files(source: SourceConfig) -> list[str]:
    """What the records of a source name as their file."""
    return readers.local_files(source) or [source.path]


def _content(source: SourceConfig, cache: Path) -> list:
    files = readers.local_files(source)
    if not files:
        return [source.path, source.subset, source.split, readers.dataset_fingerprint(source)]
    return [digest(file, cache) for file in files]
