"""The tokenizer of a run: how it is loaded, and which tokens end an answer."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from joint_train.config import Config
from joint_train.data import template
from joint_train.data.render import Template
from joint_train.errors import ConfigError, DataError
from joint_train.files import LFS_POINTER, is_lfs_pointer
from joint_train.weights.folders import read_config, resolve

log = logging.getLogger(__name__)

CONVERSATION = [{"role": "user", "content": "Question?"}, {"role": "assistant", "content": "Answer."}]


def load_tokenizer(cfg: Config) -> PreTrainedTokenizerBase:
    """``data.tokenizer``, or by default that of the base's folder. Collective under a process group.

    Raises:
        ConfigError: if there is none.
    """
    if cfg.data.tokenizer:
        return read_tokenizer(cfg.data.tokenizer, "data.tokenizer")
    folder = resolve(cfg.model.base, cfg.model.revision, cfg.model.cache_dir)
    if (folder / "config.json").exists():  # transformers reads it for the tokenizer, too, and would blame that
        read_config(folder, quantized=None)
    return read_tokenizer(folder, "model.base")


def read_tokenizer(path: str | os.PathLike, key: str = "") -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id.

    Args:
        key: of the configuration, for messages.

    Raises:
        ConfigError: if there is none that can be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers raises errors of many kinds for what isn't there
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        pointers = [name for name in ("tokenizer.json", "tokenizer_config.json") if is_lfs_pointer(Path(path) / name)]
        reason = f"{pointers[0]}: {LFS_POINTER}" if pointers else reason
        advice = "set data.tokenizer to one" if key != "data.tokenizer" else "give a folder or hub id that has them"
        raise ConfigError(
            f"{f'{key}=' if key else ''}{path} has no tokenizer that can be read (tokenizer.json, "
            f"tokenizer_config.json). Copy these files there from the model that it was made from, or {advice}. "
            f"({type(error).__name__}: {reason})"
        ) from error
    if Path(path).is_dir() and not (Path(path) / "tokenizer_config.json").exists() and tokenizer.chat_template:
        reads = Template(tokenizer, {}).reads
        if lacks := [name for name in ("bos_token", "eos_token") if name in reads and not getattr(tokenizer, name)]:
            raise ConfigError(
                f"{path} has no tokenizer_config.json, which says which tokens are special, and its chat template "
                f"writes {' and '.join(lacks)}: copy it there from the model that this one was made from"
            )
    return tokenizer


def end_token_ids(tokenizer: PreTrainedTokenizerBase, options: dict[str, Any] | None = None) -> list[int]:
    """The tokens that end what a model writes, as training teaches it: that with which the chat template closes an
    answer, and that which ends a text.

    Args:
        options: of the chat template.
    """
    ends = list[int]()
    if tokenizer.chat_template:
        try:
            example = {"messages": CONVERSATION, "chat_template_kwargs": options or {}}
            document = template.encode(example, tokenizer)[-1]
        except DataError as error:
            log.warning("which token ends an answer can't be told: %s", error)
        else:
            last = int(document.tokens[np.flatnonzero(document.flags & template.ASSISTANT)[-1]])
            if last in tokenizer.added_tokens_decoder and last != tokenizer.unk_token_id:
                ends.append(last)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    return ends
