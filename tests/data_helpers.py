"""A tiny tokenizer, files of numbered examples and a configuration, for the data tests."""

import json
from pathlib import Path

from configs import compose
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from joint_train.config import Config

TURNS = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{- '<|turn>' + role + '\\n' -}}
    {%- if role == 'model' -%}
        {%- generation -%}{{- message['content'] | trim + '<turn|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] | trim + '<turn|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}
"""

SPECIAL = [
    "<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>",
    "<tool_call|>", "<|tool_response>", "<tool_response|>", "<|think|>", '<|"|>', "<|im_start|>", "<|im_end|>",
    "<|image|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]", "</s>",
]  # fmt: skip


def make_tokenizer(template: str | None = TURNS, texts=("user\nmodel\nsystem\n the quick brown fox",) * 3):
    """Byte-level BPE with the special tokens of several families."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", name_or_path="tiny"
    )
    fast.chat_template = template
    return fast


def chat(*turns: str) -> dict:
    """A conversation: user, assistant, user, …"""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]}


def numbered(count: int, prefix: str = "n", spread: int = 40) -> list[dict]:
    """Examples with different lengths, each with a name of its own: ``prefix0;`` …"""
    return [chat(f"{prefix}{i};", "x" * (1 + i * 7 % spread)) for i in range(count)]


def write_jsonl(path: Path, examples: list) -> str:
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return str(path)


def make_config(tmp_path: Path, train: list, val: list = (), **data) -> Config:
    """A configuration on these sources (paths, or dictionaries of ``SourceConfig``)."""
    sources = {
        split: [source if isinstance(source, dict) else {"path": source} for source in paths]
        for split, paths in (("train", train), ("val", val))
    }
    options = {"max_length": 64, "num_workers": 0, "cache_dir": str(tmp_path / "cache"), **sources, **data}
    settings = {f"data.{key}": value for key, value in options.items()} | {"parallel.timeout_seconds": 60}
    return compose(settings, check=False)  # the loader refuses what it can't use, too
