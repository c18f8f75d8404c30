"""Chats with pictures for engines, which render them by their own template: the tokens are compared with training's."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from joint_train.data.regenerate import data_url
from joint_train.data.render import Template, options_of
from joint_train.data.thinking import kept_thoughts
from joint_train.errors import DataError


def chat_body(example: dict, tokenizer) -> dict[str, Any]:
    """What a request to ``/v1/chat/completions`` has besides the model and the sampling.

    Args:
        example: ``messages``; ``images``, a path, a data URL or the bytes of a file for each of their places; and the
            options of the template.
    """
    options = options_of(example)
    tools = options.pop("tools", None)
    kept = kept_thoughts(Template(tokenizer, options_of(example)), example["messages"])
    pictures = iter(example["images"])
    body: dict[str, Any] = {
        "messages": [_as_openai(message, pictures) for message in kept],
        "chat_template_kwargs": options,
    }
    # The answer is wanted as it was written, so the engine shall not look for calls in it.
    return body | ({"tools": tools, "tool_choice": "none"} if tools else {})


def check_prompt(url: str, name: str, tokenizer, ours: Sequence[int], answer: dict) -> None:
    """Compare the prompt that an engine made of a chat with training's, where the answer says which tokens it was.

    Args:
        name: of the prompt.
        ours: its tokens; a picture is one placeholder, or a begin token, any number of placeholders and an end token.

    Raises:
        DataError: it is another one.
    """
    given = answer["choices"][0].get("prompt_token_ids") or answer.get("prompt_token_ids")
    if given is None:
        return
    begin, end = tokenizer.boi_token_id, tokenizer.eoi_token_id

    def of_text(ids: Sequence[int]) -> list[int]:
        """The tokens with one placeholder for each picture."""
        kept, inside = [], False
        for before, token in zip([None, *ids], ids, strict=False):
            inside = token == begin or (inside and token != end)
            if token not in (begin, end) and not (inside and token == before == tokenizer.image_token_id):
                kept.append(token)
        return kept

    theirs, ours = of_text(given), of_text(ours)
    if theirs != ours:
        pairs = enumerate(zip(theirs, ours, strict=False))
        at = next((at for at, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
        texts = [tokenizer.decode(tokens[max(0, at - 5) : at + 5]) for tokens in (theirs, ours)]
        raise DataError(
            f"{name} has pictures, so {url} renders it by its own chat template, and from token {at} it isn't "
            f"training's: {texts[0]!r} instead of {texts[1]!r}. Start the engine with this tokenizer's template (vLLM: "
            "--chat-template)"
        )


def _as_openai(message: dict, pictures: Iterator[str | bytes]) -> dict:
    """A message as OpenAI's API takes it; its pictures are the next ones."""
    message = {**message}
    if isinstance(message.get("content"), list):
        message["content"] = [
            {"type": "image_url", "image_url": {"url": _url(next(pictures))}} if part["type"] == "image" else part
            for part in message["content"]
        ]
    if "reasoning" in message:
        message["reasoning_content"] = message["reasoning"]
    if calls := message.get("tool_calls"):
        message["tool_calls"] = [
            {**call, "id": call.get("id", f"call_{number}"), "function": {
                **call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)
            }}
            for number, call in enumerate(calls)
        ]  # fmt: skip
    return message


def _url(picture: str | bytes) -> str:
    if isinstance(picture, str) and picture.startswith("data:"):
        return picture
    return data_url(picture if isinstance(picture, bytes) else Path(picture).read_bytes())
