"""The loader: each rank's batches of the global sequence of rows, and the position in it.

A global batch is ``dp_size * micro_batch_size`` consecutive rows, and rank r takes the r-th share of them. The position
is one of the global sequence, so it holds on any number of ranks and workers and with any batch size.
"""

import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from torchdata.stateful_dataloader import StatefulDataLoader

from joint_train.config import Config, DataConfig, SourceConfig, checks
from joint_train.config.values import adapter_index, parse_served, run_length
from joint_train.data import cache_key, images
from joint_train.data.cache import tokenised
from joint_train.data.cache_key import cache_folder, tokenizer_fingerprint
from joint_train.data.formats import check_source
from joint_train.data.pieces import Pieces, cut
from joint_train.data.readers import check_files, source_name, sources_of
from joint_train.data.rows import Document, RowSequence, Walk
from joint_train.data.streams import StreamPieces
from joint_train.distributed.preemption import stand_apart
from joint_train.errors import DataError, OtherData
from joint_train.files import naming

UNPACKED_MULTIPLE = 64
POSITION, ERROR = "position", "error"
ORDER = 2
"""Of the order of rows: counted up by each change of the code that moves a row."""
SETTINGS = ("max_length", "packing", "overlong", "train_on", "unroll", "mixture", "shuffle")
VERSIONS = ("the version of tokenised data", "transformers", "tokenizers")
TOKENIZER, SOURCES = "tokenizer", "sources"
CHOICES = {key.removeprefix("data."): of for key, of in checks.CHOICES.items() if key.startswith("data.")}


class BatchLoader(StatefulDataLoader):
    """Yields batches and knows its position in the global sequence.

    Attributes:
        source_names: what the batches' ``source`` counts.
        sequence: the global rows.
        position: of the last batch that was yielded (see :func:`loader_position`).
        made_of: what its rows are made of, see :func:`describe`.
        source_adapters: of each source the adapter that the base has on it; None: none.
    """

    source_adapters: Sequence[str | None] = ()

    def __init__(
        self, batches: "RankBatches", num_workers: int, timeout: float, pin_memory: bool, position: dict, made_of: dict
    ):
        self.sequence = batches.sequence
        self.source_names = [source.name for source in batches.sequence.sources]
        self.position, self.made_of = position, made_of
        with warnings.catch_warnings():
            # torchdata 0.11 calls a function that torch 2.13 deprecates.
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            super().__init__(
                batches,
                batch_size=None,
                sampler=BatchNumbers(batches.count),
                num_workers=num_workers,
                timeout=timeout if num_workers else 0,
                pin_memory=pin_memory,
                collate_fn=_identity,
                worker_init_fn=stand_apart,
            )

    @property
    def epoch(self) -> float | None:
        """How many times all documents have been seen after the last batch; None where a stream is among the data."""
        return self.sequence.epoch(self.position["documents"])

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self._ready(super().__iter__())  # made now, not at the first batch: it draws from torch's generator

    def _ready(self, batches: Iterator[dict]) -> Iterator[dict[str, torch.Tensor]]:
        for batch in batches:
            if ERROR in batch:  # by a worker: raised there it would come with that process's stack
                raise DataError(batch[ERROR])
            self.position = batch.pop(POSITION)
            yield {key: self._tensor(value) for key, value in batch.items()}

    def _tensor(self, value: np.ndarray | torch.Tensor) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value
        tensor = torch.from_numpy(value)
        return tensor.pin_memory() if self.pin_memory else tensor


def _identity(batch: dict) -> dict:
    return batch


class BatchNumbers(torch.utils.data.Sampler):
    """0, 1, 2, … up to ``count``, or for ever; resumable, as ``StatefulDataLoader`` asks."""

    def __init__(self, count: int | None):
        self.count, self.first, self.next = count, 0, 0

    def __iter__(self) -> Iterator[int]:
        first, self.first = self.first, 0  # a restored state holds for one pass
        for number in itertools.count(first) if self.count is None else range(first, self.count):
            self.next = number + 1
            yield number

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = self.next = state["next"]


class RankBatches(torch.utils.data.Dataset):
    """A rank's batches by number, counted from the position that the loader starts at.

    Args:
        sequence: the global rows; batches beyond their end have empty rows.
        start: the position.
        rank, size: this rank's share.
        rows: in a batch of a rank.
        count: of batches; None: no end.
        adapters: of each source its number among ``model.adapters``, -1 for none; None: there are none of them.
    """

    def __init__(
        self, sequence, start: dict, rank: int, size: int, rows: int, count: int | None, tokenizer,
        adapters: list[int] | None = None,
    ):  # fmt: skip
        self.adapters = None if adapters is None else np.array([*adapters, -1])  # the last one: of padding, source -1
        self.folder, self.image_token = tokenizer.name_or_path, getattr(tokenizer, "image_token_id", None)
        self.sequence, self.rank, self.size, self.rows, self.count = sequence, rank, size, rows, count
        self.start = start
        self.walk = Walk(sequence, start)

    def _take(self, first: int, stop: int) -> list[list[Document]]:
        """The rows [first, stop), counted from the start of the loader."""
        first, stop = first + self.start["rows"], stop + self.start["rows"]
        if self.walk.rows > first:
            self.walk = Walk(self.sequence, self.start)
        for _ in itertools.islice(self.walk, first - self.walk.rows):
            pass
        return list(itertools.islice(self.walk, stop - first))

    def __getitem__(self, number: int) -> dict[str, Any]:
        first = (number * self.size + self.rank) * self.rows
        documents = self._take(first, first + self.rows)
        length = self.sequence.max_length
        if not self.sequence.packing:
            longest = max((row[0].length for row in documents), default=1)
            length = min(-(-longest // UNPACKED_MULTIPLE) * UNPACKED_MULTIPLE, length)
        rows = [self.sequence.row(row, length) for row in documents + [[]] * (self.rows - len(documents))]
        # Not tensors yet: a worker needs a millisecond to hand one over, whatever its size, as it does so in shared
        # memory. Only pixels are large enough for that.
        batch: dict[str, Any] = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        if self.adapters is not None:
            batch["adapter_ids"] = self.adapters[batch["source"]]
        if pictures := [picture for row in documents for picture in self.sequence.pictures(row)]:
            try:
                batch |= self._pixels(pictures)
            except DataError as error:
                return {ERROR: str(error)}
            batch["mm_token_type_ids"] = (batch["input_ids"] == self.image_token).astype(np.int64)
        consumed = (number + 1) * self.size * self.rows
        self._take(consumed, consumed)
        batch[POSITION] = {**self.start, **self.walk.position}
        return batch

    def _pixels(self, pictures: list[tuple[str | bytes, int, str]]) -> dict[str, torch.Tensor]:
        values, positions = [], []
        for reference, tokens, where in pictures:
            try:
                image = images.pixels(reference, self.folder)
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
            if (now := int(image["num_soft_tokens_per_image"])) != tokens:
                raise DataError(
                    f"{where}: image {images.name_of(reference)} has {now} tokens now, and had {tokens} when it was "
                    "tokenised: it was changed. Remove data.cache_dir, or undo the change"
                )
            values.append(torch.from_numpy(image["pixel_values"]))
            positions.append(torch.from_numpy(image["image_position_ids"]))
        return {"pixel_values": torch.stack(values), "image_position_ids": torch.stack(positions)}


def build_loader(
    cfg: Config, tokenizer, split: str, dp_rank: int, dp_size: int, position: dict | None = None
) -> BatchLoader:
    """The loader of a rank.

    ``train`` has no end; its rows are empty beyond a run's ``epochs``. ``val`` is one pass over the validation sources
    in an order that doesn't depend on the seed; every rank gets the same number of batches, the last ones filled up
    with empty rows (labels -100, document_ids 0).

    Args:
        cfg: the whole configuration.
        tokenizer: fast, with a chat template.
        split: ``train`` or ``val``.
        dp_rank, dp_size: the rank among the data-parallel ones.
        position: what :func:`loader_position` gave, on any number of ranks and workers; None: the start.

    Yields:
        ``input_ids``, ``labels`` (-100: not a target; not shifted), ``position_ids`` (from 0 in each document),
        ``document_ids`` (0: padding; 1, 2, …: the documents of a row) and ``source`` (index into
        ``loader.source_names``, -1: padding), each ``[B, S]`` int64 on the CPU; with ``model.adapters`` also
        ``adapter_ids``, of each token the number of its adapter (-1: none). A batch with images also has
        ``mm_token_type_ids`` ``[B, S]`` int64 (1: stands for a part of an image), ``pixel_values`` ``[images, patches,
        values]`` float32 and ``image_position_ids`` ``[images, patches, 2]`` int64, in the order of the rows.

    Raises:
        DataError: bad data or settings.
        OtherData: a position of other data.
        TimeoutError: another process holds the cache and makes no progress.
    """
    data = cfg.data
    epochs = run_length(cfg)[1] if split == "train" else 1.0
    _check(data, split, epochs)
    specs = sources_of(data, split)
    timeout = cfg.parallel.timeout_seconds
    train = split == "train"
    sources = [open_source(spec, data, tokenizer, timeout) for spec in specs]
    sequence = RowSequence(
        sources,
        [spec.weight for spec in specs],
        data,
        seed=cfg.seed if train else 0,
        mixture=data.mixture if train else "epoch",
        shuffle=data.shuffle,
        epochs=epochs,
    )
    fingerprint = _fingerprint(cfg, split, [source.key for source in sources])
    made_of = describe(cfg, specs, sources, tokenizer)
    start = {**Walk(sequence).position, "data": fingerprint}
    if position is not None:
        if position["data"] != fingerprint:
            why = difference(position.get("made_of"), made_of)
            raise OtherData(
                f"the checkpoint's data position belongs to other data: {why}. "
                "To go on with its data, set that as it was; or start a run of its own (another output_dir) from the "
                "exported models"
            )
        start = {name: position[name] for name in start}
    count = None if train else -(-sequence.count_rows() // (dp_size * data.micro_batch_size))
    served = parse_served(cfg.model.adapters)
    of_sources = [adapter_index(served, spec.adapter) for spec in specs]
    batches = RankBatches(
        sequence, start, dp_rank, dp_size, data.micro_batch_size, count, tokenizer, of_sources if served else None
    )
    loader = BatchLoader(batches, data.num_workers, timeout, torch.cuda.is_available(), start, made_of)
    loader.source_adapters = [None if index < 0 else served[index].name for index in of_sources]
    return loader


def open_source(spec: SourceConfig, data: DataConfig, tokenizer, timeout: float) -> Pieces | StreamPieces:
    """The pieces of a source that go into rows. It is tokenised as a whole first, unless it is a stream without a
    limit.

    Raises:
        DataError: bad data, or nothing usable.
        TimeoutError: another process tokenises it and makes no progress.
    """
    if spec.streaming and spec.limit is None:
        return StreamPieces(spec, data, tokenizer, timeout)
    # The other ranks of this machine wait meanwhile: their loader processes' share of the cores is free.
    workers = data.num_workers * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    with naming(cache_folder(data), "data.cache_dir"):
        source = tokenised(spec, data, tokenizer, workers, timeout)
    pieces = cut(source, data)
    if not len(pieces):
        raise DataError(
            f"data source {pieces.name!r}: nothing is left of its {len(pieces.source.documents)} examples with "
            f"data.max_length={data.max_length}, data.overlong={data.overlong}, data.train_on={data.train_on}"
        )
    return pieces


def loader_position(loader: BatchLoader) -> dict:
    """The position after the last batch that the loader yielded: plain, and the same on every rank."""
    return {**loader.position, "made_of": loader.made_of}


def check_sources(cfg: Config) -> None:
    """What can be told of a run's data before a model is loaded: settings that can't work, and files that aren't there.

    Raises:
        DataError: naming the source.
    """
    for split in ("train", "val") if cfg.data.val else ("train",):
        _check(cfg.data, split, run_length(cfg)[1] if split == "train" else 1.0)
        for spec in sources_of(cfg.data, split):
            check_files(spec)


def _check(data: DataConfig, split: str, epochs: float | None) -> None:
    for key, choices in CHOICES.items():
        if getattr(data, key) not in choices:
            raise DataError(f"data.{key}={getattr(data, key)!r} is not one of {', '.join(map(str, choices))}")
    specs = data.train if split == "train" else data.val
    if not specs:
        raise DataError(f"data.{split} has no source: choose one of conf/data, or list sources with a path each")
    for index, spec in enumerate(specs):
        where = f"data.{split}[{index}] ({source_name(spec)})"
        check_source(where, spec.format, spec.columns)
        if spec.streaming and spec.limit is None and (epochs is not None or data.mixture == "epoch"):
            raise DataError(
                f"{where}: a stream's length isn't known, so it has no epoch: set its limit, or streaming=false"
                + (", or max_steps with data.mixture=endless" if split == "train" else "")
            )
        if spec.weight <= 0:
            raise DataError(f"{where}: weight={spec.weight} isn't positive")
        if split == "train" and data.mixture == "epoch" and spec.weight != 1.0:
            raise DataError(
                f"{where}: weight={spec.weight} has no effect with data.mixture=epoch, where each example is seen once "
                "an epoch; leave it at 1, or set data.mixture=endless"
            )


def _fingerprint(cfg: Config, split: str, keys: list[str]) -> str:
    """A hash of all that the sequence of rows depends on."""
    data = cfg.data
    weights = [spec.weight for spec in (data.train if split == "train" else data.val)]
    parts = [ORDER, keys, weights, cfg.seed, [getattr(data, key) for key in SETTINGS]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def describe(cfg, specs, sources, tokenizer) -> dict[str, Any]:
    """What the sequence of rows depends on, by name, in plain types: :func:`difference` compares two of them.

    Args:
        specs, sources: of a split, and what was made of them.
    """
    return {
        **{f"data.{key}": getattr(cfg.data, key) for key in SETTINGS},
        "order": ORDER,
        "seed": cfg.seed,
        **dict(zip(VERSIONS, (cache_key.VERSION, transformers.__version__, tokenizers.__version__), strict=True)),
        TOKENIZER: tokenizer_fingerprint(tokenizer)[:16],
        SOURCES: {source.name: [source.key, spec.weight] for spec, source in zip(specs, sources, strict=True)},
    }


def difference(before: dict[str, Any] | None, now: dict[str, Any]) -> str:
    """A description of what differs between two results of :func:`describe`; ``before`` is None in older
    checkpoints."""
    if before is None or before.get("order") != ORDER:
        return "the order of the rows changed with this version of joint-train"
    plain = [name for name in now if name not in (TOKENIZER, SOURCES) and before.get(name) != now[name]]
    found = [f"{name} was {before.get(name)} and is now {now[name]}" for name in plain]
    prepared = [name for name in plain if name in VERSIONS]  # each of these changes every source
    if before[TOKENIZER] != now[TOKENIZER]:
        prepared.append(TOKENIZER)
        found.append("the tokenizer, its chat template or its image processor is another one")
    old, new = before[SOURCES], now[SOURCES]
    found += [f"source {name!r} is gone" for name in old if name not in new]
    found += [f"source {name!r} is new" for name in new if name not in old]
    found += [
        f"the weight of source {name!r} was {old[name][1]:g} and is now {new[name][1]:g}"
        for name in new
        if name in old and old[name][1] != new[name][1]
    ]
    changed = [name for name in new if name in old and old[name][0] != new[name][0]]
    if changed and not prepared:
        which = ", ".join(map(repr, changed))
        found.append(
            f"the files of source {which} have other contents, or its format, columns, limit, chat_template_kwargs or "
            "data.max_line_bytes differ"
        )
    return "; ".join(found) or "the order of its sources"
