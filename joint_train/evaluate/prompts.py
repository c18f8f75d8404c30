"""Prompts to measure on: a run's validation data, the general set of this package, or anybody's chat JSONL.

A record needs no answer. Its ``category`` is its group in the report; where it says its ``source`` (or ``dataset``) and
its ``language`` (or ``lang``), acceptance is reported by those as well.
"""

import logging
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from joint_train.config import DataConfig, SourceConfig
from joint_train.data import images
from joint_train.data.readers import read_records, source_name, sources_of
from joint_train.data.render import options_of
from joint_train.data.sources import parse, row_of
from joint_train.data.template import Document
from joint_train.data.thinking import prompt_ids
from joint_train.data.tokenizer import end_token_ids
from joint_train.errors import ConfigError
from joint_train.starter import examples
from joint_train.weights.run_files import list_of_ids

log = logging.getLogger(__name__)

GENERAL, STARTER = "general", "starter"
TEXT_PROMPT_TOKENS = 64  # of an example that is plain text: its beginning is the prompt


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        ids: its tokens; of a picture as many placeholders as it has soft tokens.
        text: for people.
        category: the group that it is reported in.
        adapter: that the base has on it.
        source, language: where it comes from and what it is written in, if its record says so.
        inputs: what the base's first forward takes of its pictures, see :func:`picture_inputs`.
        chat: with pictures, the messages up to the answer, their pictures and the options of the template: engines
            render such a prompt themselves.
    """

    ids: list[int]
    text: str
    category: str
    adapter: str | None = None
    source: str | None = None
    language: str | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    chat: dict[str, Any] | None = None


def validation_prompts(data: DataConfig, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Prompt]:
    """The first prompts of a run's validation sources, taken from each in turn; the same on every rank."""

    def of(source: SourceConfig) -> Iterator[Prompt]:
        for prompt in source_prompts(source, tokenizer, data.max_line_bytes):
            yield replace(prompt, adapter=source.adapter)

    streams = [of(source) for source in sources_of(data, "val")]
    prompts: list[Prompt] = []
    while streams and len(prompts) < count:
        stream = streams.pop(0)
        if (prompt := next(stream, None)) is not None:
            prompts.append(prompt)
            streams.append(stream)
    return prompts


def load_prompts(
    name: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
    template_options: dict | None = None,
) -> list[Prompt]:
    """Prompts of a set: ``general``, ``starter``, or a file in any format that training data has; or of several sets,
    which are the sources of those that don't say another.

    Args:
        limit: at most so many of each set.
        template_options: the chat template's, as ``data.chat_template_kwargs`` are in training.

    Raises:
        joint_train.data.DataError: if the file isn't there or one of its lines is bad.
        ValueError: if there are none.
    """
    options = template_options or {}
    if not isinstance(name, str):
        sets = [(each, load_prompts(each, tokenizer, limit, options)) for each in name]
        if len(sets) == 1:
            return sets[0][1]
        names = {each: each if each in (GENERAL, STARTER) else Path(each).name.split(".")[0] for each in name}
        return [replace(p, source=p.source or names[each]) for each, prompts in sets for p in prompts]
    if name == STARTER:
        _, held_out = examples(Path(sysconfig.get_paths()["stdlib"]))
        prompts = [chat_prompt(chat["messages"], tokenizer, STARTER, **options) for chat in held_out[:limit]]
    else:
        file = resources.files(__package__) / "prompts.jsonl" if name == GENERAL else Path(name)
        source = SourceConfig(path=str(file), name=name if name == GENERAL else None, chat_template_kwargs=options)
        prompts = list(islice(source_prompts(source, tokenizer), limit))
    if not prompts:
        raise ConfigError(f"no prompts in {name}")
    return prompts


def warn_of_template(
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig | None = None,
    template_options: dict | None = None,
) -> None:
    """Warn where prompts have no turns, and where answers don't end as the chat template ends them.

    Args:
        generation: of the base.
    """
    if not tokenizer.chat_template:
        log.warning(
            "the tokenizer %s has no chat template: the prompts are plain text, without turns, which a model that "
            "was taught turns doesn't know. Give a base whose folder has the chat_template.jinja of its training",
            tokenizer.name_or_path,
        )
        return
    if generation is None:
        return
    known = list_of_ids(generation.eos_token_id)
    if missing := [token for token in end_token_ids(tokenizer, template_options) if token not in known]:
        log.warning(
            "the base's generation configuration doesn't end with %s, with which its chat template ends an answer: "
            "engines go on after it, and so does this measurement. Add %s to eos_token_id in generation_config.json",
            " or ".join(map(str, tokenizer.convert_ids_to_tokens(missing))),
            " and ".join(map(str, missing)),
        )


def source_prompts(
    source: SourceConfig, tokenizer: PreTrainedTokenizerBase, max_line_bytes: int = 1 << 24
) -> Iterator[Prompt]:
    """Yield the prompts of a data source: a chat up to its last assistant turn, or the beginning of a text."""
    for record in read_records(source, max_line_bytes):
        example = parse(record, source, answered=False)
        row = row_of(record)

        def said(*names: str, row: dict[str, Any] = row) -> str | None:
            return next((str(row[name]) for name in names if isinstance(row.get(name), (str, int))), None)

        category = str(row.get("category", source_name(source)))
        facts: dict[str, Any] = {"source": said("source", "dataset"), "language": said("language", "lang")}
        if "messages" not in example:
            ids = tokenizer(example["text"])["input_ids"][:TEXT_PROMPT_TOKENS]
            yield Prompt(ids, cast(str, tokenizer.decode(ids, skip_special_tokens=True)), category, **facts)
        elif any(message["role"] != "assistant" for message in example["messages"]):
            prompt = chat_prompt(example["messages"], tokenizer, category, **options_of(example))
            if "images" in example:
                asked = _asked(example["messages"])
                shown = images.of_messages(example, len(asked))
                ids, inputs = picture_inputs(prompt.ids, shown, tokenizer)
                facts |= {"inputs": inputs, "chat": {**example, "messages": asked, "images": shown}}
                prompt = replace(prompt, ids=ids)
            yield replace(prompt, **facts)


def chat_prompt(messages: list[dict], tokenizer: PreTrainedTokenizerBase, category: str, **options) -> Prompt:
    """The prompt of a chat: all of it before the assistant's last turn; ``options`` go to the chat template."""
    messages = _asked(messages)
    text = text_of(messages[-1]["content"])
    if tokenizer.chat_template:
        ids = prompt_ids(tokenizer, messages, **options)
    else:  # a base model that was never taught turns; said by warn_of_template
        ids = tokenizer(text)["input_ids"]
    return Prompt(ids, text, category)


def _asked(messages: list[dict]) -> list[dict]:
    """The messages before the assistant's last turn."""
    while messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages


def picture_inputs(
    ids: list[int], references: list[str | bytes], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], dict[str, Tensor]]:
    """A prompt's tokens with the placeholders of its pictures, and what the base takes of them, as in training.

    Returns:
        The tokens; ``pixel_values`` ``[images, patches, values]`` float32, ``image_position_ids``
        ``[images, patches, 2]`` int64 and ``mm_token_type_ids`` ``[1, S]`` int64.

    Raises:
        DataError: a picture doesn't decode, or the tokenizer or its folder know none.
    """
    document = Document(np.array(ids, dtype=np.int32), np.zeros(len(ids), dtype=np.uint8))
    document, _ = images.expand(document, references, tokenizer)
    tokens = torch.from_numpy(document.tokens).long()
    found = [images.pixels(reference, tokenizer.name_or_path) for reference in references]
    inputs = {name: torch.stack([torch.from_numpy(one[name]) for one in found])
              for name in ("pixel_values", "image_position_ids")}  # fmt: skip
    inputs["mm_token_type_ids"] = (tokens == cast(Any, tokenizer).image_token_id).long()[None]
    return tokens.tolist(), inputs


def text_of(content: str | list) -> str:
    """A message's text, without its images and sounds."""
    return content if isinstance(content, str) else " ".join(p["text"] for p in content if p.get("type") == "text")
