"""Prompts to measure on: a run's validation data, the general set of this package, or anybody's chat JSONL."""

import json
import logging
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, cast

from transformers import GenerationConfig, PreTrainedTokenizerBase

from joint_train.config import DataConfig, SourceConfig
from joint_train.data.readers import read_records, source_name, sources_of
from joint_train.data.render import options_of
from joint_train.data.sources import parse
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
    """One prompt: its tokens, the text for people, the group it is reported in, and the adapter that the base has."""

    ids: list[int]
    text: str
    category: str
    adapter: str | None = None


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
    name: str, tokenizer: PreTrainedTokenizerBase, limit: int | None = None, template_options: dict | None = None
) -> list[Prompt]:
    """Prompts of a set: ``general``, ``starter``, or a file in any format that training data has.

    ``template_options`` are the chat template's, as ``data.chat_template_kwargs`` are in training.

    Raises:
        joint_train.data.DataError: if the file isn't there or one of its lines is bad.
        ValueError: if there are none.
    """
    options = template_options or {}
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
    """Yield the prompts of a data source: a chat up to its last assistant turn, or the beginning of a text.

    A record's ``category`` is its group in the report; the source's name otherwise.
    """
    for record in read_records(source, max_line_bytes):
        example = parse(record, source)
        fields = cast(dict[str, Any], json.loads(record.data) if isinstance(record.data, bytes) else record.data)
        category = str(fields.get("category", source_name(source)))
        if "messages" not in example:
            ids = tokenizer(example["text"])["input_ids"][:TEXT_PROMPT_TOKENS]
            yield Prompt(ids, cast(str, tokenizer.decode(ids, skip_special_tokens=True)), category)
            continue
        if any(message["role"] != "assistant" for message in example["messages"]):
            yield chat_prompt(example["messages"], tokenizer, category, **options_of(example))


def chat_prompt(messages: list[dict], tokenizer: PreTrainedTokenizerBase, category: str, **options) -> Prompt:
    """The prompt of a chat: all of it before the assistant's last turn; ``options`` go to the chat template."""
    while messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    text = text_of(messages[-1]["content"])
    if tokenizer.chat_template:
        ids = prompt_ids(tokenizer, messages, **options)
    else:  # a base model that was never taught turns; said by warn_of_template
        ids = tokenizer(text)["input_ids"]
    return Prompt(ids, text, category)


def text_of(content: str | list) -> str:
    """A message's text, without its images and sounds."""
    return content if isinstance(content, str) else " ".join(p["text"] for p in content if p.get("type") == "text")
