"""Thinking is trained as a served model writes it, with the template of every public revision of Gemma 4."""

import json
from collections import Counter

import pytest
from data_helpers import make_tokenizer
from gemma4_templates import VARIANTS, Rules, empty_thought, opened, template
from hypothesis import given, settings
from hypothesis import strategies as st

from joint_train.config import SourceConfig
from joint_train.data import DataError, notices
from joint_train.data.json_files import Record
from joint_train.data.messages import conversation as conversation_of
from joint_train.data.template import ASSISTANT
from joint_train.data.thinking import prompt_ids
from joint_train.data.tokenise import encode_record

TOKENIZERS = {name: make_tokenizer(template(rules)) for name, rules in VARIANTS.items()}
OPENING, CLOSING = "<|channel>thought\n", "<channel|>"
CALL = {"type": "function", "function": {"name": "get_tide", "arguments": {"port": "Zadar"}}}
CALLED = '<|tool_call>call:get_tide{port:<|"|>Zadar<|"|>}<tool_call|>'
TOOLS = [{"type": "function", "function": {"name": "get_tide", "parameters": {}}}]


def asked(text: str = "2+2?") -> dict:
    return {"role": "user", "content": text}


def said(text: str, reasoning: str | None = None, *calls: dict) -> dict:
    message = {"role": "assistant", "content": text}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    return {**message, "tool_calls": list(calls)} if calls else message


RESULT = {"role": "tool", "name": "get_tide", "content": "3 m"}
CONVERSATIONS = {
    "one answer": [asked(), said("4", "two and two")],
    "a system prompt": [{"role": "system", "content": "Be terse."}, asked(), said("4", "two and two")],
    "two answers": [asked(), said("4", "two and two"), asked("3+3?"), said("6", "three and three")],
    "the first without": [asked(), said("4"), asked("3+3?"), said("6", "three and three")],
    "the last without": [asked(), said("4", "two and two"), asked("3+3?"), said("6")],
    "a call": [asked("Tide?"), said("", "look it up", CALL), RESULT, said("3 m.", "so it is")],
    "a call without": [asked("Tide?"), said("", None, CALL), RESULT, said("3 m.", "so it is")],
    "an answer without after a call": [asked("Tide?"), said("", "look it up", CALL), RESULT, said("3 m.")],
    "two calls": [
        asked("Tide?"), said("", "look", CALL), RESULT, said("", "again", CALL), RESULT, said("3 m.", "so"),
    ],
    "a call and another question": [
        asked("Tide?"), said("", "look", CALL), RESULT, said("3 m.", "so"), asked("Sure?"), said("Yes.", "hm"),
    ],
    "space around": [asked(), said(" 4\n", " two\n and two ")],
    "a thought that is the answer": [asked("4?"), said("4", "4")],
}  # fmt: skip


def prompt_of(name: str, before: list[dict], thinking: bool = True, tools=None) -> str:
    """What an engine is given, by transformers itself."""
    return TOKENIZERS[name].apply_chat_template(
        before, tools=tools, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )


def written(rules: Rules, before: list[dict], message: dict) -> str:
    """What the model has to write after its prompt with thinking on, by the rules of the revision."""
    shows = rules.thoughts != "never"
    close = rules.close.replace("\\n", "\n") if shows else "\n<channel|>"
    thought = message.get("reasoning_content")
    if thought:
        text = ("" if opened(rules, before) else OPENING) + thought + close
    elif opened(rules, before):
        text = CLOSING
    else:
        text = OPENING + CLOSING if empty_thought(rules, before) else ""
    if calls := message.get("tool_calls"):
        return text + CALLED * len(calls) + ("<turn|>" if rules.results == "turns" else "<|tool_response>")
    return text + message["content"].strip() + "<turn|>"


def encoded(name: str, row: dict, counts: Counter | None = None, thinking: bool | None = True) -> list:
    options = {} if thinking is None else {"enable_thinking": thinking}
    source = SourceConfig(path="x.jsonl", chat_template_kwargs=options)
    record = Record("x.jsonl", 1, json.dumps(row).encode())
    return [document for document, _ in encode_record(record, source, TOKENIZERS[name], counts)]


def pairs(name: str, row: dict, counts: Counter | None = None, thinking: bool | None = True) -> list[tuple[list, list]]:
    """The tokens before each answer, and those of the answer."""
    found = []
    for document in encoded(name, row, counts, thinking):
        tokens, flags = document.tokens.tolist(), (document.flags & ASSISTANT) != 0
        edges = [i for i in range(len(flags)) if flags[i] != (flags[i - 1] if i else False)] + [len(flags)]
        found += [(tokens[:start], tokens[start:end]) for start, end in zip(edges[::2], edges[1::2], strict=False)]
    return found


def understand(messages: list[dict]) -> list[dict]:
    return conversation_of(messages, arrow=False)[0]


def ids(name: str, text: str) -> list[int]:
    return TOKENIZERS[name](text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", VARIANTS)
def test_each_answer_is_what_a_served_model_has_to_write(name, conversation):
    messages = CONVERSATIONS[conversation]
    tools = TOOLS if any("tool_calls" in message for message in messages) else None
    expected = [
        (
            ids(name, prompt_of(name, messages[:at], tools=tools)),
            ids(name, written(VARIANTS[name], messages[:at], message)),
        )
        for at, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    assert pairs(name, {"messages": messages, "tools": tools}) == expected


@pytest.mark.parametrize("name", ["summer, large", "summer, small"])
def test_it_is_the_templates_own_rendering_where_there_is_one(name, monkeypatch):
    """The same conversations with a template that doesn't render the thoughts of answers are trained the same."""
    messages = CONVERSATIONS["one answer"]
    tokenizer = TOKENIZERS[name]
    ((before, answer),) = pairs(name, {"messages": messages})
    text = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=True)
    assert tokenizer.decode(before + answer) + "\n" == text
    without = {"summer, large": "spring, large", "summer, small": "spring, small"}[name]
    assert pairs(without, {"messages": messages}) == [(before, answer)]


@pytest.mark.parametrize("name", VARIANTS)
def test_thinking_off_trains_no_thought(name):
    """Neither as a target nor in what comes before one."""
    for conversation, messages in CONVERSATIONS.items():
        counts: Counter = Counter()
        thoughtless = [{k: v for k, v in message.items() if k != "reasoning_content"} for message in messages]
        found = pairs(name, {"messages": messages, "tools": TOOLS}, counts, thinking=None)
        assert found == pairs(name, {"messages": thoughtless, "tools": TOOLS}, thinking=False), conversation
        assert counts[notices.UNTHOUGHT] == sum("reasoning_content" in message for message in messages)
        assert counts[notices.UNSHOWN_THOUGHTS] == 0
        before = understand(messages)[:-1]
        for tools in (None, TOOLS):
            prompt = prompt_ids(TOKENIZERS[name], before, tools=tools, enable_thinking=False)
            assert prompt == prompt_ids(TOKENIZERS[name], understand(thoughtless)[:-1], tools=tools)


@pytest.mark.parametrize("name", VARIANTS)
def test_advice_does_not_go_in_a_circle(name):
    """What the notice says to set trains the row, and nothing more is said about its thinking."""
    row = {"messages": CONVERSATIONS["a call"], "tools": TOOLS}
    counts: Counter = Counter()
    encoded(name, row, counts, thinking=None)
    assert "enable_thinking: true" in notices.sentence(notices.UNTHOUGHT, counts[notices.UNTHOUGHT])
    counts.clear()
    encoded(name, row, counts)
    assert not counts.keys() - {notices.UNROLLED}


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_without_reasoning_are_counted(name):
    counts: Counter = Counter()
    messages = [asked(), said("4")]
    encoded(name, {"messages": messages}, counts)
    kind = notices.EMPTY_THOUGHT if empty_thought(VARIANTS[name], messages[:1]) else notices.UNASKED
    assert counts == {kind: 1}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("content", ["<think>two and two</think>4", "<|channel>thought\ntwo and two\n<channel|>4"])
def test_a_thought_inside_the_content_is_moved_into_the_channel(name, content):
    assert pairs(name, {"messages": [asked(), said(content)]}) == pairs(name, {"messages": CONVERSATIONS["one answer"]})


def test_tags_of_other_models_are_counted():
    for thinking, content in (
        (False, "<think>two and two</think>4"),
        (True, "<reasoning>two and two</reasoning><answer>4</answer>"),
        (False, "two and two</think>4"),
        (False, "<think>two and"),
    ):
        counts: Counter = Counter()
        ((_, answer),) = pairs("spring, small", {"messages": [asked(), said(content)]}, counts, thinking)
        assert TOKENIZERS["spring, small"].decode(answer) == f"{content}<turn|>"
        assert counts[notices.TAGS] == 1


def test_thinking_in_the_system_prompt():
    """Gemma 4's token turns it on; where the prompt ends with an empty thought all the same, nothing can follow it."""
    row = {"messages": [{"role": "system", "content": "<|think|>\nBe terse."}, *CONVERSATIONS["one answer"]]}
    ((_, answer),) = pairs("spring, small", row, thinking=None)
    assert TOKENIZERS["spring, small"].decode(answer) == "<|channel>thought\ntwo and two\n<channel|>4<turn|>"
    with pytest.raises(DataError, match="message 2: the system prompt turns thinking on .*enable_thinking: true"):
        encoded("spring, large", row, thinking=None)


def test_a_template_without_a_place_for_thinking():
    plain = make_tokenizer(
        "{%- for m in messages -%}<|turn>{{ m.role }}\n{{ m.content }}<turn|>{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|turn>assistant\n{%- endif -%}"
    )
    counts: Counter = Counter()
    record = Record("x.jsonl", 1, json.dumps({"messages": CONVERSATIONS["one answer"]}).encode())
    encode_record(record, SourceConfig(path="x.jsonl"), plain, counts)
    assert counts == {notices.UNSHOWN_THOUGHTS: 1}
    assert "another template" in notices.sentence(notices.UNSHOWN_THOUGHTS, 1)


def test_options_that_are_never_read_are_refused_by_name():
    for options, message in (
        ({"enable_thinkin": True}, r"never reads enable_thinkin \(did you mean enable_thinking\?\); it reads enable"),
        ({"thinking_budget": 3}, "never reads thinking_budget"),
        (
            {"enable_thinking": "false"},
            "enable_thinking is the text 'false', which a template takes for true: write fal",
        ),
        ({"enable_thinking": "no"}, "enable_thinking is the text 'no', .*: write false without"),
    ):
        row = {"messages": CONVERSATIONS["one answer"], "chat_template_kwargs": options}
        with pytest.raises(DataError, match=f"x.jsonl:1: chat_template_kwargs: .*{message}"):
            encoded("spring, large", row, thinking=None)
    row = {"messages": CONVERSATIONS["a call"], "chat_template_kwargs": {"preserve_thinking": True}}
    assert encoded("summer, large", row)


texts = st.text(st.sampled_from("ab 4\n<|é🎈"), min_size=1, max_size=6).filter(str.strip)
turns = st.tuples(texts, texts, st.none() | texts)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(VARIANTS)), st.lists(turns, min_size=1, max_size=3))
def test_any_texts(name, turns):
    messages = [m for question, answer, thought in turns for m in (asked(question), said(answer, thought))]
    expected = [
        (ids(name, prompt_of(name, messages[:at])), ids(name, written(VARIANTS[name], messages[:at], messages[at])))
        for at in range(1, len(messages), 2)
    ]
    assert pairs(name, {"messages": messages}) == expected
