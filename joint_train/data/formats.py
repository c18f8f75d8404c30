"""The formats of rows: by which fields each is known, and how it becomes a conversation.

What they are called, and what their fields are, is as LLaMA-Factory, axolotl and TRL have it. An example that comes
out is ``{"messages": […]}`` as :mod:`joint_train.data.messages` describes them, or ``{"text": …}``; a conversation also
has, where there are any, ``tools``, ``chat_template_kwargs`` and ``context``: the indices of assistant messages that
are not trained on.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from joint_train.data import messages as turns
from joint_train.errors import DataError

INPUT = ("input", "context")  # context is Dolly's
SYSTEM = ("system", "system_prompt")
TOOLS = ("tools", "functions")
IMAGES = ("images", "image")
OPTIONS = "chat_template_kwargs"
# Columns of preference data, by name. A source whose `columns` name one of them means it.
PREFERENCES = ("chosen", "rejected", "kto_tag")
MEDIA = ("audios", "audio", "videos", "video")


class Adapted(NamedTuple):
    """A row as an example.

    Attributes:
        example: what the module describes.
        format: that it is in.
        used: its columns that went into the example.
        columns: all that the row has.
        listed: the images in a column of their own.
    """

    example: dict[str, Any]
    format: str
    used: set[str]
    columns: Iterable[str]
    listed: Any = None


class Fields:
    """The fields of a row, under the names that the formats use; remembers the columns that were read."""

    def __init__(self, row: dict, columns: dict[str, str], arrow: bool):
        self.row, self.columns, self.arrow = row, columns, arrow
        self.used: set[str] = set()

    def get(self, *names: str) -> Any:
        """The first of these fields that isn't null, or None."""
        for name in names:
            column = self.columns.get(name, name)
            if (value := self.row.get(column)) is not None:
                self.used.add(column)
                return value
        return None

    def need(self, *names: str) -> Any:
        """The first of these fields that isn't null.

        Raises:
            DataError: there is none.
        """
        if (value := self.get(*names)) is None:
            wanted = " or ".join(repr(self.columns.get(name, name)) for name in names)
            raise DataError(f"no field {wanted}; the record has {sorted(map(str, self.row))}")
        return value

    def has(self, *names: str) -> bool:
        """Whether one of these fields isn't null."""
        return any(self.row.get(self.columns.get(name, name)) is not None for name in names)

    def conversation(self, value: Any, what: str) -> tuple[list[dict], list[int]]:
        """See :func:`joint_train.data.messages.conversation`."""
        return turns.conversation(value, self.arrow, what)


def _messages(fields: Fields) -> tuple[list[dict], list[int]]:
    return fields.conversation(fields.need("messages"), "messages")


def _sharegpt(fields: Fields) -> tuple[list[dict], list[int]]:
    return fields.conversation(fields.need("conversations", "conversation"), "conversations")


def _prompt_response(fields: Fields) -> tuple[list[dict], list[int]]:
    prompt = fields.need(*PROMPT)
    response = fields.need(*RESPONSE)
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    messages, _ = fields.conversation(messages, "prompt")
    if isinstance(response, str):
        response = {"role": "assistant", "content": response}
    answer, context = fields.conversation([response] if isinstance(response, dict) else response, "response")
    # What the assistant says in the prompt is what the answer follows, not what is learnt.
    said = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return messages + answer, said + [len(messages) + index for index in context]


def _alpaca(fields: Fields) -> tuple[list[dict], list[int]]:
    given = fields.get("history")
    pairs = [] if given is None else given
    if not isinstance(pairs, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise DataError("history isn't a list of pairs [instruction, output]")
    said = [text for pair in pairs for text in pair]
    instruction = turns.text_of(fields.need("instruction"), "instruction")
    more = turns.text_of(fields.get(*INPUT) or "", "input")
    said += ["\n".join(part for part in (instruction, more) if part.strip()), fields.need("output", "response")]
    return fields.conversation(
        [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(said)], "history"
    )


@dataclass(frozen=True)
class Format:
    """A format of rows.

    Attributes:
        needs: the fields by which it is known; of each tuple one.
        may_have: its other fields.
        messages: makes the conversation; None: plain text.
    """

    needs: tuple[tuple[str, ...], ...]
    may_have: tuple[str, ...] = ()
    messages: Callable[[Fields], tuple[list[dict], list[int]]] | None = None


PROMPT = ("prompt", "question", "query")
RESPONSE = ("response", "completion", "answer")
# In the order in which they are looked for.
TABLE = {
    "messages": Format((("messages",),), messages=_messages),
    "sharegpt": Format((("conversations", "conversation"),), messages=_sharegpt),
    "alpaca": Format((("instruction",), ("output", "response")), (*INPUT, "history"), _alpaca),
    "prompt_response": Format((PROMPT, RESPONSE), messages=_prompt_response),
    "text": Format((("text",),)),
}
FORMATS = ("auto", *TABLE)
FIELDS = {name: {field for need in entry.needs for field in need} | {*entry.may_have} for name, entry in TABLE.items()}
# Fields that a conversation may have in any format.
COMMON = {*SYSTEM, *TOOLS, *IMAGES, OPTIONS}


def check_source(where: str, format: str, columns: Mapping[str, str]) -> None:
    """Refuse a format that there isn't, and columns for fields that it hasn't.

    Raises:
        DataError: saying what there is.
    """
    if format not in FORMATS:
        raise DataError(f"{where}: format={format!r} is none of {', '.join(FORMATS)}")
    known = COMMON.union(*(FIELDS[name] for name in (TABLE if format == "auto" else (format,))))
    if unknown := sorted(columns.keys() - known):
        raise DataError(
            f"{where}: columns name {', '.join(unknown)}, which is no field of format={format}; its fields are "
            f"{', '.join(sorted(known))}"
        )


def adapt(row: dict, format: str, columns: dict[str, str], arrow: bool) -> Adapted:
    """A row as an example.

    Args:
        row: as it was read.
        format: one of FORMATS.
        columns: the row's column for a field of the format.
        arrow: it comes from Arrow, which fills what an object lacks with null.

    Raises:
        DataError: what is wrong with it.
    """
    fields = Fields(row, columns, arrow)
    _refuse_what_is_no_text(row, columns)
    if format == "auto":
        format = detect_format(row, columns)
    if (messages := TABLE[format].messages) is None:
        return Adapted({"text": turns.text_of(fields.need("text"), "text")}, format, fields.used, row.keys())
    said, context = messages(fields)
    if (system := fields.get(*SYSTEM)) is not None and (not isinstance(system, str) or system.strip()):
        said, context = _with_system(said, context, turns.text_of(system, "system"))
    example: dict[str, Any] = {"messages": said}
    if context:
        example["context"] = context
    if tools := turns.tools(fields.get(*TOOLS), arrow):
        example["tools"] = tools
    if options := fields.get(OPTIONS):
        if not isinstance(options, dict):
            raise DataError(f"{OPTIONS} is {turns.kind_of(options)}, not an object")
        example[OPTIONS] = turns.without_nulls(options) if arrow else options
    listed = fields.get(*IMAGES) or None
    return Adapted(example, format, fields.used, row.keys(), listed)


def refuse_empty_answers(example: dict[str, Any]) -> None:
    """Raise an error if an answer that is trained on says nothing.

    Raises:
        DataError: naming the message.
    """
    for index, message in enumerate(example.get("messages", ())):
        if message["role"] != "assistant" or message.get("tool_calls") or message.get("tool_responses"):
            continue
        content = message["content"]
        parts = [content] if isinstance(content, str) else [part.get("text", "x") for part in content]
        if not any(part.strip() for part in parts) and index not in example.get("context", ()):
            raise DataError(
                f"message {index}: the assistant says nothing, and that would be learnt: leave the row out, or give "
                "the message weight 0"
            )


def _with_system(said: list[dict], context: list[int], system: str) -> tuple[list[dict], list[int]]:
    if said[0]["role"] in ("system", "developer"):
        if said[0]["content"] == system:
            return said, context
        raise DataError("a system prompt in a column of its own and another one in the messages: which one is meant?")
    return [{"role": "system", "content": system}, *said], [index + 1 for index in context]


def _refuse_what_is_no_text(row: dict, columns: dict[str, str]) -> None:
    meant = columns.values()
    found = [name for name in PREFERENCES if row.get(name) is not None]
    if found and not any(name in meant for name in PREFERENCES):
        raise DataError(
            f"preference data ({', '.join(found)}): training is on answers, not on preferences. To train on the "
            "chosen ones set the source's format: prompt_response and columns: {response: chosen} (and, if the prompt "
            "is in another column, prompt: …)"
        )
    if isinstance(row.get("label"), bool) and "label" not in meant:
        raise DataError(
            "unpaired preference data (label is true or false): training is on answers, not on preferences. Keep the "
            "rows whose answer is a good one and leave the column out"
        )
    for name in MEDIA:
        if row.get(name) and name not in meant:
            raise DataError(f"a column {name!r}: audio and video can't be trained on; leave the row or the column out")


def detect_format(row: dict, columns: dict[str, str]) -> str:
    """The format of a record by the fields that it has.

    Raises:
        DataError: there is none, or two that mean different texts.
    """
    fields = Fields(row, columns, False)
    found = next((name for name, entry in TABLE.items() if all(fields.has(*need) for need in entry.needs)), None)
    if found in ("alpaca", "prompt_response") and fields.has("text"):
        raise DataError(
            f"both {found} (by {_named(found, fields)}) and a text: set the source's format to the one that is meant"
        )
    if found is None:  # the error then says what it lacks
        named = {columns.get(field, field) for entry in TABLE.values() for field in entry.needs[0]} & row.keys()
        found = next(
            (name for name, entry in TABLE.items() if {columns.get(f, f) for f in entry.needs[0]} & named), None
        )
    if found is None:
        raise DataError(
            f"no format fits the fields {sorted(map(str, row))}: set the source's format to one of {FORMATS[1:]}, "
            "and columns where its fields have other names"
        )
    return found


def _named(format: str, fields: Fields) -> str:
    names = [next(field for field in need if fields.has(field)) for need in TABLE[format].needs]
    return " and ".join(fields.columns.get(name, name) for name in names)
