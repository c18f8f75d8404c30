"""Turns an example into tokens and marks those that the assistant wrote."""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding

from joint_train.data import notices as kinds
from joint_train.data import places, rendered
from joint_train.data.answers import Conversation, Text
from joint_train.data.render import Span, control_pattern, encoding
from joint_train.errors import DataError

ASSISTANT = 1
"""Flag of a token that the assistant wrote."""
LAST = 2
"""Flag of a token of the last assistant message."""
IMAGE = 4
"""Flag of a token that stands for an image or a part of one: never a target."""


class Document(NamedTuple):
    """A text of an example, tokenised.

    Attributes:
        tokens: ``[T]`` int32.
        flags: ``[T]`` uint8 (ASSISTANT, LAST).
        messages: how many of the example's messages are in it; 0: it is plain text.
        earlier: a later document of the same example has more of the conversation.
    """

    tokens: np.ndarray
    flags: np.ndarray
    messages: int = 0
    earlier: bool = False


def encode(example: dict[str, Any], tokenizer, notices: Counter[str] | None = None) -> list[Document]:
    """The documents of an example: its :func:`texts`, tokenised."""
    return [tokenise(text, tokenizer) for text in texts(example, tokenizer, notices)]


def texts(example: dict[str, Any], tokenizer, notices: Counter[str] | None = None) -> list[Text]:
    """The texts of an example (see :mod:`joint_train.data.answers` for when they are several).

    There is none if the example says that it isn't trained on (``"train": False``).

    Args:
        example: see :mod:`joint_train.data.formats`.
        tokenizer: with a chat template, unless the example is a text.
        notices: counts what is worth knowing, by the kinds of :mod:`joint_train.data.notices`.

    Raises:
        DataError: the template refuses the conversation or leaves a part of it out, or what the assistant wrote can't
            be told.
    """
    if not example.get("train", True):
        return []
    notices = Counter() if notices is None else notices
    if "text" in example:
        text = example["text"]
        inside = _without_its_end(text, tokenizer).removeprefix(tokenizer.bos_token or "")
        inside = inside.removesuffix(tokenizer.eos_token or "")
        notices[kinds.TEMPLATED] += bool(rendered.control_tokens(inside, control_pattern(tokenizer)))
        return [Text(text, 0)]
    conversation = Conversation(example, tokenizer)
    found = conversation.texts()
    rendered.check(conversation, found)
    notices.update(conversation.notices)
    return found


def tokenise(text: Text, tokenizer) -> Document:
    """A text as tokens, with what of them is trained on.

    Raises:
        DataError: a plain text that is empty.
    """
    if not text.messages:
        return _tokenise_plain(text.text, tokenizer)
    ids, runs = _tokens(text, tokenizer)
    flags = np.zeros(len(ids), dtype=np.uint8)
    for of_answer in runs:
        last = of_answer is runs[-1] and not text.earlier
        for start, end in of_answer:
            flags[start:end] |= ASSISTANT | LAST if last else ASSISTANT
    return Document(ids, flags, text.messages, text.earlier)


def _without_its_end(text: str, tokenizer) -> str:
    """A plain text without the white space after the token that ends it, if it has that token."""
    stripped = text.rstrip()
    return stripped if tokenizer.eos_token and stripped.endswith(tokenizer.eos_token) else text


def _tokenise_plain(text: str, tokenizer) -> Document:
    """A text between the tokens that begin and end one, of which it may have its own already."""
    ids = list(tokenizer(_without_its_end(text, tokenizer), add_special_tokens=False)["input_ids"])
    if not ids:
        raise DataError("an empty text")
    if tokenizer.bos_token_id not in (None, ids[0]):
        ids.insert(0, tokenizer.bos_token_id)
    if tokenizer.eos_token_id not in (None, ids[-1]):
        ids.append(tokenizer.eos_token_id)
    return Document(np.asarray(ids, dtype=np.int32), np.full(len(ids), ASSISTANT | LAST, dtype=np.uint8))


def _tokens(text: Text, tokenizer) -> tuple[np.ndarray, list[list[Span]]]:
    """The tokens of a text, and for each answer the places [first, last) of those that are trained on."""
    if all(answer.spans and answer.spans[0][0] == answer.start for answer in text.answers):
        found = places.tokens_of(tokenizer, text.text, [span for answer in text.answers for span in answer.spans])
        if found is not None:
            ids, of_spans = found
            remaining = iter(of_spans)
            return ids, [[next(remaining) for _ in answer.spans] for answer in text.answers]
    tokens, runs = _tokens_by_places(text, tokenizer)
    return np.asarray(tokens, dtype=np.int32), runs


def _tokens_by_places(text: Text, tokenizer) -> tuple[list[int], list[list[Span]]]:
    """The same, for any text and tokenizer."""
    encoded = encoding(tokenizer, text.text)
    if not any(_cuts_a_token(encoded, answer.start) for answer in text.answers):
        return encoded.ids, [_token_runs(encoded, answer.spans, 0) for answer in text.answers]
    # An engine has tokenised the prompt when the answer begins: no token holds the end of one and the start of the
    # other.
    starts = [answer.start for answer in text.answers]
    ids: list[int] = encoding(tokenizer, text.text[: starts[0]]).ids
    runs = []
    for answer, begun, end in zip(text.answers, starts, [*starts[1:], len(text.text)], strict=True):
        piece = encoding(tokenizer, text.text[begun:end])
        found = _token_runs(piece, answer.spans, begun)
        runs.append([(len(ids) + first, len(ids) + last) for first, last in found])
        ids += piece.ids
    return ids, runs


def _cuts_a_token(encoded: Encoding, at: int) -> bool:
    token = encoded.char_to_token(at) if at else None
    place = None if token is None else encoded.token_to_chars(token)
    return place is not None and place[0] < at


def _token_runs(encoded: Encoding, spans: list[Span], begun: int) -> list[Span]:
    """The tokens [first, last) that hold each of some spans of characters, of a text that begins at ``begun``."""
    return [run for start, end in spans if (run := _token_run(encoded, start - begun, end - begun))]


def _token_run(encoded: Encoding, start: int, end: int) -> Span | None:
    # Some tokenizers leave white space before a word out of every token's place.
    first = next((token for at in range(start, end) if (token := encoded.char_to_token(at)) is not None), None)
    if first is None:
        return None
    last = next(token for at in range(end - 1, start - 1, -1) if (token := encoded.char_to_token(at)) is not None)
    return first, _whole_character(encoded, last + 1)


def _whole_character(encoded: Encoding, end: int) -> int:
    """``end`` without a cut in a character: one may be several tokens, and only the first is found by its place."""
    while end < len(encoded) and encoded.token_to_chars(end) == encoded.token_to_chars(end - 1):
        end += 1
    return end
