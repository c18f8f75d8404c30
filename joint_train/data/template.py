"""From an example to tokens, and which of them the assistant wrote.

A chat template can mark what the assistant writes (``{% generation %}``); then the marks are used. Few released
templates do. For the others the same spans are found by rendering the conversation again up to each assistant message:

- a message starts where the *generation prompt* ends, which is what the model is given when it has to write it;
- it ends with the last token that the template itself writes to close the turn, because the model has to write that
  one too, but without the white space that follows;
- a template may render a turn otherwise once others follow it (Qwen 3 and Gemma 4 drop the thinking of earlier turns).
  The end of such a turn is found by rendering the conversation with other content in its place.
"""

import re
from typing import Any

import numpy as np

from joint_train.data.messages import THINKING
from joint_train.errors import DataError

ASSISTANT = 1
"""Flag of a token that the assistant wrote."""
LAST = 2
"""Flag of a token of the last assistant message."""
IMAGE = 4
"""Flag of a token that stands for an image or a part of one: never a target."""

MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Two texts that share no character at either end, and that no template treats in a special way.
PROBES = ("\ue000probe\ue001", "\ue002other\ue003")


def encode(example: dict[str, Any], tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Token ids ``[T]`` int32 and their flags ``[T]`` uint8 (ASSISTANT, LAST).

    Raises:
        DataError: the template refuses the conversation, or its spans can't be found.
    """
    if "text" in example:
        return _encode_text(example["text"], tokenizer)
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template: set data.tokenizer to one that has "
            "(for example that of the instruction-tuned model of the same family)"
        )
    messages = example["messages"]
    options = {"tools": example.get("tools"), **example.get("chat_template_kwargs", {})}
    context = set(example.get("context", ()))
    if MARKS.search(tokenizer.get_chat_template(tools=options["tools"])) and not context:
        encoded = _encode_marked(messages, tokenizer, options)
        ids = encoded["input_ids"]
        runs = [(start, _whole_character(encoded, end)) for start, end in _runs(encoded["assistant_masks"])]
    else:
        text = render(tokenizer, messages, **options)
        encoded = tokenizer(text, add_special_tokens=False)
        ids = encoded["input_ids"]
        written = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        spans = zip(written, assistant_spans(tokenizer, messages, text, **options), strict=True)
        runs = [run for index, span in spans if index not in context and (run := _token_run(encoded, *span))]
    flags = np.zeros(len(ids), dtype=np.uint8)
    for start, end in runs:
        flags[start:end] |= ASSISTANT
    if runs:
        start, end = runs[-1]
        flags[start:end] |= LAST
    return np.asarray(ids, dtype=np.int32), flags


def _encode_text(text: str, tokenizer) -> tuple[np.ndarray, np.ndarray]:
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise DataError("an empty text")
    if tokenizer.bos_token_id is not None:
        ids.insert(0, tokenizer.bos_token_id)
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return np.asarray(ids, dtype=np.int32), np.full(len(ids), ASSISTANT | LAST, dtype=np.uint8)


def _encode_marked(messages: list[dict], tokenizer, options: dict):
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
        )
    except Exception as error:  # a template may raise anything
        raise _refused(tokenizer, error) from None


def render(tokenizer, messages: list[dict], add_generation_prompt: bool = False, **options) -> str:
    """The conversation as text.

    Raises:
        DataError: the template refuses it.
    """
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )
    except Exception as error:  # a template may raise anything
        raise _refused(tokenizer, error) from None


def _refused(tokenizer, error: Exception) -> DataError:
    return DataError(f"the chat template of {tokenizer.name_or_path!r} refuses it: {type(error).__name__}: {error}")


def assistant_spans(tokenizer, messages: list[dict], text: str, **options) -> list[tuple[int, int]]:
    """Where in ``text``, the rendered conversation, each assistant message stands, with the token that ends its turn.

    Returns:
        (start, end) of each, in characters.

    Raises:
        DataError: the template renders them in a way that hides where a message starts or ends.
    """
    special = _special_pattern(tokenizer)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if message.get("tool_responses"):
            raise DataError(
                f"message {index} is the assistant's and holds tool_responses, which it didn't write: give each in a "
                "message of the role tool, or put {% generation %} marks into the template"
            )
        start = _start(tokenizer, messages, index, text, special, options)
        end = _end(tokenizer, messages, index, text, start, special, options)
        if not (spans[-1][1] if spans else 0) <= start <= end:
            raise _hidden(tokenizer, index)
        spans.append((start, end))
    return spans


def _start(tokenizer, messages, index, text, special, options) -> int:
    """The end of the generation prompt; without one, the first character that depends on the message's content."""
    start = len(text)
    if index:
        before = render(tokenizer, messages[:index], **options)
        prompt = render(tokenizer, messages[:index], add_generation_prompt=True, **options)
        if prompt != before and text.startswith(prompt):
            return len(prompt)
        if prompt != before and text.startswith(before):
            # With thinking off, Gemma 4 prompts with an empty thinking channel that it leaves out of the history.
            common = _common_prefix(text, prompt, special)
            start = common if common > len(before) else start
    replaced = _replaced(tokenizer, messages, index, options)
    return min(start, *(_common_prefix(text, other, special) for other in replaced))


def _end(tokenizer, messages, index, text, start, special, options) -> int:
    """The end of the conversation that stops with the message, as far as that is in the text."""
    whole = messages[: index + 1]
    for upto in (whole, [_without_thinking(message) for message in whole]):
        upto = render(tokenizer, upto, **options)
        common = _common_prefix(text, upto, special)
        if common > start and not special.sub("", upto[common:]).strip():
            # All that the message renders to is in the text; the two may close the turn in different ways.
            return _close(text, start, common, special)
    if messages[index].get("tool_calls"):
        # Other content in their place would change the results that follow, too.
        raise _hidden(tokenizer, index)
    upto = render(tokenizer, whole, **options)
    rest = len(text) - max(
        _common_suffix(text, other, special) for other in _replaced(tokenizer, messages, index, options)
    )
    tail = len(upto) - max(
        _common_suffix(upto, other, special) for other in _replaced(tokenizer, messages[: index + 1], index, options)
    )
    closing = _common_prefix(text[rest:], upto[tail:], special)
    return _close(text, start, rest + closing, special)


def _without_thinking(message: dict) -> dict:
    return {key: value for key, value in message.items() if key not in THINKING}


def _replaced(tokenizer, messages, index, options) -> list[str]:
    """The conversation rendered with other content in the place of one message."""
    texts = []
    for probe in PROBES:
        changed = [*messages]
        changed[index] = {"role": messages[index]["role"], "content": probe}
        rendered = render(tokenizer, changed, **options)
        if rendered.count(probe) != 1:
            raise _hidden(tokenizer, index)
        texts.append(rendered)
    return texts


def _hidden(tokenizer, index: int) -> DataError:
    return DataError(
        f"message {index}: the chat template of {tokenizer.name_or_path!r} renders it so that where it starts and ends "
        "can't be told: put {% generation %} marks into the template"
    )


def _close(text: str, start: int, end: int, special: re.Pattern) -> int:
    """``end`` without the white space after the last special token, which the model doesn't write."""
    stripped = start + len(text[start:end].rstrip())
    return stripped if any(match.end() == stripped for match in special.finditer(text, start, end)) else end


def _special_pattern(tokenizer) -> re.Pattern:
    tokens = sorted({str(token) for token in tokenizer.added_tokens_decoder.values()}, key=len, reverse=True)
    return re.compile("|".join(re.escape(token) for token in tokens if token.strip()) or r"(?!)")


def _common_prefix(a: str, b: str, special: re.Pattern) -> int:
    """Length of the longest common prefix that doesn't end inside a special token of either."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    for text in (a, b):
        for match in special.finditer(text):
            if match.start() >= low:
                break
            if match.end() > low:
                low = match.start()
                break
    return low


def _common_suffix(a: str, b: str, special: re.Pattern) -> int:
    """Length of the longest common suffix that doesn't start inside a special token of either."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[len(a) - middle :] == b[len(b) - middle :] else (low, middle - 1)
    for text in (a, b):
        cut = len(text) - low
        for match in special.finditer(text):
            if match.start() >= cut:
                break
            if match.end() > cut:
                low = len(text) - match.end()
                break
    return low


def _token_run(encoded, start: int, end: int) -> tuple[int, int] | None:
    """The tokens [first, last) that hold the characters [start, end)."""
    if start == end:
        return None
    first, last = encoded.char_to_token(start), encoded.char_to_token(end - 1)
    if first is None:
        return None
    return first, len(encoded["input_ids"]) if last is None else _whole_character(encoded, last + 1)


def _whole_character(encoded, end: int) -> int:
    """``end`` without a cut in a character: one may be several tokens, and only the first is found by its place."""
    while end < len(encoded["input_ids"]) and encoded.token_to_chars(end) == encoded.token_to_chars(end - 1):
        end += 1
    return end


def _runs(mask: list[int]) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.asarray(mask, dtype=np.int8), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
