"""No field that public trainers document, and none whose name says the same, is passed over in silence."""

import base64
import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from data_helpers import make_tokenizer
from gemma4_templates import VARIANTS, template

from joint_train.config import SourceConfig
from joint_train.data import DataError, notices
from joint_train.data.json_files import Record
from joint_train.data.sources import understand
from joint_train.data.template import encode

TOKENIZER = make_tokenizer(template(VARIANTS["summer, large"]))
WORD = "zanzibar"
PNG = "data:image/png;base64," + base64.b64encode(b"zanzibar").decode()
CALL = {"type": "function", "function": {"name": "zanzibar", "arguments": {}}}
VALUES: dict[str, Any] = {
    "text": WORD,
    "texts": [WORD, "another"],
    "pairs": [[WORD, "yes"]],
    "turns": [{"role": "user", "content": WORD}, {"role": "assistant", "content": "yes"}],
    "tools": [{"name": WORD, "parameters": {}}],
    "options": {"enable_thinking": False},
    "path": PNG,
    "object": {"ref": [WORD], "bbox": [[1, 2, 3, 4]]},
    "segments": [{"label": True, "text": WORD}],
    "offsets": [{"begin_offset": 0, "end_offset": 1, "train": False}],
    "numbers": [1, 2],
    "calls": [CALL],
    "call": {"name": WORD, "arguments": {}},
    "thoughts": [{"type": "reasoning", "text": WORD}],
    "details": [{"type": "reasoning.text", "text": WORD, "signature": "x"}],
    "zero": 0,
    "false": False,
    "true": True,
}


class Field(NamedTuple):
    level: str
    name: str
    holds: str


def documented() -> list[Field]:
    lines = (Path(__file__).parent / "documented_fields.txt").read_text().splitlines()
    return [Field(*line.split()[:3]) for line in lines if line and not line.startswith("#")]


FIELDS = documented()
QA = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
ROWS: dict[str, dict] = {
    "messages": {"messages": QA},
    "sharegpt": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "alpaca": {"instruction": "Q", "output": "A"},
    "prompt_response": {"prompt": "Q", "completion": "A"},
    "text": {"text": "T"},
}


def rows_with(field: Field) -> list[tuple[dict, dict]]:
    """Rows with a field, and the same rows without it."""
    value = VALUES[field.holds]
    if field.level == "row":
        # Plain text goes through no template, which options could be for.
        templated = field.name in ("chat_template_kwargs", "enable_thinking")
        rows = [row for name, row in ROWS.items() if not (templated and name == "text")]
        return [({**row, field.name: value}, row) for row in rows]
    plain = {"messages": [*QA, *QA]}
    if field.level == "message":
        answer = {**QA[1], "content": ""} if field.name == "value" else QA[1]
        return [({"messages": [QA[0], {**answer, field.name: value}, *QA]}, plain)]
    if field.level == "call":
        empty, given = (
            {"role": "assistant", "tool_calls": [{"name": "f", **more}]} for more in ({}, {field.name: value})
        )
        return [({"messages": [QA[0], given]}, {"messages": [QA[0], empty]})]
    if field.name.startswith("type:"):
        kind = field.name.removeprefix("type:")
        parts = [[{"type": kind, "value": value}, {"type": "text", "text": "A"}]]
        parts.append([{"type": kind, kind: value}, {"type": "text", "text": "A"}])
    elif field.holds == "text":
        parts = [[{"type": "text", field.name: value}]]
    else:
        parts = [[{"type": "text", "text": "A", field.name: value}]]
    return [({"messages": [QA[0], {"role": "assistant", "content": part}, *QA]}, plain) for part in parts]


def encoded(row: dict) -> tuple[dict, str, Counter]:
    """The example of a row, its text with thinking on, and what is counted."""
    source = SourceConfig(path="x.jsonl", chat_template_kwargs={"enable_thinking": True})
    adapted = understand(Record("x.jsonl", 1, json.dumps(row).encode()), source)
    counts: Counter = Counter(adapted.notices)
    documents = encode(adapted.example, TOKENIZER, counts)
    return adapted.example, "".join(TOKENIZER.decode(document.tokens) for document in documents), counts


def outcome(row: dict, without: dict, field: Field) -> str:
    """What becomes of a field: "used", "refused", "counted" or "lost".

    Args:
        without: the row without the field, or None.
    """
    try:
        example, text, counts = encoded(row)
    except DataError:
        return "refused"
    plain, _, plain_counts = encoded(without)
    if field.holds in ("zero", "false", "true", "options"):
        used = any(example.get(key) != plain.get(key) for key in ("context", "chat_template_kwargs"))
    else:
        used = WORD in text or example.get("images") == [b"zanzibar"]
    return "used" if used else "counted" if counts.keys() - plain_counts.keys() else "lost"


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: f"{field.level}.{field.name}")
def test_a_field_is_used_refused_or_counted(field):
    for row, without in rows_with(field):
        assert outcome(row, without, field) in ("used", "refused", "counted"), row


def test_the_check_finds_a_field_that_is_lost():
    """What no name says anything about is only listed as unused."""
    assert outcome({"messages": QA, "wombat": WORD}, {"messages": QA}, Field("row", "wombat", "text")) == "lost"
    message = {"messages": [QA[0], {**QA[1], "wombat": WORD}]}
    assert outcome(message, {"messages": QA}, Field("message", "wombat", "text")) == "lost"


def test_fields_about_the_content_are_no_content():
    row = {
        "messages": QA, "prompt_id": "x", "context_length": "9", "source": "web", "num_turns": 2,
        "reasoning_effort": "high", "question_type": "open", "input_tokens": 3, "category": "c",
        "text_hash": "0", "system_prompt": None,        "custom_instruction": False,
        "skip_prompt_formatting": None, "history": [], "context": "", "url": "u",
    }  # fmt: skip
    adapted = understand(Record("x.jsonl", 1, json.dumps(row).encode()), SourceConfig(path="x.jsonl"))
    assert adapted.example == {"messages": QA} and not adapted.notices


def test_a_field_of_a_message_may_be_named_in_ignore():
    row = {"messages": [{**QA[0], "context": WORD}, QA[1]]}
    with pytest.raises(DataError, match="message 0 .user. has a field 'context' .*put it into the content, or name it"):
        encoded(row)
    source = SourceConfig(path="x.jsonl", ignore=["context"])
    assert understand(Record("x.jsonl", 1, json.dumps(row).encode()), source).example == {"messages": QA}
    shown = {"messages": [{"role": "user", "content": f"Q about {WORD}", "context": WORD}, QA[1]]}
    assert WORD in encoded(shown)[1]


def test_a_copy_is_no_loss():
    """Columns that repeat what the conversation has, as much used datasets have them."""
    row = {"messages": QA, "prompt": "Q", "response": "A", "context": " Q ", "choices": ["A", "Q"]}
    adapted = understand(Record("x.jsonl", 1, json.dumps(row).encode()), SourceConfig(path="x.jsonl"))
    assert adapted.example == {"messages": QA} and not adapted.notices


def test_what_was_refused_can_be_said():
    row = {"messages": QA, "context": "C"}
    record = Record("x.jsonl", 1, json.dumps(row).encode())
    with pytest.raises(DataError, match="a column 'context' .*isn't a field of the format messages, and would be lost"):
        understand(record, SourceConfig(path="x.jsonl"))
    assert understand(record, SourceConfig(path="x.jsonl", ignore=["context"])).example == {"messages": QA}
    counted = understand(record, SourceConfig(path="x.jsonl", format="messages"))
    assert counted.example == {"messages": QA} and list(counted.notices) == ["unused column of content: context"]


ANSWERS = ("weight 0", "train false", "is_trainable false", "masked true", "skip_loss true", "loss_scale 0.0")


@pytest.mark.parametrize("said", ANSWERS)
def test_a_message_and_a_row_that_say_that_they_are_not_trained(said):
    name, value = said.split()
    value = json.loads(value)
    example, _, _ = encoded({"messages": [QA[0], {**QA[1], name: value}, *QA]})
    assert example["context"] == [1] and name not in example["messages"][1]
    example, text, counts = encoded({"messages": QA, name: value})
    assert text == "" and counts == {notices.LEFT_OUT: 1}
    example, text, counts = encoded({"messages": QA, name: not value})
    assert text and notices.LEFT_OUT not in counts


@pytest.mark.parametrize(
    "row, message",
    [
        ({"messages": QA, "weight": 0.5}, "the row has weight 0.5: .*name it in the source.s ignore"),
        ({"messages": QA, "loss_mask": [1, 0]}, "the row: loss_mask says what is trained on, but not in a way"),
        ({"messages": [QA[0], {**QA[1], "mask": 1}]}, "message 1: mask says what is trained on, but not in a way"),
        (
            {"messages": [QA[0], {**QA[1], "content": [{"type": "text", "text": t, "train": t == "a"} for t in "ab"]}]},
            "message 1: some parts of its content are trained on and others are not",
        ),
    ],
)
def test_what_is_neither_trained_nor_not_is_refused(row, message):
    with pytest.raises(DataError, match=message):
        encoded(row)
    name = next((name for name in row if name != "messages"), None)
    if name:
        source = SourceConfig(path="x.jsonl", ignore=[name])
        assert understand(Record("x.jsonl", 1, json.dumps(row).encode()), source).example == {"messages": QA}
