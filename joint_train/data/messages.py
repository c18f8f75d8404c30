"""Messages, tool calls and tools in the one shape that chat templates take, out of the many in which rows have them.

A message that comes out has ``role`` (system, developer, user, assistant or tool) and ``content`` (a string, or a list
of parts ``{"type": "text", "text": …}`` and ``{"type": "image", …}``), and where there are any: ``reasoning``, and
``tool_calls`` as ``[{"type": "function", "function": {"name": …, "arguments": {…}}}]``. Other fields stay as they are.
"""

import difflib
import json
from collections import Counter
from typing import Any

from joint_train.data import fields as names
from joint_train.data import notices
from joint_train.errors import DataError

# In lower case: what OpenAI's format, ShareGPT's and those derived from them call who speaks.
ROLES = {
    "system": "system", "developer": "developer",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "bard": "assistant", "bing": "assistant", "ai": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "ipython": "tool", "tool_response": "tool",
    "function_response": "tool",
}  # fmt: skip
CALLERS = ("function_call", "tool_call")
"""Roles of an assistant's message whose content is a call in JSON."""
EXCHANGES = {
    **ROLES, "input": "user", "instruction": "user", "question": "user", "prompt": "user", "query": "user",
    "output": "assistant", "response": "assistant", "answer": "assistant",
}  # fmt: skip
"""The keys of a turn that has one for each speaker."""
CONTENT = ("content", "value", "refusal")
"""The fields of a message that may hold what it says; the first that isn't empty does."""
PICTURES = ("images", "image")
ARGUMENTS = ("arguments", "parameters", "args", "input")
"""The fields of a call that may hold its arguments."""
PARAMETERS = ("parameters", "input_schema", "inputSchema")
"""The fields of a tool that may hold the schema of its arguments."""
HIDDEN_CHANNELS = ("analysis", "commentary")
"""Of Harmony's messages, those that aren't the answer."""


def kind_of(value: Any) -> str:
    """What JSON calls a value, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null", bytes: "bytes"}
    return names.get(type(value), "a number")


def text_of(value: Any, what: str) -> str:
    """A string that can be encoded.

    Raises:
        DataError: it is none.
    """
    if not isinstance(value, str):
        raise DataError(f"{what} is {kind_of(value)}, not a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise DataError(f"{what} has half a surrogate pair, which isn't Unicode text") from None
    return value


def conversation(
    turns: Any, arrow: bool, what: str = "messages", counts: Counter[str] | None = None
) -> tuple[list[dict], list[int]]:
    """The messages of a list of turns.

    Args:
        turns: of objects with role and content, or from and value, or a key for each speaker (``{"human": …,
            "assistant": …}``); or of strings, the user's first.
        arrow: fields that are null come from Arrow, which gives each object the fields of all others.
        what: to call it in an error.
        counts: of what is worth knowing, by the kinds of :mod:`joint_train.data.notices`.

    Returns:
        The messages, and the indices of those of the assistant that aren't trained on.

    Raises:
        DataError: naming the message.
    """
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # a column that can only hold text
        turns, arrow = from_json(turns, what), False
    if not isinstance(turns, list):
        raise DataError(f"{what} is {kind_of(turns)}, not a list")
    if turns and all(isinstance(turn, str) for turn in turns):
        turns = [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)]
    elif any(isinstance(turn, dict) and _is_exchange(turn) for turn in turns):
        turns = [message for turn in turns for message in _exchange(turn)]
    if not turns:
        raise DataError("an empty conversation")
    messages, context = [], []
    counts = Counter() if counts is None else counts
    for index, turn in enumerate(turns):
        message, trained = _message(turn, f"message {index}", arrow, counts)
        messages.append(message)
        if not trained and message["role"] == "assistant":
            context.append(index)
    _name_results(messages, counts)
    return messages, context


def _is_exchange(turn: dict) -> bool:
    return bool(turn) and not turn.keys() & {"role", "from"} and all(str(key).lower() in EXCHANGES for key in turn)


def _exchange(turn: Any) -> list[dict]:
    if not isinstance(turn, dict) or not _is_exchange(turn):
        return [turn]
    order = ("system", "developer", "user", "assistant", "tool")
    said = [(EXCHANGES[key.lower()], value) for key, value in turn.items() if value is not None]
    return [{"role": role, "content": value} for role, value in sorted(said, key=lambda pair: order.index(pair[0]))]


def _message(turn: Any, where: str, arrow: bool, counts: Counter[str]) -> tuple[dict, bool]:
    if not isinstance(turn, dict):
        raise DataError(f"{where} is {kind_of(turn)}, not an object")
    # Parquet and datasets fill the fields that a message doesn't have with null.
    fields = {key: value for key, value in turn.items() if value is not None}
    role = fields.pop("role", None)
    spoken_by = fields.pop("from", None) if role is None or "from" in fields else None
    if len({_known(role), _known(spoken_by)} - {None}) == 2:
        raise DataError(f"{where} has the role {role!r} and is from {spoken_by!r}: which one is meant?")
    role = spoken_by if role is None else role
    known = _known(role)
    message: dict[str, Any] = {"role": known}
    content = _content(fields, counts)
    if known is None:
        if not isinstance(role, str) or role.strip().lower() not in CALLERS:
            raise _unknown_role(role, where)
        message["role"] = known = "assistant"
        fields["tool_calls"], content = content, ""
    trained, said = names.trained(fields, where)
    for name in said:
        del fields[name]
    if isinstance(content, list):
        content, of_parts = _trained_parts(content, where)
        trained = trained and of_parts
        content, thoughts, calls = _parts(content, where)
        if thoughts:
            fields.setdefault("reasoning", "\n".join(thoughts))
        if calls:
            fields.setdefault("tool_calls", calls)
    elif content is not None:
        text_of(content, f"{where}: content")
    for name in PICTURES:  # as in Ollama's messages
        if pictures := fields.pop(name, None):
            text = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
            listed = pictures if isinstance(pictures, list) else [pictures]
            content = [{"type": "image", "image": picture} for picture in listed] + text
    if (call := fields.pop("function_call", None)) is not None:
        fields.setdefault("tool_calls", [call])
    if "tool_calls" in fields and (calls := _calls(fields.pop("tool_calls"), where, arrow)):
        message["tool_calls"] = calls
    for name in sorted((name for name in fields if str(name).lower() in names.REASONING), key=_is_copy):
        thought = thought_of(fields.pop(name), f"{where}: {name}")
        if not thought.strip() or (_is_copy(name) and "reasoning" in message):
            continue
        if message.setdefault("reasoning", thought).strip() != thought.strip():
            raise DataError(f"{where} has two different reasonings, one of them in {name}: which one is meant?")
    if fields.get("channel") in HIDDEN_CHANNELS:
        raise DataError(
            f"{where} is in the channel {fields['channel']!r}, and would be trained as an answer: make it the "
            "reasoning of the answer that follows"
        )
    for key, value in fields.items():
        if value and key in names.MEDIA:
            raise DataError(f"{where} has {key}: audio and video can't be trained on; leave the row out")
        if isinstance(value, str):
            text_of(value, f"{where}: {key}")
    if content is None and not message.keys() & {"reasoning", "tool_calls"}:
        if known != "tool" and not fields.keys() & {"tool_responses", "tools"}:
            has = f" (it has {', '.join(sorted(map(str, fields)))})" if fields else ""
            raise DataError(f"{where} has no content{has}")
    # Templates ask for the content of a call as if each message had one.
    message["content"] = "" if content is None else content
    return {**message, **fields}, trained


def _known(role: Any) -> str | None:
    return ROLES.get(role) or ROLES.get(role.strip().lower()) if isinstance(role, str) else None


def _content(fields: dict, counts: Counter[str]) -> Any:
    """Take what a message says out of its fields."""
    found = [(name, fields.pop(name)) for name in CONTENT if name in fields]
    said = next(((name, value) for name, value in found if value not in ("", [])), None)
    if said is None:
        return found[0][1] if found else None
    if said != found[0] or said[0] == "refusal":
        counts[notices.OTHER_FIELD] += 1
    for name, value in found[found.index(said) + 1 :]:
        if value not in ("", [], said[1]):
            fields[name] = value  # another text: a template may have a use for it
    return said[1]


def thought_of(value: Any, where: str) -> str:
    """A thought: a string, or a list of parts with texts.

    Raises:
        DataError: it is neither.
    """
    if not isinstance(value, list):
        return text_of(value, where)
    parts, trained = _trained_parts(value, where)
    if not trained:
        raise DataError(f"{where} isn't trained on: that can only be said of a whole message")
    kept, thoughts, _ = _parts(parts, where)
    return "\n".join([*thoughts, *filter(None, ["".join(part.get("text", "") for part in kept)])])


def _is_copy(name: str) -> bool:
    """Whether a field of reasoning may be there beside one that says the same in one text."""
    return name.lower() == "reasoning_details"


def _unknown_role(role: Any, where: str) -> DataError:
    close = difflib.get_close_matches(role.strip().lower(), [*ROLES, *CALLERS], 1) if isinstance(role, str) else []
    hint = f" (is it {close[0]!r}?)" if close else ""
    return DataError(f"{where} has the unknown role {role!r}{hint}; known are {', '.join([*ROLES, *CALLERS])}")


def _trained_parts(parts: list, where: str) -> tuple[list, bool]:
    """Parts without the fields that say whether they are trained on, and whether they are."""
    kept, said = [], []
    for index, part in enumerate(parts):
        if isinstance(part, dict):
            trained, found = names.trained(part, f"{where}: part {index}")
            part = {key: value for key, value in part.items() if key not in found}
            said.append(trained)
        kept.append(part)
    if any(said) and not all(said):
        raise DataError(
            f"{where}: some parts of its content are trained on and others are not: make messages of them, or leave "
            f"the "
            "row out"
        )
    return kept, all(said)


def _parts(parts: list, where: str) -> tuple[list[dict], list[str], list]:
    """The text and media parts of a content, its thoughts, and its tool calls."""
    kept: list[dict] = []
    thoughts, calls = [], []
    for part in parts:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise DataError(f"{where}: a part of its content has no type")
        kind, value = part["type"], part.get("value")
        if kind in ("text", "input_text", "output_text", "refusal"):
            said = next((part[name] for name in ("text", "value", "content", kind) if part.get(name) is not None), None)
            kept.append({"type": "text", "text": text_of(said, f"{where}: a text part")})
        elif kind.partition(".")[0] in names.REASONING:  # reasoning.text and reasoning.summary are OpenRouter's
            found = (kind, *names.REASONING, "text", "value", "summary")
            said = next((part[n] for n in found if part.get(n) is not None), None)
            if said is None:
                raise DataError(f"{where}: a {kind} part has no text that could be trained on: take it out")
            thoughts.append(text_of(said, f"{where}: a {kind} part"))
        elif kind in ("tool_call", "function_call"):
            call = from_json(part.get(kind, value), f"{where}: a {kind} part")
            calls += call if isinstance(call, list) else [call]
        else:
            kept.append({key: inner for key, inner in part.items() if inner is not None})
    return kept, thoughts, calls


def _calls(calls: Any, where: str, arrow: bool) -> list[dict]:
    calls = from_json(calls or "null", f"{where}: tool_calls")
    calls = [] if calls is None else [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        raise DataError(f"{where}: tool_calls is {kind_of(calls)}, not a list")
    return [_call(call, f"{where}: tool call {index}", arrow) for index, call in enumerate(calls)]


def _call(call: Any, where: str, arrow: bool) -> dict:
    call = from_json(call, where)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{where} has no function with a name")
    given = [name for name in ARGUMENTS if function.get(name) is not None]
    arguments = function[given[0]] if given else None
    if more := given[1:] + [n for n, value in function.items() if n not in ARGUMENTS and isinstance(value, dict)]:
        raise DataError(f"{where} has {', '.join([*given[:1], *more])}: which of them are its arguments?")
    written = isinstance(arguments, str)
    if isinstance(arguments, str):
        arguments = from_json(arguments, f"{where}: arguments") if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise DataError(f"{where}: arguments is {kind_of(arguments)}, not an object")
    _encodable(arguments, where)
    if arrow and not written:  # in a string of JSON a null is one
        arguments = without_nulls(arguments)
    own = {"id": call["id"]} if function is not call and call.get("id") is not None else {}
    return {**own, "type": "function", "function": {"name": text_of(function["name"], where), "arguments": arguments}}


def _encodable(value: Any, where: str) -> None:
    text_of(json.dumps(value, ensure_ascii=False, default=str), where)


def without_nulls(value: Any) -> Any:
    """A value without the keys that are null, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def from_json(value: Any, what: str) -> Any:
    """A value, or the one that a string of JSON holds.

    Raises:
        DataError: the string isn't JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is a string that isn't JSON: {error}") from None


def tools(given: Any, arrow: bool) -> list[dict] | None:
    """Tools as ``[{"type": "function", "function": {"name": …, "description": …, "parameters": …}}]``.

    Args:
        given: a list of those, with ``function`` around each or without; or a string of JSON.
        arrow: see :func:`conversation`.

    Raises:
        DataError: naming the tool.
    """
    written = isinstance(given, str)
    given = from_json(given or "null", "tools") if written else given
    given = [given] if isinstance(given, dict) else given
    if given is not None and not isinstance(given, list):
        raise DataError(f"tools is {kind_of(given)}, not a list")
    return [_tool(tool, f"tool {index}", arrow and not written) for index, tool in enumerate(given or [])] or None


def _tool(tool: Any, where: str, arrow: bool) -> dict:
    arrow = arrow and not isinstance(tool, str)
    tool = from_json(tool, where)
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{where} has no name")
    function = without_nulls(function) if arrow else dict(function)
    if function is not tool:
        function.pop("type", None) if function.get("type") == "function" else None
    schemas = [function.pop(name) for name in PARAMETERS if function.get(name) is not None]
    if len(schemas) > 1:
        raise DataError(f"{where} has several of {', '.join(PARAMETERS)}: keep one")
    if schemas:
        function["parameters"] = schemas[0]
    if isinstance(function.get("parameters"), str):
        function["parameters"] = from_json(function["parameters"], f"{where}: parameters")
    _encodable(function, where)
    return {"type": "function", "function": function}


def _name_results(messages: list[dict], counts: Counter[str]) -> None:
    """Give each tool's result the name of its call, by id or else in order: templates write it.

    Raises:
        DataError: for the id of a call that isn't there.
    """
    calls: list[dict] = []
    for index, message in enumerate(messages):
        if message["role"] != "tool":
            calls = list(message.get("tool_calls", []))
            continue
        wanted, known = message.get("tool_call_id"), {call["id"]: call for call in calls if "id" in call}
        if wanted is not None and known and wanted not in known:
            raise DataError(
                f"message {index} (tool) is the result of the call {wanted!r}, and the open calls before it are "
                f"{', '.join(map(repr, known))}"
            )
        call = known.get(wanted) or next(iter(calls), None)
        if call is not None:
            calls.remove(call)
            message.setdefault("name", call["function"]["name"])
        elif "name" not in message:
            counts[notices.UNCALLED] += 1
