"""Every usual shape of a row becomes the conversation that it means, or is refused in a sentence."""

import bz2
import gzip
import json
import lzma
from collections import Counter

import pytest
from data_helpers import chat, make_config, make_tokenizer, write_jsonl

from joint_train.config import SourceConfig
from joint_train.data import DataError, build_loader, notices
from joint_train.data.json_files import Record
from joint_train.data.messages import conversation
from joint_train.data.readers import read_records
from joint_train.data.sources import parse


def understood(row: dict, **options) -> dict:
    """A row of JSON as an example."""
    source = SourceConfig(path="x.jsonl", **options)
    return parse(Record("x.jsonl", 1, json.dumps(row).encode()), source)


def said(*turns: tuple) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


SCHEMA = {"type": "object", "properties": {"port": {"type": "string"}}, "required": ["port"]}
TIDE = {"name": "get_tide", "description": "Tide", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": TIDE}]
CALL = {"type": "function", "function": {"name": "get_tide", "arguments": {"port": "Zadar"}}}
USED_TOOL = [
    {"role": "user", "content": "Tide at Zadar?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "get_tide", "content": "3 m"},
    {"role": "assistant", "content": "It is 3 m."},
]
QA = said(("user", "Q"), ("assistant", "A"))
TWO = said(("user", "Q1"), ("assistant", "WRONG answer"), ("user", "Q2"), ("assistant", "right answer"))


def changed(index: int, **fields) -> list[dict]:
    return [{**turn, **(fields if at == index else {})} for at, turn in enumerate(TWO)]


SHAREGPT_TOOL = [
    {"from": "human", "value": "Tide at Zadar?"},
    {"from": "function_call", "value": '{"name":"get_tide","arguments":{"port":"Zadar"}}'},
    {"from": "observation", "value": "3 m"},
    {"from": "gpt", "value": "It is 3 m."},
]
WITH_ID = {"id": "c1", **CALL}
OPENAI_TOOL = [
    USED_TOOL[0],
    {"role": "assistant", "content": None, "tool_calls": [WITH_ID]},
    {"role": "tool", "tool_call_id": "c1", "content": "3 m"},
    USED_TOOL[3],
]
AS_STRING = {**WITH_ID, "function": {"name": "get_tide", "arguments": '{"port": "Zadar"}'}}
NAMED = {"role": "tool", "tool_call_id": "c1", "name": "get_tide", "content": "3 m"}
OPENAI_EXAMPLE = [USED_TOOL[0], {"role": "assistant", "content": "", "tool_calls": [WITH_ID]}, NAMED, USED_TOOL[3]]

DETAILS = [{"type": "reasoning.summary", "summary": "R in short"}]

ROWS = {
    "alpaca": ({"instruction": "Q", "input": "", "output": "A"}, {"messages": QA}),
    "alpaca with input": (
        {"instruction": "Translate to French.", "input": "good morning", "output": "bonjour"},
        {"messages": said(("user", "Translate to French.\ngood morning"), ("assistant", "bonjour"))},
    ),
    "alpaca with history": (
        {"instruction": "And red?", "input": "", "output": "No.", "history": [["Is it blue?", "Yes."]]},
        {"messages": said(("user", "Is it blue?"), ("assistant", "Yes."), ("user", "And red?"), ("assistant", "No."))},
    ),
    "Dolly": (
        {"instruction": "Who?", "context": "It was Ann.", "response": "Ann.", "category": "closed_qa"},
        {"messages": said(("user", "Who?\nIt was Ann."), ("assistant", "Ann."))},
    ),
    "question and answer": ({"question": "Q", "answer": "A"}, {"messages": QA}),
    "query and response": ({"query": "Q", "response": "A"}, {"messages": QA}),
    "a list of strings": ({"conversations": ["Q", "A"]}, {"messages": QA}),
    "a key for each speaker": ({"conversation": [{"human": "Q", "assistant": "A"}]}, {"messages": QA}),
    "from and value in messages": (
        {"messages": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"messages": QA},
    ),
    "other roles in messages": ({"messages": said(("human", "Q"), ("gpt", "A"))}, {"messages": QA}),
    "roles in capitals": ({"conversations": said(("Human", "Q"), ("chatgpt", "A"))}, {"messages": QA}),
    "USER": ({"messages": said(("USER", "Q"), ("ASSISTANT", "A"))}, {"messages": QA}),
    "messages in a string": ({"messages": json.dumps(QA)}, {"messages": QA}),
    "parts with value": (
        {"messages": [{"role": "user", "content": [{"type": "text", "value": "Q"}]}, QA[1]]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, QA[1]]},
    ),
    "a system column beside conversations": (
        {"system": "Be terse.", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"messages": [*said(("system", "Be terse.")), *QA]},
    ),
    "a system column beside messages": (
        {"system": "Be terse.", "messages": QA},
        {"messages": [*said(("system", "Be terse.")), *QA]},
    ),
    "system_prompt": (
        {"system_prompt": "Be terse.", "question": "Q", "response": "A"},
        {"messages": [*said(("system", "Be terse.")), *QA]},
    ),
    "the same system prompt twice": (
        {"system": "s", "messages": [*said(("system", "s")), *QA]},
        {"messages": [*said(("system", "s")), *QA]},
    ),
    "an assistant in the prompt": (
        {"prompt": TWO[:3], "completion": TWO[3:]},
        {"messages": TWO, "context": [1]},
    ),
    "an assistant in the prompt, behind a system column": (
        {"system": "s", "prompt": TWO[:3], "response": "right answer"},
        {"messages": [*said(("system", "s")), *TWO], "context": [2]},
    ),
    "weight 0": ({"messages": changed(1, weight=0)}, {"messages": TWO, "context": [1]}),
    "weight 0.0 and 1.0": ({"messages": changed(1, loss_weight=0.0)}, {"messages": TWO, "context": [1]}),
    "weight 1": ({"messages": changed(1, weight=1)}, {"messages": TWO}),
    "train: false": ({"messages": changed(1, train=False)}, {"messages": TWO, "context": [1]}),
    "loss: false": ({"messages": changed(1, loss=False)}, {"messages": TWO, "context": [1]}),
    "weights of users say nothing": ({"messages": changed(0, weight=0)}, {"messages": TWO}),
    "weight in conversations": (
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A", "weight": 0}]},
        {"messages": QA, "context": [1]},
    ),
    "thinking": (
        {"conversations": [QA[0], {**QA[1], "reasoning_content": "hm"}]},
        {"messages": [QA[0], {**QA[1], "reasoning": "hm"}]},
    ),
    "thinking in a part": (
        {"messages": [QA[0], {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}]}]},
        {"messages": [QA[0], {"role": "assistant", "content": [], "reasoning": "hm"}]},
    ),
    "tool calls in conversations": (
        {"conversations": OPENAI_TOOL, "tools": TOOLS},
        {"messages": OPENAI_EXAMPLE, "tools": TOOLS},
    ),
    "function_call and observation": (
        {"conversations": SHAREGPT_TOOL, "tools": json.dumps([TIDE])},
        {"messages": USED_TOOL, "tools": TOOLS},
    ),
    "legacy function_call and functions": (
        {
            "messages": [
                USED_TOOL[0],
                {"role": "assistant", "content": None, "function_call": {"name": "get_tide", "arguments": "{}"}},
                {"role": "function", "name": "get_tide", "content": "3 m"},
            ],
            "functions": [TIDE],
        },
        {
            "messages": [
                USED_TOOL[0],
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "function": {"name": "get_tide", "arguments": {}}}],
                },
                {"role": "tool", "name": "get_tide", "content": "3 m"},
            ],
            "tools": TOOLS,
        },
    ),
    "arguments in a string": (
        {"messages": [OPENAI_TOOL[0], {**OPENAI_TOOL[1], "tool_calls": [AS_STRING]}, *OPENAI_TOOL[2:]]},
        {"messages": OPENAI_EXAMPLE},
    ),
    "flat tools": ({"messages": QA, "tools": [TIDE]}, {"messages": QA, "tools": TOOLS}),
    "a schema by the names of Anthropic and MCP": (
        {"messages": QA, "tools": [{"name": "get_tide", "description": "Tide", "input_schema": SCHEMA}]},
        {"messages": QA, "tools": TOOLS},
    ),
    "calls in a column that can only hold text": (
        {"messages": [QA[0], {**QA[1], "tool_calls": ""}, QA[0], {**QA[1], "tool_calls": "null"}]},
        {"messages": [*QA, *QA]},
    ),
    "NaN for a missing value": ({"instruction": "Q", "input": float("nan"), "output": "A"}, {"messages": QA}),
    "one reasoning under two names": (
        {"messages": [QA[0], {**QA[1], "reasoning": "R", "reasoning_content": "R", "reasoning_details": DETAILS}]},
        {"messages": [QA[0], {**QA[1], "reasoning": "R"}]},
    ),
    "a null that is one": (
        {"messages": [QA[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": None}}]}]},
        {
            "messages": [
                QA[0],
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": None}}}],
                },
            ]
        },
    ),
    "a question about HTML": (
        {"messages": said(("user", "What does a <video> tag do? <audio>x</audio>"), ("assistant", "A"))},
        {"messages": said(("user", "What does a <video> tag do? <audio>x</audio>"), ("assistant", "A"))},
    ),
    "text beside messages": ({"messages": QA, "text": "Q A"}, {"messages": QA}),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_row_is_the_conversation_that_it_means(case):
    row, expected = ROWS[case]
    assert understood(row) == expected


ARROW_CALLS = [
    {"function": {"name": "get_tide", "arguments": {"port": "Zadar", "day": None}}, "id": None},
    {"function": {"name": "get_tide", "arguments": '{"port": null}'}, "id": None},
]


def test_nulls_that_arrow_fills_in_are_dropped_and_those_in_a_string_kept(tmp_path):
    datasets = pytest.importorskip("datasets")
    schema = {"type": "object", "properties": {"port": {"type": "string", "enum": None}, "day": None}}
    call = {"type": "function", "function": {"name": "f", "arguments": {"port": "Zadar"}}}
    other = {"type": "function", "function": {"name": "g", "arguments": {"day": 2}}}
    rows = [
        {"messages": [QA[0], {"role": "assistant", "content": "", "tool_calls": [call, other]}]},
        {"messages": QA},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    datasets.Dataset.from_list([{**row, "tools": tools} for row in rows]).to_parquet(tmp_path / "a.parquet")
    source = SourceConfig(path=str(tmp_path / "a.parquet"))
    first, second = (parse(record, source) for record in read_records(source, 1 << 20))
    assert first["messages"] == rows[0]["messages"] and second["messages"] == QA
    (tool,) = first["tools"]
    assert tool["function"]["parameters"] == {"type": "object", "properties": {"port": {"type": "string"}}}
    in_arrow = {"messages": [QA[0], {"role": "assistant", "content": "", "tool_calls": ARROW_CALLS}]}
    example = parse(Record("x.parquet", 1, in_arrow), source)
    arguments = [call["function"]["arguments"] for call in example["messages"][1]["tool_calls"]]
    assert arguments == [{"port": "Zadar"}, {"port": None}]


REFUSED = {
    "preference": ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "preference data .*columns: {response: chosen}"),
    "preference beside conversations": (
        {"conversations": QA[:1], "chosen": {"from": "gpt", "value": "A"}, "rejected": {"from": "gpt", "value": "B"}},
        "preference data",
    ),
    "unpaired preference": ({"messages": QA, "label": False}, "unpaired preference data .*leave the column out"),
    "alpaca with text": (
        {"instruction": "Q", "input": "", "output": "A", "text": "### Q"},
        "both alpaca .*instruction and output.* and a text: set the source's format",
    ),
    "fractional weight": ({"messages": changed(1, weight=0.5)}, "message 1 has weight 0.5: .*nothing between"),
    "a weight that is a word": ({"messages": changed(1, weight="no")}, "message 1 has weight 'no'"),
    "misspelt role": ({"messages": said(("user", "Q"), ("asistant", "A"))}, "unknown role 'asistant' .is it 'assis"),
    "arguments that are no JSON": (
        {"messages": [QA[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{a}"}]}]},
        "message 1: tool call 0: arguments is a string that isn't JSON",
    ),
    "arguments that are no object": (
        {"messages": [QA[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
        "message 1: tool call 0: arguments is a list, not an object",
    ),
    "a call of nothing": ({"messages": [{"from": "function_call", "value": "{}"}]}, "has no function with a name"),
    "two speakers": (
        {"messages": [{**QA[0], "from": "gpt"}, QA[1]]},
        "message 0 has the role 'user' and is from 'gpt': which one is meant",
    ),
    "two reasonings": (
        {"messages": [QA[0], {**QA[1], "reasoning": "R", "thinking": "other"}]},
        "message 1 has two different reasonings, one of them in thinking",
    ),
    "reasoning that nobody can read": (
        {"messages": [QA[0], {**QA[1], "reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]}]},
        "a reasoning.encrypted part has no text",
    ),
    "analysis as an answer": (
        {"messages": [QA[0], {"role": "assistant", "channel": "analysis", "content": "R"}, QA[1]]},
        "message 1 is in the channel 'analysis', and would be trained as an answer",
    ),
    "arguments twice": (
        {
            "messages": [
                QA[0],
                {"role": "assistant", "tool_calls": [{"name": "f", "args": {"a": 1}, "input": {"b": 2}}]},
            ]
        },
        "tool call 0 has args, input: which of them",
    ),
    "a result of another call": (
        {"messages": [*OPENAI_TOOL[:2], {**OPENAI_TOOL[2], "tool_call_id": "c2"}, OPENAI_TOOL[3]]},
        "message 2 .tool. is the result of the call 'c2', and the open calls before it are 'c1'",
    ),
    "a tool without a name": ({"messages": QA, "tools": [{"type": "function"}]}, "tool 0 has no name"),
    "two system prompts": (
        {"system": "a", "messages": [*said(("system", "b")), *QA]},
        "a system prompt in a column of its own and another one",
    ),
    "history of single texts": ({"instruction": "Q", "output": "A", "history": ["a"]}, "history isn't a list of pairs"),
    "a video marker": ({"messages": said(("user", "<video>What is it?"), ("assistant", "A"))}, "a marker <video>"),
    "an image marker alone": ({"messages": said(("user", "<image>\nWhat?"), ("assistant", "A"))}, "has no images"),
    "an audio column": ({"messages": QA, "audios": ["a.wav"]}, "a column 'audios': audio and video"),
    "no answer": ({"prompt": "Q"}, "no field 'response' or 'completion' or 'answer'; the record has"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_row_that_cannot_be_meant_is_refused(case):
    row, message = REFUSED[case]
    with pytest.raises(DataError, match=f"x.jsonl:1: .*{message}"):
        understood(row)


def test_results_without_a_call_are_counted():
    counts: Counter[str] = Counter()
    turns = [USED_TOOL[0], *said(("tool", "3 m"), ("assistant", "It is 3 m.")), NAMED, USED_TOOL[3]]
    messages, _ = conversation(turns, arrow=False, counts=counts)
    assert counts == {notices.UNCALLED: 1} and messages[1] == turns[1] and messages[3] == NAMED
    conversation(OPENAI_TOOL, arrow=False, counts=counts)
    assert counts == {notices.UNCALLED: 1}


def test_what_was_refused_can_be_said():
    """What the errors tell to set does it."""
    preferred = {"conversations": TWO[:3], "chosen": {"from": "gpt", "value": "GOOD"}, "rejected": {"value": "BAD"}}
    columns = {"prompt": "conversations", "response": "chosen"}
    example = understood(preferred, format="prompt_response", columns=columns)
    assert example == {"messages": [*TWO[:3], {"role": "assistant", "content": "GOOD"}], "context": [1]}
    both = {"instruction": "Q", "input": "", "output": "A", "text": "### Q"}
    assert understood(both, format="alpaca") == {"messages": QA}
    assert understood(both, format="text") == {"text": "### Q"}


def test_columns_of_no_field_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [chat("q", "a")])
    cfg = make_config(tmp_path, [{"path": path, "columns": {"promt": "question"}}])
    with pytest.raises(
        DataError, match=r"data.train\[0\] \(a\): columns name promt, which isn't a field of format=auto"
    ):
        build_loader(cfg, make_tokenizer(), "train", 0, 1)


EXAMPLES = [chat("q1", "a1"), chat('q"2\\"]}\\\\', "[{a2é"), chat("q3", "a3")]
LIST = {
    "on one line": json.dumps(EXAMPLES),
    "a line each": "[\n" + ",\n".join(json.dumps(example) for example in EXAMPLES) + "\n]\n",
    "indented": json.dumps(EXAMPLES, indent=1, ensure_ascii=False),
    "with a byte-order mark": "\ufeff" + json.dumps(EXAMPLES, indent=2),
    "objects of several lines": "\n".join(json.dumps(example, indent=1) for example in EXAMPLES),
    "a new line for each message": "\n".join(
        json.dumps(example).replace(', {"role"', ',\n {"role"') for example in EXAMPLES
    ),
    "JSON Lines": "\n".join(json.dumps(example) for example in EXAMPLES),
}


@pytest.mark.parametrize("block", [1 << 20, 7, 4])
@pytest.mark.parametrize("form", LIST)
def test_json_of_any_layout(tmp_path, monkeypatch, form, block):
    monkeypatch.setattr("joint_train.data.json_files.BLOCK", block)
    (tmp_path / "a.json").write_text(LIST[form], encoding="utf-8")
    source = SourceConfig(path=str(tmp_path / "a.json"))
    records = list(read_records(source, 1 << 20))
    assert [parse(record, source) for record in records] == EXAMPLES
    lines = LIST[form].split("\n")
    assert all("{" in lines[record.line - 1] for record in records)
    assert [f'"q{number}' in "".join(lines[r.line - 1 :]) for number, r in zip((1, 3), records[::2], strict=True)]


BROKEN = {
    "ends inside": ('[{"text": "a"}, {"text": ', ["", "malformed JSON: the file ends inside an object"]),
    "no end": ('[{"text": "a"},\n', ["", "the file ends inside the list"]),
    "a number": ('[{"text": "a"}, 3, {"text": "b"}]', ["", "something that isn't an object", ""]),
    "a list": ('[{"text": "a"},\n[], {"text": "b"}]', ["", "a JSON object is expected, not a list", ""]),
    "broken inside": ('[{"text" "a"},\n{"text": "b"}]', ["malformed JSON: Expecting ':'", ""]),
    "a first line that was cut off": ('{"text": "a\n{"text": "b"}\n', ["malformed JSON: ", ""]),
    "too long": ('[{"text": "' + "a" * 99 + '"},\n{"text": "b"}]', ["an object of 111 bytes, longer than", ""]),
}


@pytest.mark.parametrize("block", [1 << 20, 5])
@pytest.mark.parametrize("case", BROKEN)
def test_json_that_is_broken_is_named_and_the_rest_kept(tmp_path, monkeypatch, case, block):
    monkeypatch.setattr("joint_train.data.json_files.BLOCK", block)
    text, messages = BROKEN[case]
    (tmp_path / "a.json").write_text(text)
    source = SourceConfig(path=str(tmp_path / "a.json"))
    outcomes = []
    for record in read_records(source, 60):
        try:
            parse(record, source)
            outcomes.append("")
        except DataError as error:
            outcomes.append(str(error))
    assert len(outcomes) == len(messages)
    assert all(expected in outcome for expected, outcome in zip(messages, outcomes, strict=True)), outcomes
    assert all(outcome.startswith(f"{tmp_path}/a.json:") for outcome in outcomes if outcome)


def rows_of(path, **options) -> list:
    source = SourceConfig(path=str(path), **options)
    return [parse(record, source) for record in read_records(source, 1 << 20)]


def test_tables_and_texts(tmp_path):
    (tmp_path / "a.csv").write_text('\ufeffprompt,response,system\n"Q, ""x""\r\ny",A,\nQ,A,s\n', encoding="utf-8")
    first, second = rows_of(tmp_path / "a.csv")
    assert first == {"messages": said(("user", 'Q, "x"\r\ny'), ("assistant", "A"))}
    assert second == {"messages": said(("system", "s"), ("user", "Q"), ("assistant", "A"))}
    (tmp_path / "a.tsv").write_text("question\tanswer\nQ\tA\n")
    assert rows_of(tmp_path / "a.tsv") == [{"messages": QA}]
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert rows_of(tmp_path / "a.txt") == [{"text": "one"}, {"text": "two"}]
    (tmp_path / "b.csv").write_text("prompt,response\nQ,A\nQ,A,B\n")
    with pytest.raises(DataError, match="b.csv:3: more cells than the 2 names above them"):
        rows_of(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text("prompt,response,response\nQ,A,B\n")
    with pytest.raises(DataError, match="c.csv:1: two columns are called 'response'"):
        rows_of(tmp_path / "c.csv")
    (tmp_path / "D.TSV.GZ").write_bytes(gzip.compress(b"question\tanswer\nQ\tA\n"))
    assert rows_of(tmp_path / "D.TSV.GZ") == [{"messages": QA}]
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(DataError, match="a.md: its name ends in none of .jsonl, .json"):
        rows_of(tmp_path / "a.md")


@pytest.mark.parametrize("extension", ["gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("kind", ["json", "csv", "txt"])
def test_every_kind_of_file_may_be_compressed(tmp_path, kind, extension):
    plain = {"json": json.dumps([chat("Q", "A")], indent=1), "csv": "prompt,response\nQ,A\n", "txt": "Q\n"}[kind]
    path = tmp_path / f"a.{kind}.{extension}"
    if extension == "zst":
        pyarrow = pytest.importorskip("pyarrow")
        with pyarrow.output_stream(str(path), compression="zstd") as stream:
            stream.write(plain.encode())
    else:
        with {"gz": gzip, "bz2": bz2, "xz": lzma}[extension].open(path, "wb") as stream:
            stream.write(plain.encode())
    assert rows_of(path) == ([{"text": "Q"}] if kind == "txt" else [{"messages": QA}])
