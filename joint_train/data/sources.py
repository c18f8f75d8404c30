"""From a record to an example that can be rendered."""

import json
import os
from typing import Any

from joint_train.config import SourceConfig
from joint_train.data import formats, images
from joint_train.data.formats import Adapted
from joint_train.data.json_files import Record
from joint_train.data.messages import kind_of
from joint_train.errors import DataError

OWN = {"role", "content", "reasoning", "tool_calls"}
"""Fields of a message that a source's ``ignore`` doesn't mean."""


def parse(record: Record, source: SourceConfig, answered: bool = True) -> dict[str, Any]:
    """The example of a record (see :mod:`joint_train.data.formats`); its images, if there are any, in ``images``.

    Args:
        answered: False also takes a record that only asks; its answer is then empty.

    Raises:
        DataError: what is wrong with it, with file and line.
    """
    return understand(record, source, answered).example


def understand(record: Record, source: SourceConfig, answered: bool = True) -> Adapted:
    """The example of a record, with its format and the columns that it was made of; arguments as :func:`parse` has.

    Raises:
        DataError: what is wrong with it, with file and line.
    """
    try:
        row = row_of(record)
        if not answered:
            row = _with_an_answer(row, source.columns)
        arrow = not isinstance(record.data, bytes)
        adapted = formats.adapt(row, source.format, source.columns, arrow, source.ignore)
        adapted.where = f"{record.file}:{record.line}"
        example = adapted.example
        if "messages" in example:
            for message in example["messages"] if source.ignore else ():
                for name in set(source.ignore) & (message.keys() - OWN):
                    del message[name]
            folder = os.path.dirname(record.file)
            messages, found = images.take(example["messages"], adapted.listed, folder, adapted.notices)
            example["messages"] = messages
            if found:
                example["images"] = found
            if options := source.chat_template_kwargs:
                own = example.get(formats.OPTIONS, {})
                example[formats.OPTIONS] = {**options, **own}
                adapted.configured = set(options) - set(own)
        return adapted
    except DataError as error:
        raise DataError(f"{record.file}:{record.line}: {error}") from None


def _with_an_answer(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """A row that only asks (``{"prompt": …}``), with the empty answer that its format needs; others as they are."""
    fields = formats.Fields(row, columns, False)
    if fields.has("messages", "conversations", "conversation", "text"):
        return row
    for asked, answered in ((formats.INSTRUCTION, formats.OUTPUT), (formats.PROMPT, formats.RESPONSE)):
        if fields.has(*asked) and not fields.has(*answered):
            return {**row, fields.column(answered[0]): ""}
    return row


def row_of(record: Record) -> dict[str, Any]:
    """The row that a record holds.

    Raises:
        DataError: it holds none.
    """
    if record.error is not None:
        raise DataError(record.error)
    row = _decode(record.data) if isinstance(record.data, bytes) else record.data
    if not isinstance(row, dict):
        raise DataError(f"a JSON object is expected, not {kind_of(row)}")
    if any(isinstance(value, float) and value != value for value in row.values()):
        row = {name: value for name, value in row.items() if value == value}  # what pandas writes for a missing value
    return row


def _decode(line: bytes) -> Any:
    try:
        # Byte-order marks are what some editors put before the first line.
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"invalid UTF-8 at byte {error.start} of the line: {error.reason}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"malformed JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"malformed JSON: {error}") from None
