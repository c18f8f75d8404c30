"""What the name of a field says: that it is a part of the conversation, or that something is not trained on.

Rows come with fields that their format doesn't read. One that is a part of the conversation by its name must not be
lost silently. The names are those that LLaMA-Factory, axolotl, TRL, ms-swift, OpenRLHF and LLaVA document, and those
of much used datasets. A name of several words (``chat_history``, ``sqlContext``) counts by its words.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from joint_train.errors import DataError

REASONING = (
    "reasoning", "reasoning_content", "thinking", "thought", "thoughts", "cot", "complex_cot", "chain_of_thought",
    "reasoning_text", "think", "reasoning_details",
)  # fmt: skip
"""The fields that hold what the assistant thought before its answer."""
PREFERENCES = (
    "chosen", "rejected", "kto_tag", "chosen_response", "rejected_response", "chosen_messages", "rejected_messages",
    "positive_messages", "negative_messages", "rejected_images",
)  # fmt: skip
"""Fields of preference data."""
TOKENISED = ("input_ids", "segments")
"""Fields of data that is tokenised or cut into masked segments already."""
MEDIA = ("audios", "audio", "videos", "video", "ref_audios", "audio_codes")

# Words of names of content, by what they are. What is beside a complete conversation may be a copy or a reference
# answer: it is counted. The rest changes what an answer answers: it is refused.
REFUSED = {
    "a part of the question": (
        "context contexts passage passages document documents doc docs article background evidence paragraph "
        "paragraphs knowledge input inputs schema facts question prompt query instruction problem message body "
        "segments unanswerable attachment attachments"
    ),
    "earlier turns": "history histories",
    "the choices of a question": "choices options choice candidates alternatives distractors",
    "reasoning": "reasoning thinking thought thoughts cot rationale scratchpad",
    "a system prompt": "system persona",
    "tools": "tools tool functions function apis api",
    "a conversation": "messages conversations conversation dialog dialogue turns chat",
    "pictures or what is marked in them": "images image objects",
    "corrections of the answer": "reflection corrected critique critiques revision revised",
}
COUNTED = (
    "answer answers response responses completion completions output outputs solution solutions generation generations "
    "target targets summary explanation text content"
)
# With one of these a name is about the content: its number, its kind.
ABOUT = frozenset(
    "id ids uuid idx index len length count counts num number n tokens token type types source sources name names url "
    "uri lang language languages score scores hash date time timestamp model format is has quality difficulty label "
    "labels version topic topics domain subset split license title mode effort level style budget path file category "
    "categories tag tags meta metadata info reward rewards rating ratings correct correctness verified reference "
    "ground "
    "truth gold expected constraints prefix suffix code status stats task tasks template max min size ratio".split()
)
KINDS = {word: kind for kind, words in REFUSED.items() for word in words.split()}
KINDS |= dict.fromkeys(COUNTED.split(), "")

TRAINED = frozenset("weight weights train training trainable trained loss supervised supervise learn learnable".split())
NOT = frozenset("no not without skip skipped ignore ignored exclude excluded masked frozen untrained dont".split())
# Names that mean the one to some and the other to others.
UNCLEAR = frozenset("mask masks detail details".split())
# Words that leave it clear that a name is about training.
FILLERS = frozenset(
    "is do on be to compute calculate calc sample example row message turn scale in of the for reasoning content "
    "assistant "
    "completion completions response responses token tokens".split()
)


def split_words(name: str) -> list[str]:
    """The words of a name, in lower case."""
    parts = re.findall(r"[a-z]+", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower())
    return parts + [part for part in name.lower().split("_") if part not in parts]  # CoT is one word


@lru_cache(maxsize=4096)
def kind_of_content(name: str) -> str | None:
    """What part of a conversation a field of this name is; "" for an answer or a text, None if it isn't one."""
    parts = split_words(name)
    if any(part in ABOUT for part in parts):
        return None
    return next((KINDS[part] for part in reversed(parts) if part in KINDS), None)


@lru_cache(maxsize=4096)
def says_trained(name: str) -> bool | None:
    """Whether a field of this name being true means that something is trained on; None: it isn't about that.

    Raises:
        DataError: it is about that, and which of them it means isn't clear.
    """
    parts = set(split_words(name))
    if not parts & (TRAINED | NOT | UNCLEAR) or parts - TRAINED - NOT - UNCLEAR - FILLERS:
        return None
    if parts & UNCLEAR:
        if not parts & TRAINED and not parts & {"mask", "masks"}:
            return None
        raise DataError(f"{name} says what is trained on, but not in a way that is understood here")
    return not parts & NOT


def trained(fields: dict, where: str, hint: str = "") -> tuple[bool, list[str]]:
    """Whether fields say that something is trained on, and the fields that say so.

    Args:
        fields: of a message or a row; null says nothing.
        where: to call it in an error.
        hint: what else to do, for an error.

    Raises:
        DataError: a value between yes and no, or a field that isn't understood.
    """
    found, said = True, []
    for name, value in fields.items():
        if value is None or not isinstance(name, str):
            continue
        try:
            positive = says_trained(name)
        except DataError as error:
            raise DataError(f"{where}: {error}: use train with true or false{hint}") from None
        if positive is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise DataError(
                f"{where} has {name} {_shorten(value)}: it is trained on (1 or true) or it is context (0 or false); "
                f"there is nothing between{hint}"
            )
        found = found and bool(value) == positive
        said.append(name)
    return found, said


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def strings(value: Any) -> Iterator[str]:
    """The texts in a value, at any depth."""
    if isinstance(value, str):
        if value.strip():
            yield value.strip()
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)
