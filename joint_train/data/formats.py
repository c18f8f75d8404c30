"""The formats of rows: by which fields each is known, and how it becomes a conversation.

What they are called, and what their fields are, is as LLaMA-Factory, axolotl and TRL have it. An example that comes
out is ``{"messages": […]}`` as :mod:`joint_train.data.messages` describes them, or ``{"text": …}``; a conversation also
has, where there are any, ``tools``, ``chat_template_kwargs`` and ``context``: the indices of assistant messages that
are not trained on.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from joint_train.data import fields as names
from joint_train.data import messages as turns
from joint_train.data import notices
from joint_train.errors import DataError

INPUT = ("input", "context")  # context is Dolly's
SYSTEM = ("system", "system_prompt", "system_message")
TOOLS = ("tools", "functions", "tool_defs")
IMAGES = ("images", "image")
OPTIONS = "chat_template_kwargs"
# Options that rows have in a column of their own.
OPTION_COLUMNS = ("enable_thinking", "preserve_thinking")


@dataclass
class Adapted:
    """A row as an example.

    Attributes:
        example: what the module describes.
        format: that it is in.
        used: its columns that went into the example.
        columns: all that the row has.
        listed: the images in a column of their own.
        notices: what is worth knowing, by the kinds of :mod:`joint_train.data.notices`.
        where: ``file:line`` of the row.
        configured: options of the chat template that the configuration sets and the row doesn't.
    """

    example: dict[str, Any]
    format: str
    used: set[str]
    columns: Iterable[str]
    listed: Any = None
    notices: Counter[str] = field(default_factory=Counter)
    where: str = ""
    configured: set[str] = field(default_factory=set)


class Fields:
    """The fields of a row, under the names that the formats use; remembers the columns that were read.

    A field may be written in any capitals.
    """

    def __init__(self, row: dict, columns: Mapping[str, str], arrow: bool):
        self.row, self.columns, self.arrow = row, columns, arrow
        self.used: set[str] = set()
        self.notices: Counter[str] = Counter()
        self._in_capitals = {name.lower(): name for name in row if isinstance(name, str) and not name.islower()}

    def column(self, name: str) -> str:
        """The row's column for a field."""
        if not self.columns and not self._in_capitals:
            return name
        column = self.columns.get(name, name)
        return column if column in self.row else self._in_capitals.get(column, column)

    def get(self, *fields: str) -> Any:
        """The first of these fields that isn't null, or None."""
        for name in fields:
            column = self.column(name)
            if (value := self.row.get(column)) is not None:
                self.used.add(column)
                return value
        return None

    def need(self, *fields: str) -> Any:
        """The first of these fields that isn't null.

        Raises:
            DataError: there is none.
        """
        if (value := self.get(*fields)) is None:
            wanted = " or ".join(repr(self.column(name)) for name in fields)
            raise DataError(f"no field {wanted}; the record has {sorted(map(str, self.row))}")
        return value

    def has(self, *fields: str) -> bool:
        """Whether one of these fields isn't null."""
        return any(self.row.get(self.column(name)) is not None for name in fields)

    def text(self, value: Any, *fields: str) -> str:
        """A value of one of these fields as a text: a number is one, and so is a list of one text.

        Raises:
            DataError: it is something else.
        """
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            self.notices[notices.NUMBERS] += 1
            return str(value)
        name = next((self.column(name) for name in fields if self.has(name)), fields[0])
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            raise DataError(
                f"{name} is a list of {len(value)} texts: alternatives can't be trained on as one conversation; keep "
                f"one"
            )
        return turns.text_of(value, name)

    def conversation(self, value: Any, what: str) -> tuple[list[dict], list[int]]:
        """See :func:`joint_train.data.messages.conversation`."""
        return turns.conversation(value, self.arrow, what, self.notices)


def _messages(fields: Fields) -> tuple[list[dict], list[int]]:
    return fields.conversation(fields.need("messages"), "messages")


def _sharegpt(fields: Fields) -> tuple[list[dict], list[int]]:
    return fields.conversation(fields.need("conversations", "conversation"), "conversations")


def _prompt_response(fields: Fields) -> tuple[list[dict], list[int]]:
    prompt = _json_list(fields.need(*PROMPT))
    response = _json_list(fields.need(*RESPONSE))
    earlier, context = _history(fields)
    if _is_turns(prompt):
        if fields.has(*INPUT):
            raise DataError("an input beside a prompt that is a list of messages: put it into the messages")
        messages, _ = fields.conversation(prompt, "prompt")
    else:
        messages = [{"role": "user", "content": _question(fields, PROMPT, prompt)}]
    if isinstance(response, dict):
        if not any(str(key).lower() in ("role", "from", *turns.EXCHANGES) for key in response):
            raise DataError(
                f"{next(fields.column(name) for name in RESPONSE if fields.has(name))} is an object with "
                f"{', '.join(sorted(map(str, response)))}, not a text: give the text that is to be answered"
            )
        response = [response]
    if _is_turns(response):
        answer, more = fields.conversation(response, "response")
    else:
        answer, more = [{"role": "assistant", "content": fields.text(response, *RESPONSE)}], []
    # An assistant's message in the prompt is context, not a target.
    said = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    context = [*context, *(len(earlier) + index for index in said)]
    messages = earlier + messages
    return messages + answer, context + [len(messages) + index for index in more]


def _alpaca(fields: Fields) -> tuple[list[dict], list[int]]:
    messages, context = _history(fields)
    question = _question(fields, INSTRUCTION, fields.need(*INSTRUCTION))
    answer = fields.text(fields.need(*OUTPUT), *OUTPUT)
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}], context


def _json_list(value: Any) -> Any:
    """A list of messages that stands in a column that can only hold text."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            return turns.from_json(value, "prompt")
        except DataError:
            return value
    return value


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(turn, dict) for turn in value)


def _question(fields: Fields, of: tuple[str, ...], value: Any) -> str:
    """The question and, on the next line, its input."""
    more = fields.get(*INPUT)
    parts = fields.text(value, *of), "" if more is None or more == [] else fields.text(more, *INPUT)
    return "\n".join(part for part in parts if part.strip())


def _history(fields: Fields) -> tuple[list[dict], list[int]]:
    """Earlier turns: a list of pairs [question, answer], or of messages."""
    given = _json_list(fields.get("history"))
    if not given:
        return [], []
    if isinstance(given, list) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in given):
        given = [text for pair in given for text in pair]
        given = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(given)]
    elif not _is_turns(given):
        raise DataError("history isn't a list of pairs [question, answer], nor of messages")
    return fields.conversation(given, "history")


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
INSTRUCTION = ("instruction",)
OUTPUT = ("output", "response")
# In the order in which they are looked for.
TABLE = {
    "messages": Format((("messages",),), messages=_messages),
    "sharegpt": Format((("conversations", "conversation"),), messages=_sharegpt),
    "alpaca": Format((INSTRUCTION, OUTPUT), (*INPUT, "history"), _alpaca),
    "prompt_response": Format((PROMPT, RESPONSE), (*INPUT, "history"), _prompt_response),
    "text": Format((("text",),)),
}
FORMATS = ("auto", *TABLE)
FIELDS = {name: {field for need in entry.needs for field in need} | {*entry.may_have} for name, entry in TABLE.items()}
# Fields that a conversation may have in any format.
COMMON = {*SYSTEM, *TOOLS, *IMAGES, "reasoning", OPTIONS}


def check_source(where: str, format: str, columns: Mapping[str, str]) -> None:
    """Refuse an unknown format, and columns for fields that the format doesn't have.

    Raises:
        DataError: naming the known ones.
    """
    if format not in FORMATS:
        raise DataError(f"{where}: format={format!r} is not one of {', '.join(FORMATS)}")
    known = COMMON.union(*(FIELDS[name] for name in (TABLE if format == "auto" else (format,))))
    if unknown := sorted(columns.keys() - known):
        raise DataError(
            f"{where}: columns name {', '.join(unknown)}, which isn't a field of format={format}; its fields are "
            f"{', '.join(sorted(known))}"
        )


def adapt(row: dict, format: str, columns: dict[str, str], arrow: bool, ignore: Collection[str] = ()) -> Adapted:
    """A row as an example.

    Args:
        row: as it was read.
        format: one of FORMATS.
        columns: the row's column for a field of the format.
        arrow: it comes from Arrow, which fills what an object lacks with null.
        ignore: columns that aren't part of the conversation, whatever their names say.

    Raises:
        DataError: what is wrong with it.
    """
    if ignore:
        all_columns, row = row.keys(), {name: value for name, value in row.items() if name not in ignore}
    else:
        all_columns = row.keys()
    fields = Fields(row, columns, arrow)
    _refuse_what_is_no_text(row, columns)
    meant = format != "auto"
    if not meant:
        format = detect_format(row, columns)
    if (messages := TABLE[format].messages) is None:
        example: dict[str, Any] = {"text": fields.text(fields.need("text"), "text")}
        listed = None
    else:
        example = _conversation(fields, *messages(fields))
        listed = fields.get(*IMAGES) or None
    trained, said = names.trained(
        {name: value for name, value in row.items() if name not in fields.used},
        "the row",
        " (if it means something else, name it in the source's ignore)",
    )
    fields.used.update(said)
    if not trained:
        example["train"] = False
        fields.notices[notices.LEFT_OUT] += 1
    _look_for_content(fields, format, example, meant)
    return Adapted(example, format, fields.used, all_columns, listed, fields.notices)


def _conversation(fields: Fields, said: list[dict], context: list[int]) -> dict[str, Any]:
    if (system := fields.get(*SYSTEM)) is not None and (not isinstance(system, str) or system.strip()):
        said, context = _with_system(said, context, turns.text_of(system, "system"))
    given = [fields.get(*TOOLS)] + [message.pop("tools", None) for message in said]
    tools = [found for tool in given if tool for found in turns.tools(tool, fields.arrow) or ()]
    _add_reasoning(fields, said)
    example: dict[str, Any] = {"messages": said}
    if context:
        example["context"] = context
    if tools:
        example["tools"] = tools
    options = turns.from_json(fields.get(OPTIONS) or {}, OPTIONS)
    if not isinstance(options, dict):
        raise DataError(f"{OPTIONS} is {turns.kind_of(options)}, not an object")
    options = turns.without_nulls(options) if fields.arrow else options
    for name in OPTION_COLUMNS:
        if (value := fields.get(name)) is not None:
            options = {name: value, **options}
    if options:
        example[OPTIONS] = options
    return example


def _add_reasoning(fields: Fields, said: list[dict]) -> None:
    """A column of reasoning is that of the last answer."""
    given = fields.get(*names.REASONING)
    if given is None or (isinstance(given, str) and not given.strip()):
        return
    column = next(name for name in map(fields.column, names.REASONING) if name in fields.used)
    if isinstance(given, (bool, int, float)):  # about the reasoning, not the reasoning
        fields.used.discard(column)
        return
    thought = turns.thought_of(given, column)
    if said[-1]["role"] != "assistant":
        raise DataError(f"a column {column!r}, and the conversation doesn't end with an answer that it could belong to")
    if said[-1].get("reasoning", thought).strip() != thought.strip():
        raise DataError(f"a column {column!r} and another reasoning in the last message: which one is meant?")
    said[-1]["reasoning"] = thought


def _look_for_content(fields: Fields, format: str, example: dict[str, Any], meant: bool) -> None:
    """Refuse columns that weren't read and that are content by their names; count them if the format was chosen."""
    found: list[str] | None = None
    for name, value in fields.row.items():
        if name in fields.used or not isinstance(name, str) or not isinstance(value, (str, list, dict)):
            continue
        kind = names.kind_of_content(name)
        if kind is None or not any(True for _ in names.strings(value)):
            continue
        if found is None:
            found = list(names.strings(example.get("messages", example.get("text"))))
        if all(any(text in said for said in found) for text in names.strings(value)):
            continue  # a copy
        if not kind or meant or (format in ("messages", "sharegpt") and _asks(name)):
            fields.notices[notices.about(notices.UNUSED, name)] += 1
            continue
        raise DataError(
            f"a column {name!r} ({kind}, by its name) isn't a field of the format {format}, and would be lost: give "
            "the field that it is in the source's columns, or name it in the source's ignore if it isn't part of the "
            "conversation"
        )


def _asks(name: str) -> bool:
    """Whether a column is a question, which a conversation has of its own."""
    return name.lower() in {*PROMPT, *INSTRUCTION, "problem"}


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
    found = [name for name in names.PREFERENCES if row.get(name) is not None]
    if found and not any(name in meant for name in names.PREFERENCES):
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
    for name in names.TOKENISED:
        if row.get(name) and name not in meant:
            raise DataError(f"a column {name!r}: rows that are tokenised or cut already can't be read; give the texts")
    for name in names.MEDIA:
        if row.get(name) and name not in meant:
            raise DataError(f"a column {name!r}: audio and video can't be trained on; leave the row or the column out")


def detect_format(row: dict, columns: dict[str, str]) -> str:
    """The format of a record by the fields that it has.

    Raises:
        DataError: there is none, or two that mean different texts.
    """
    fields = Fields(row, columns, False)
    found = next((name for name, entry in TABLE.items() if all(fields.has(*need) for need in entry.needs)), None)
    if fields.has("text"):
        asking = [fields.column(name) for name in (*INSTRUCTION, *PROMPT) if fields.has(name)]
        if found in ("alpaca", "prompt_response"):
            raise DataError(
                f"both {found} (by {_named(found, fields)}) and a text: set the source's format to the one that is "
                f"meant"
            )
        if found == "text" and asking:
            raise DataError(
                f"both {asking[0]} and a text: set the source's format to text, or give the answer's column by "
                f"columns: "
                "{response: text} with format: prompt_response"
            )
    if found is None:  # the error then says what it lacks
        found = next(
            (name for name, entry in TABLE.items() if any(fields.column(f) in row for f in entry.needs[0])), None
        )
    if found is None:
        raise DataError(
            f"no format fits the fields {sorted(map(str, row))}: set the source's format to one of {FORMATS[1:]}, "
            "and columns where its fields have other names"
        )
    return found


def _named(format: str, fields: Fields) -> str:
    return " and ".join(fields.column(next(name for name in need if fields.has(name))) for need in TABLE[format].needs)
