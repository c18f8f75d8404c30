"""Whether the tables and positions of a pair have room for the data, asked before weights are loaded."""

import logging
from collections.abc import Iterable

import numpy as np
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from joint_train.config import Config
from joint_train.data.loader import open_source
from joint_train.data.pieces import Pieces
from joint_train.data.readers import sources_of
from joint_train.data.streams import StreamPieces
from joint_train.errors import ConfigError, DataError

log = logging.getLogger(__name__)


def table_sizes(base: PreTrainedConfig, drafter: PreTrainedConfig | None = None) -> dict[str, int]:
    """Rows of the tables that token ids are looked up in, by their key in config.json."""
    text = base.get_text_config()
    sizes = {"the base's vocab_size": text.vocab_size}
    if getattr(text, "hidden_size_per_layer_input", 0):
        sizes["the base's vocab_size_per_layer_input"] = text.vocab_size_per_layer_input
    if drafter is not None:
        sizes["the drafter's vocab_size"] = drafter.get_text_config().vocab_size
    return sizes


def check_ids(rows: Iterable[Iterable[int]], tokenizer: PreTrainedTokenizerBase, base: PreTrainedConfig) -> None:
    """Refuse prompts with tokens that a base has no row for.

    Raises:
        ConfigError: naming one.
    """
    (name, size), *_ = sorted(table_sizes(base).items(), key=lambda item: item[1])
    if (largest := max((token for row in rows for token in row), default=-1)) >= size:
        raise ConfigError(
            f"a prompt has the token {tokenizer.convert_ids_to_tokens(largest)!r} ({largest}), and {name} is {size}: "
            "this tokenizer belongs to another base, or tokens were added to it and not to the base"
        )


def check_fit(
    cfg: Config, tokenizer: PreTrainedTokenizerBase, base: PreTrainedConfig, drafter: PreTrainedConfig
) -> None:
    """Refuse tokens beyond a table of the pair, and rows beyond the base's positions, before weights are loaded.

    Only where the tokenizer has such tokens, or ``data.max_length`` is beyond the positions, the data are tokenised and
    looked at: they needn't have them.

    Raises:
        DataError: if the data have such a token or such a document, or are a stream, which nobody knows.
    """
    (table, size), *_ = sorted(table_sizes(base, drafter).items(), key=lambda item: item[1])
    beyond = {token: name for name, token in tokenizer.get_vocab().items() if token >= size}
    positions = base.get_text_config().max_position_embeddings
    too_long = cfg.data.max_length > positions
    if not beyond and not too_long:
        return
    for split in ("train", "val"):
        for spec in sources_of(cfg.data, split):
            pieces = open_source(spec, cfg.data, tokenizer, cfg.parallel.timeout_seconds)
            if beyond:
                _check_tokens(pieces, beyond, table, size, tokenizer)
            if too_long:
                _check_lengths(pieces, cfg.data.max_length, positions)
    if beyond:
        some = ", ".join(map(repr, sorted(beyond.values())[:5]))
        log.warning(
            "%d tokens of the tokenizer are beyond %s=%d (%s%s). The data have none of them, but a served prompt that "
            "has one fails", len(beyond), table, size, some, ", …" if len(beyond) > 5 else "",
        )  # fmt: skip


def _check_tokens(
    pieces: Pieces | StreamPieces, beyond: dict[int, str], table: str, size: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    if isinstance(pieces, Pieces):
        for piece in range(len(pieces)):
            tokens, _ = pieces.read(piece)
            if (largest := int(tokens.max(initial=0))) >= size:
                what, where = f"has {tokenizer.convert_ids_to_tokens(largest)!r} ({largest})", pieces.where(piece)
                break
        else:
            return
    else:
        what, where = "is a stream, which may have them", f"data source {pieces.name!r}"
    raise DataError(
        f"{where} {what}, and the tokenizer has {len(beyond)} tokens beyond {table}={size}, the first of them "
        f"{beyond[min(beyond)]!r}: no table of the pair has a row for them. Set data.tokenizer to the one that belongs "
        "to the base, or model.resize_vocabulary=true, which gives them rows"
    )


def _check_lengths(pieces: Pieces | StreamPieces, max_length: int, positions: int) -> None:
    if isinstance(pieces, Pieces):
        longest = int(np.argmax(pieces.length))
        if (length := int(pieces.length[longest])) <= positions:
            return
        what = f"{pieces.where(longest)} has {length} tokens"
    else:
        what = f"data source {pieces.name!r} is a stream with documents of any length"
    raise DataError(
        f"{what}, and with data.max_length={max_length} rows would go beyond the base's {positions} positions "
        f"(max_position_embeddings). Set data.max_length={positions}; or, to train the base for longer texts, "
        f"model.text_config={{max_position_embeddings: {max_length}}}"
    )
