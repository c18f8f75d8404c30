"""Rows as tokens: what of each is trained on, and that nothing that a row says is lost on the way."""

import io
import json
import time
from collections import Counter

import pytest
from data_helpers import TURNS, chat, make_config, make_tokenizer, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_data_masks import GEMMA4, LLAMA3, MISTRAL, QWEN3, TEMPLATES, runs_of, unmarked

from joint_train.config import SourceConfig
from joint_train.data import DataError, build_loader, notices, report
from joint_train.data.json_files import Record
from joint_train.data.rows import Walk
from joint_train.data.template import _tokens, _tokens_by_places, encode, texts
from joint_train.data.tokenise import encode_record
from joint_train.starter import CHAT_TEMPLATE

GEMMA = make_tokenizer(unmarked(GEMMA4))
CHANNEL = "<|turn>model\n<|channel>thought\n<channel|>"
TIDE = {"name": "get_tide", "description": "Tide", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": TIDE}]
ARGUMENTS = {"port": "Zadar"}
CALL = {"id": "c1", "type": "function", "function": {"name": "get_tide", "arguments": ARGUMENTS}}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "3 m"}
ASKED = {"role": "user", "content": "Tide at Zadar?"}
SAID = {"role": "assistant", "content": "It is 3 m."}
CALLED = '<|tool_call>call:get_tide{port:<|"|>Zadar<|"|>}<tool_call|><|tool_response>'
RESPONSE = 'response:get_tide{value:<|"|>3 m<|"|>}<tool_response|>'


def calling(content="", **call) -> dict:
    return {"role": "assistant", "content": content, "tool_calls": [{**CALL, **call}]}


def documents(row: dict, tokenizer=GEMMA, counts: Counter | None = None, **options) -> list:
    source = SourceConfig(path="x.jsonl", **options)
    record = Record("x.jsonl", 1, json.dumps(row).encode())
    return [document for document, _ in encode_record(record, source, tokenizer, counts)]


def trained(row: dict, tokenizer=GEMMA, **options) -> list[str]:
    """What of a row is trained on, in order."""
    return [
        tokenizer.decode(document.tokens[start:end])
        for document in documents(row, tokenizer, **options)
        for start, end in runs_of(document)
    ]


def messages_of(*turns: tuple) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


RIGHT = messages_of(("user", "Q1"), ("assistant", "WRONG"), ("user", "Q2"), ("assistant", "right"))
USING = {"messages": [ASKED, calling(), RESULT, SAID], "tools": TOOLS}
CASES = {
    "01": (chat("Ping?", "Pong."), ["Pong.<turn|>"]),
    "02 calls": ({"conversations": USING["messages"], "tools": TOOLS}, [CALLED, "It is 3 m.<turn|>"]),
    "02 a call alone": ({"conversations": [ASKED, calling()], "tools": TOOLS}, [CALLED]),
    "03": ({"messages": [RIGHT[0], {**RIGHT[1], "weight": 0}, *RIGHT[2:]]}, ["right<turn|>"]),
    "04": (
        {
            **USING,
            "messages": [ASKED, calling(function={**CALL["function"], "arguments": '{"port": "Zadar"}'}), RESULT],
        },
        [CALLED],
    ),
    "07": ({"prompt": RIGHT[:3], "completion": RIGHT[3:]}, ["right<turn|>"]),
    "08": ({"instruction": "And red?", "output": "No.", "history": [["Blue?", "Yes."]]}, ["Yes.<turn|>", "No.<turn|>"]),
    "11": (
        {
            "messages": [
                {"role": "user", "content": "Tide?"},
                {"role": "assistant", "content": None, "function_call": {"name": "get_tide", "arguments": "{}"}},
            ],
            "functions": [TIDE],
        },
        ["<|tool_call>call:get_tide{}<tool_call|><|tool_response>"],
    ),
    "21": ({"instruction": "Say hi.", "input": "", "output": "hi"}, ["hi<turn|>"]),
    "22": (
        {
            "conversations": [
                {"from": "human", "value": "Tide at Zadar?"},
                {"from": "function_call", "value": '{"name":"get_tide","arguments":{"port":"Zadar"}}'},
                {"from": "observation", "value": "3 m"},
                {"from": "gpt", "value": "It is 3 m."},
            ],
            "tools": json.dumps([TIDE]),
        },
        [CALLED, "It is 3 m.<turn|>"],
    ),
    "24": ({**chat("Tide?", "3 m"), "tools": [TIDE]}, ["3 m<turn|>"]),
    "25": (
        {**USING, "messages": [ASKED, calling("Let me look."), RESULT, SAID]},
        [CALLED.replace("<|tool_response>", "Let me look.<|tool_response>"), "It is 3 m.<turn|>"],
    ),
    "26": ({"messages": messages_of(("human", "Q"), ("gpt", "A"))}, ["A<turn|>"]),
    "28": ({"messages": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, ["A<turn|>"]),
    "29": ({"question": "Q", "answer": "A"}, ["A<turn|>"]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_trained_of_a_row(case):
    row, expected = CASES[case]
    assert trained(row) == expected


def test_what_precedes_it():
    text = GEMMA.decode(documents({"system": "Be terse.", **chat("Q1", "A1")})[-1].tokens)
    assert text == f"<bos><|turn>system\nBe terse.<turn|>\n<|turn>user\nQ1<turn|>\n{CHANNEL}A1<turn|>\n"
    text = GEMMA.decode(documents({"instruction": "Translate.", "input": "one", "output": "un"})[-1].tokens)
    assert text == f"<bos><|turn>user\nTranslate.\none<turn|>\n{CHANNEL}un<turn|>\n"
    text = GEMMA.decode(documents(USING)[-1].tokens)
    assert text.endswith(f"<|turn>model\n{CALLED}{RESPONSE}It is 3 m.<turn|>\n")
    assert GEMMA.decode(documents(USING)[0].tokens).endswith(f"{CHANNEL}{CALLED}")


def test_options_of_the_row_the_source_and_all_data(tmp_path):
    """The nearer ones win, and training has what they make of the prompt."""
    off, on = {"enable_thinking": False}, {"enable_thinking": True}
    row = chat("Q", "A")
    assert "<|think|>" in GEMMA.decode(documents(row, chat_template_kwargs=on)[0].tokens)
    assert "<|think|>" not in GEMMA.decode(
        documents({**row, "chat_template_kwargs": off}, chat_template_kwargs=on)[0].tokens
    )
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    for all_data, source, expected in (({}, {}, False), (on, {}, True), (on, off, False), (off, on, True)):
        cfg = make_config(
            tmp_path, [{"path": path, "chat_template_kwargs": source}], chat_template_kwargs=all_data, max_length=128
        )
        batch = next(iter(build_loader(cfg, GEMMA, "train", 0, 1)))
        assert ("<|think|>" in GEMMA.decode(batch["input_ids"][0])) == expected


NO_TOOLS = make_tokenizer(unmarked(TURNS))  # shows any role, and nothing of a call
NO_RESULTS = make_tokenizer(
    unmarked(TURNS).replace("for message in messages -%}", "for message in messages if message['role'] != 'tool' -%}")
)
LEFT_OUT = {
    "a call": (
        NO_TOOLS,
        [ASKED, calling()],
        r"message 1 \(assistant\): .* leaves out a part of its tool call: 'get_ti",
    ),
    "a call's value": (
        make_tokenizer(unmarked(GEMMA4).replace("+ value +", "+ 'x' +")),
        [ASKED, calling()],
        r"message 1 \(assistant\): .* leaves out a tool call",
    ),
    "a result": (NO_RESULTS, [ASKED, {"role": "tool", "content": "12"}, SAID], r"message 1 \(tool\): .*says: '12'"),
    "a result that stands elsewhere": (
        NO_RESULTS,
        [ASKED, {"role": "tool", "content": "3 m"}, SAID],
        r"message 1 \(tool\): .*what it says: '3 m'",
    ),
    "a result that is a word of the template": (
        NO_RESULTS,
        [ASKED, {"role": "tool", "content": "model"}, SAID],
        r"message 1 \(tool\): .*what it says: 'model'",
    ),
    "a second system prompt": (
        GEMMA,
        [ASKED, {"role": "system", "content": "Be terse."}, SAID],
        r"message 1 \(system\): .*what it says: 'Be terse.'",
    ),
    "parts that are written as a list": (
        make_tokenizer(unmarked(TURNS).replace("message['content'] | trim", "message['content'] | string")),
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, SAID],
        r"message 0 \(user\): .*writes the parts of its content as a list",
    ),
    "half of a content": (GEMMA, [ASKED, {"role": "assistant", "content": "a<|channel>b"}], r"message 1 \(assistant\)"),
    "a changed content": (
        make_tokenizer(unmarked(TURNS).replace("| trim", "| trim | upper")),
        [ASKED, SAID],
        r"message 0 \(user\): .*what it says: 'Tide at Zadar\?'",
    ),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_a_template_leaves_out_makes_the_row_bad(case):
    tokenizer, messages, message = LEFT_OUT[case]
    with pytest.raises(DataError, match=f"x.jsonl:1: {message}"):
        documents({"messages": messages}, tokenizer)


def test_a_text_alone_in_its_content_is_a_string_to_every_template():
    in_parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in (ASKED, SAID)]
    (found,), (expected,) = (documents({"messages": turns}, NO_TOOLS) for turns in (in_parts, [ASKED, SAID]))
    assert found.tokens.tolist() == expected.tokens.tolist()


def test_what_is_rendered_as_json_is_found():
    template = unmarked(TURNS).replace(
        "    {%- else -%}", "    {%- elif role == 'tool' -%}{{- message['content'] | tojson -}}\n    {%- else -%}"
    )
    result = {"role": "tool", "content": 'a "b"\nc\\'}
    (document,) = documents({"messages": [ASKED, result, SAID]}, make_tokenizer(template))
    assert document.flags.any()


def test_an_answer_that_says_nothing_is_bad():
    for empty in ("", " \n"):
        with pytest.raises(DataError, match="message 1: the assistant says nothing, and that would be learnt"):
            documents(chat("Q", empty))
    assert trained({"messages": [ASKED, {"role": "assistant", "content": "", "weight": 0}, ASKED, SAID]}) == [
        "It is 3 m.<turn|>"
    ]


def test_notices():
    def counted(row, tokenizer=GEMMA, **options) -> dict:
        counts = Counter()
        documents(row, tokenizer, counts, **options)
        return dict(counts)

    assert counted(chat("Q", "A")) == {}
    thinking = {"messages": [ASKED, {**SAID, "reasoning": "hm"}]}
    assert counted(thinking) == {notices.UNTHOUGHT: 1}
    assert counted(thinking, chat_template_kwargs={"enable_thinking": True}) == {}
    assert counted({**chat("Q", "A"), "tools": TOOLS}, NO_TOOLS) == {notices.UNSHOWN_TOOLS: 1}
    # GLM-4's turns end where the next one begins.
    endless = make_tokenizer(
        "{%- for m in messages -%}<|turn>{{ m.role }}\n{{ m.content }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|turn>assistant\n{% endif -%}"
    )
    assert counted(chat("Q", "A", "Q", "A"), endless) == {notices.ENDLESS: 2}


def test_a_turn_that_ends_otherwise_once_others_follow_it():
    """gpt-oss closes the last turn with <|return|> and earlier ones with <|end|>: the first is what the model says."""
    template = (
        "{%- for m in messages -%}<|turn>{{ m.role }}\n{{ m.content }}"
        "{{ '<eos>' if loop.last and m.role == 'assistant' else '<turn|>' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|turn>assistant\n{% endif -%}"
    )
    assert trained(chat("Q", "A", "Q", "B"), make_tokenizer(template)) == ["A<eos>", "B<eos>"]


def test_sources_say_what_they_use(tmp_path, caplog):
    rows = [{**chat("Q", "A", "R", "B"), "id": 1, "source": None}, {"prompt": "Q", "response": "A", "more": 2}]
    cfg = make_config(tmp_path, [write_jsonl(tmp_path / "a.jsonl", rows)], max_length=128)
    for _ in range(2):  # from the cache, too
        caplog.clear()
        with caplog.at_level("INFO"):
            build_loader(cfg, GEMMA, "train", 0, 1)
        assert (
            "data source 'a': 2 rows in the formats messages (1), prompt_response (1); columns used: messages, prompt, "
            "response; unused: id, more, source" in caplog.text
        )
        assert "1 conversations are split into one training document for each answer, because" in caplog.text
        assert (
            f"how it prompts for them; see docs/data.md#training-is-serving (first: {tmp_path}/a.jsonl:1)"
            in caplog.text
        )


def test_columns_that_no_record_has_are_an_error(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [chat("Q", "A")])
    cfg = make_config(tmp_path, [{"path": path, "columns": {"system": "sys"}}])
    with pytest.raises(DataError, match="data source 'a': columns name 'sys', which no record has; they have messages"):
        build_loader(cfg, GEMMA, "train", 0, 1)


@pytest.mark.parametrize("train_on, targets", [("assistant", 2), ("last_assistant", 1), ("all", None)])
def test_each_answer_is_trained_once(tmp_path, train_on, targets):
    """Where a conversation is two documents: both, or only the last, or the last one whole."""
    path = write_jsonl(tmp_path / "a.jsonl", [chat("Q1", "A1", "Q2", "A2")])
    cfg = make_config(tmp_path, [path], max_length=256, mixture="epoch", train_on=train_on)
    batch = next(iter(build_loader(cfg, GEMMA, "train", 0, 1)))
    labels = batch["labels"][0]
    assert GEMMA.decode(labels[labels == GEMMA.convert_tokens_to_ids("<turn|>")]) == "<turn|>" * (targets or 4)
    assert batch["document_ids"].max() == (2 if train_on == "assistant" else 1)


@pytest.mark.parametrize(
    "unroll, kept", [("all", [1, 2, 3, 4]), ("last 2", [3, 4]), ("last 1", [4]), ("last 9", [1, 2, 3, 4])]
)
def test_a_long_conversation_can_be_limited_to_its_last_answers(tmp_path, unroll, kept, caplog):
    """Answers of a conversation that is a document for each: which are trained, and what it costs."""
    turns = [text for number in range(1, 5) for text in (f"Q{number}", f"A{number}")]
    path = write_jsonl(tmp_path / "a.jsonl", [chat("Q0", "A0"), chat(*turns), chat("Q5", "A5")])
    cfg = make_config(tmp_path, [path], max_length=512, mixture="epoch", shuffle=False, unroll=unroll, packing=False)
    caplog.set_level("INFO")
    sequence = build_loader(cfg, GEMMA, "train", 0, 1).sequence
    rows = [sequence.row(row, 512) for row in Walk(sequence)]
    trained = [GEMMA.decode(row["labels"][row["labels"] != -100]).removesuffix("<turn|>") for row in rows]
    assert trained == ["A0", *(f"A{number}" for number in kept), "A5"]
    of_it = [int((row["document_ids"] > 0).sum()) for row in rows[1:-1]]
    said = (
        "1 conversations are a document for each answer, since the template renders earlier turns otherwise than it "
        f"prompts for them: {len(kept)} documents of {sum(of_it)} tokens, {sum(of_it) / of_it[-1]:.1f} times the "
        f"{of_it[-1]} tokens"
    )
    assert said in caplog.text
    assert ("are left out, with their answers" in caplog.text) == (len(kept) < 4)
    if unroll == "all":  # and so says `data check`
        console = Console(width=400, file=io.StringIO())
        report.show(console, report.check(cfg.data.train, cfg.data, GEMMA))
        total = f"{sum(of_it)} tokens in all: {sum(of_it) / of_it[-1]:.1f} times"
        assert f"a: 1 conversations are a document for each answer, {total}" in console.file.getvalue()


FOR_EVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}"
FOR_EVER += "{% endfor %}"
HOSTILE = {
    "loops": (FOR_EVER, "the chat template of '.*' takes more than 0 s: it may never end"),
    "recurses": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "refuses it: RecursionError"),
    "powers": ("{{ 9 ** 9 ** 9 ** 9 }}", "takes powers"),
    "looks into Python": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "refuses it: SecurityError"),
    "reads files": ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "refuses it: "),
    "changes the messages": ("{{ messages.append(1) }}", "refuses it: SecurityError"),
    "is none": ("{% for %}", "refuses it: TemplateSyntaxError"),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("case", HOSTILE)
def test_templates_from_strangers(tmp_path, monkeypatch, case, workers):
    """They end with a sentence, in this process and in a loader's."""
    template, message = HOSTILE[case]
    if case == "loops":  # what is refused for another reason may take longer on a busy machine
        monkeypatch.setattr("joint_train.data.limits.SECONDS", 0.2)
    cfg = make_config(tmp_path, [write_jsonl(tmp_path / "a.jsonl", [chat("Q", "A")])], num_workers=workers)
    began = time.monotonic()
    with pytest.raises(DataError, match=f"a.jsonl:1: .*{message}") as raised:
        build_loader(cfg, make_tokenizer(template), "train", 0, 1)
    assert "Traceback" not in str(raised.value) and time.monotonic() - began < 60


# Everything that the templates of this repository can show, and what they can't.
words = st.text(st.sampled_from("ab \n<|>é🎈\"{}'"), max_size=6) | st.sampled_from(["user", "model", "3 m", "<|turn>"])
calls = st.builds(
    lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}},
    st.sampled_from(["get_tide", "f"]),
    st.dictionaries(st.sampled_from(["port", "day"]), words, max_size=2),
)
said = st.builds(
    lambda content, calls, reasoning: {
        "role": "assistant",
        "content": content,
        **({"tool_calls": calls} if calls else {}),
        **({"reasoning": reasoning} if reasoning else {}),
    },
    words,
    st.lists(calls, max_size=2),
    words,
)
heard = st.builds(
    lambda role, content: {"role": role, "content": content, **({"name": "f"} if role == "tool" else {})},
    st.sampled_from(["system", "user", "user", "tool"]),
    words,
)
ALL = {
    name: make_tokenizer(template) for name, template in {**TEMPLATES, "turns": TURNS, "starter": CHAT_TEMPLATE}.items()
}
ALL |= {f"{name} without marks": make_tokenizer(unmarked(t)) for name, t in (("gemma4", GEMMA4), ("qwen3", QWEN3))}


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(sorted(ALL)), st.lists(heard | said, min_size=1, max_size=6), st.booleans())
def test_every_content_is_rendered_or_the_row_is_bad(name, messages, thinking):
    tokenizer = ALL[name]
    options = {"chat_template_kwargs": {"enable_thinking": thinking}} if "gemma4" in name else {}
    try:
        found = encode({"messages": messages, **options}, tokenizer)
    except DataError:
        return
    text = "\n".join(tokenizer.decode(document.tokens) for document in found)
    for message in messages[: found[-1].messages]:
        assert message["content"].strip() in text
        for call in message.get("tool_calls", ()):
            values = [call["function"]["name"], *call["function"]["arguments"].values()]
            assert all(
                value.strip() in text or json.dumps(value.strip(), ensure_ascii=False)[1:-1] in text for value in values
            )


def test_the_property_is_not_empty():
    """The same generator's simplest conversations with all that there is get through."""
    messages = [{"role": "system", "content": "s"}, ASKED, calling("x"), {**RESULT, "name": "get_tide"}, SAID]
    for name in ("gemma4", "gemma4 without marks", "qwen3"):
        assert encode({"messages": messages}, ALL[name])
    for name, template in (("llama3", LLAMA3), ("mistral", MISTRAL)):
        assert encode({"messages": messages[:2] + messages[4:]}, make_tokenizer(template)), name


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(sorted(ALL)), st.lists(heard | said, min_size=1, max_size=6))
def test_special_tokens_show_the_same_places_as_the_tokenizer(name, messages):
    tokenizer = ALL[name]
    try:
        found = texts({"messages": messages}, tokenizer)
    except DataError:
        return
    for text in found:
        tokens, runs = _tokens_by_places(text, tokenizer)
        known, same = _tokens(text, tokenizer)
        assert known.tolist() == tokens and same == runs


def test_special_tokens_show_the_places_of_usual_rows(monkeypatch):
    asked = []
    monkeypatch.setattr("joint_train.data.template._tokens_by_places", lambda *args: asked.append(args))
    for name in ("gemma4", "gemma4 without marks", "starter", "qwen3", "llama3"):
        encode(chat("Question?", "Answer.", "And?", "More."), ALL[name])
    assert not asked
