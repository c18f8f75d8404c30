"""The computed assistant spans against the template's own marks: same template, with its marks and without."""

import re
from collections import Counter

import numpy as np
import pytest
from data_helpers import TURNS, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from joint_train.data import notices
from joint_train.data.render import MARKS
from joint_train.data.template import ASSISTANT, LAST, encode
from joint_train.data.thinking import prompt_ids
from joint_train.errors import DataError

# Short renditions of what released templates do, with marks around what the assistant writes.

# Gemma 4: thinking in a channel, only after the last user message and never from the content; tool responses inside the
# model's turn, which goes on after them; with `enable_thinking` off, a generation prompt that ends in an empty channel,
# with it on, one that opens the channel after a tool's response.
GEMMA4 = """\
{%- macro strip_thinking(text) -%}
    {%- set ns = namespace(result='') -%}
    {%- for part in text.split('<channel|>') -%}
        {%- set ns.result = ns.result + (part.split('<|channel>')[0] if '<|channel>' in part else part) -%}
    {%- endfor -%}
    {{- ns.result | trim -}}
{%- endmacro -%}
{{- bos_token -}}
{%- set ns = namespace(last_user=-1, previous=none, tool_response=false, scan=false, after=none) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- set first = messages[0]['role'] in ['system', 'developer'] -%}
{%- if enable_thinking or tools or first -%}
    {{- '<|turn>system\\n' -}}
    {%- if enable_thinking -%}{{- '<|think|>\\n' -}}{%- endif -%}
    {%- if first -%}{{- messages[0]['content'] | trim -}}{%- endif -%}
    {%- for tool in tools or [] -%}
        {{- '<|tool>declaration:' + tool['function']['name'] + '{}<tool|>' -}}
    {%- endfor -%}
    {{- '<turn|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set index = loop.index0 -%}
    {%- if message['role'] in ['user', 'assistant'] -%}
        {%- set role = 'model' if message['role'] == 'assistant' else 'user' -%}
        {%- if not (role == 'model' and ns.previous == 'model') -%}{{- '<|turn>' + role + '\\n' -}}{%- endif -%}
        {%- set ns.previous = role -%}
        {%- if role == 'user' -%}
            {%- set ns.tool_response = false -%}
            {%- if message['content'] is string -%}
                {{- message['content'] | trim -}}
            {%- else -%}
                {%- for part in message['content'] -%}
                    {{- '<|image|>' if part['type'] == 'image' else part['text'] | trim -}}
                {%- endfor -%}
            {%- endif -%}
            {{- '<turn|>\\n' -}}
        {%- else -%}
            {%- set next = messages[index + 1]['role'] if index + 1 < messages | length else none -%}
            {%- set calls, content = message.get('tool_calls'), strip_thinking(message.get('content') or '') -%}
            {%- set thinks = message.get('reasoning') and index > ns.last_user -%}
            {%- set opening = '<|channel>thought\\n' if thinks else '' -%}
            {%- if enable_thinking and ns.tool_response -%}
                {{- opening -}}
            {%- else -%}
                {%- generation -%}{{- opening -}}{%- endgeneration -%}
            {%- endif -%}
            {%- generation -%}
                {%- if thinks -%}{{- message['reasoning'] + '\\n<channel|>' -}}{%- endif -%}
                {%- for call in calls or [] -%}
                    {{- '<|tool_call>call:' + call['function']['name'] + '{' -}}
                    {%- for key, value in call['function']['arguments'] | dictsort -%}
                        {{- key + ':<|"|>' + value + '<|"|>' -}}
                    {%- endfor -%}
                    {{- '}<tool_call|>' -}}
                {%- endfor -%}
                {%- if not calls -%}{{- content + ('' if next == 'assistant' else '<turn|>') -}}{%- endif -%}
                {%- if calls and next == 'tool' -%}{{- '<|tool_response>' -}}{%- endif -%}
                {%- if calls and next != 'tool' -%}{{- content + '<|tool_response>' -}}{%- endif -%}
            {%- endgeneration -%}
            {%- if not calls and next != 'assistant' -%}{{- '\\n' -}}{%- endif -%}
            {%- set ns.scan, ns.tool_response, ns.after = calls, false, none -%}
            {%- for result in messages[index + 1:] -%}
                {%- if ns.scan and result['role'] == 'tool' -%}
                    {{- '<|tool_response>' if ns.tool_response else '' -}}
                    {{- 'response:' + result['name'] + '{value:<|"|>' + result['content'] + '<|"|>}<tool_response|>' -}}
                    {%- set ns.tool_response = true -%}
                {%- elif ns.scan -%}
                    {%- set ns.scan, ns.after = false, result['role'] -%}
                {%- endif -%}
            {%- endfor -%}
            {%- if ns.tool_response -%}
                {%- generation -%}{{- content -}}{%- endgeneration -%}
                {%- if ns.after == 'user' -%}{{- '<turn|>\\n' -}}{%- endif -%}
            {%- endif -%}
        {%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- set calling = ns.previous == 'model' and messages[-1].get('tool_calls') -%}
{%- if add_generation_prompt and not ns.tool_response and not calling -%}
    {{- '<|turn>model\\n' -}}
    {%- if not enable_thinking -%}{{- '<|channel>thought\\n<channel|>' -}}{%- endif -%}
{%- elif add_generation_prompt and ns.tool_response and enable_thinking -%}
    {{- '<|channel>thought\\n' -}}
{%- endif -%}
"""

# Qwen 3: ChatML; an assistant message after the last user message has a <think> block, earlier ones lose theirs.
QWEN3 = """\
{%- set ns = namespace(last_user=0) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- generation -%}
            {%- if loop.index0 > ns.last_user -%}
                {{- '<think>\\n' + (message.get('reasoning') or '') | trim + '\\n</think>\\n\\n' -}}
            {%- endif -%}
            {{- (message.get('content') or '') | trim -}}
            {%- for call in message.get('tool_calls') or [] -%}
                {{- '\\n<tool_call>\\n' + call['function'] | tojson + '\\n</tool_call>' -}}
            {%- endfor -%}
            {{- '<|im_end|>' -}}
        {%- endgeneration -%}
        {{- '\\n' -}}
    {%- else -%}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

# Llama 3: headers of two special tokens, no white space after a turn.
LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- (message.get('content') or '') | trim + '<|eot_id|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] | trim + '<|eot_id|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""

# Mistral: no role names and no generation prompt.
MISTRAL = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- ' ' -}}{%- generation -%}{{- (message.get('content') or '') | trim + '</s>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- '[INST] ' + message['content'] | trim + ' [/INST]' -}}
    {%- endif -%}
{%- endfor -%}
"""

TEMPLATES = {"gemma4": GEMMA4, "qwen3": QWEN3, "llama3": LLAMA3, "mistral": MISTRAL}


def unmarked(template: str) -> str:
    """The same template without marks: the tags' white-space control is kept."""
    stripped = re.sub(r"\{%- generation -%\}", "{%- if true -%}", template)
    return re.sub(r"\{%- endgeneration -%\}", "{%- endif -%}", stripped)


PAIRS = {name: (make_tokenizer(template), make_tokenizer(unmarked(template))) for name, template in TEMPLATES.items()}


def runs_of(document, flag=ASSISTANT) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff((document.flags & flag) != 0, prepend=False, append=False))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def both(name: str, example: dict) -> list:
    """The documents as the fallback makes them, asserted equal to those by the marks."""
    marked, plain = PAIRS[name]
    assert MARKS.search(marked.chat_template) and not MARKS.search(plain.chat_template)
    by_marks, computed = encode(example, marked), encode(example, plain)
    for ours, theirs in zip(computed, by_marks, strict=True):
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert ours.flags.tolist() == theirs.flags.tolist(), plain.decode(ours.tokens)
        assert ours[2:] == theirs[2:]
    return computed


def trained(name: str, example: dict) -> list[str]:
    """The spans of text that the fallback supervises, asserted equal to the marked ones."""
    tokenizer = PAIRS[name][1]
    return [tokenizer.decode(d.tokens[start:end]) for d in both(name, example) for start, end in runs_of(d)]


def turn(role: str, content, **extra) -> dict:
    return {"role": role, "content": content, **extra}


CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {}}}]

CONVERSATIONS = {
    "one turn": [turn("user", "hi"), turn("assistant", "hello")],
    "several turns": [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d e f")],
    "the same twice": [turn("user", "x"), turn("assistant", "x"), turn("user", "x"), turn("assistant", "x")],
    "ends with the user": [turn("user", "a"), turn("assistant", "b"), turn("user", "c")],
    "system": [turn("system", "be brief"), turn("user", "a"), turn("assistant", "b")],
    "white space": [turn("user", " a\n"), turn("assistant", "\n\n b \n"), turn("user", "c"), turn("assistant", "d\n")],
    "like a token": [turn("user", "<"), turn("assistant", "<p><|tu</p>"), turn("user", "<|"), turn("assistant", "<")],
    "like a header": [turn("user", "model\n"), turn("assistant", "assistant\nuser\nmodel"), turn("user", "assistant")],
    "no answer": [turn("user", "a"), turn("assistant", ""), turn("user", "b"), turn("assistant", "c")],
    "unicode": [turn("user", "é🎈"), turn("assistant", "日本語🎈🎈"), turn("user", "\u202e"), turn("assistant", "ü")],
    "thinking": [
        turn("user", "a"),
        turn("assistant", "b", reasoning="first"),
        turn("user", "c"),
        turn("assistant", "d", reasoning="second"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_computed_spans_equal_the_marks(name, conversation):
    spans = trained(name, {"messages": CONVERSATIONS[conversation]})
    turns = [message for message in CONVERSATIONS[conversation] if message["role"] == "assistant"]
    assert len(spans) == len(turns)
    closing = {"gemma4": "<turn|>", "qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>"}[name]
    for span, message in zip(spans, turns, strict=True):
        assert span.endswith(message["content"].strip() + closing)


TOOL_USE = [
    turn("system", "s"),
    turn("user", "weather?"),
    turn("assistant", "", reasoning="call it", tool_calls=CALL),
    turn("tool", "sunny", name="weather"),
    turn("assistant", "It is sunny.", reasoning="so it is"),
]
LATER = [turn("user", "thanks"), turn("assistant", "welcome")]


THINKING_ON = {"chat_template_kwargs": {"enable_thinking": True}}


def options_of(name: str, thinking: bool) -> dict:
    """The option that turns thinking on or off, for a template that reads it."""
    return {"chat_template_kwargs": {"enable_thinking": thinking}} if name == "gemma4" else {}


@pytest.mark.parametrize("name", ["gemma4", "qwen3"])
def test_tool_calls_are_trained_on_and_their_results_are_not(name):
    spans = trained(name, {"messages": TOOL_USE, "tools": TOOLS, **options_of(name, True)})
    assert "call it" in spans[0] and "Rome" in spans[0] and "It is sunny." in spans[1]
    assert not any("value:" in span or "weather?" in span for span in spans)


def test_tool_calls_of_an_earlier_exchange():
    call = '<|tool_call>call:weather{city:<|"|>Rome<|"|>}<tool_call|><|tool_response>'
    example = {"messages": TOOL_USE + LATER, "tools": TOOLS}
    spans = trained("gemma4", {**example, **THINKING_ON})
    thoughts = ["<|channel>thought\ncall it\n<channel|>", "so it is\n<channel|>"]
    empty = "<|channel>thought\n<channel|>"
    assert spans == [thoughts[0] + call, f"{thoughts[1]}It is sunny.<turn|>", f"{empty}welcome<turn|>"]
    # Qwen 3 renders the thinking before an answer only until the next question.
    spans = trained("qwen3", example)
    assert ["call it" in spans[0], "so it is" in spans[1], "welcome<|im_end|>" in spans[2]] == [True] * 3


TWO_CALLS = [turn("user", "w"), turn("assistant", "", tool_calls=CALL * 2)]
TWO_CALLS += [turn("tool", "x", name="weather"), turn("tool", "y", name="weather"), turn("assistant", "z")]
CALL_AFTER_CALL = [*TWO_CALLS[:3], turn("assistant", "", tool_calls=CALL, reasoning="r"), *TWO_CALLS[3:]]


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("messages", [TOOL_USE, TOOL_USE + LATER, TWO_CALLS, CALL_AFTER_CALL, TWO_CALLS[:2] + LATER])
def test_calls_and_results_of_gemma(messages, thinking):
    example = {"messages": messages, "tools": TOOLS, **options_of("gemma4", thinking)}
    spans = trained("gemma4", example)
    assert len(spans) == sum(message["role"] == "assistant" for message in messages)
    assert not any("response:" in span or "<|turn>" in span for span in spans)


def test_what_gemma_shows_after_the_results_of_a_call():
    """The content of a message with calls stands after their results in the history: the answers have two texts."""
    messages = [TWO_CALLS[0], turn("assistant", "let me see", tool_calls=CALL), *TWO_CALLS[3:]]
    call = '<|tool_call>call:weather{city:<|"|>Rome<|"|>}<tool_call|>'
    first, second = both("gemma4", {"messages": messages, "tools": TOOLS})
    text = PAIRS["gemma4"][1].decode(first.tokens)
    assert text.endswith(f"<|turn>model\n<|channel>thought\n<channel|>{call}let me see<|tool_response>")
    result = '<|tool_response>response:weather{value:<|"|>y<|"|>}<tool_response|>'
    assert PAIRS["gemma4"][1].decode(second.tokens).endswith(f"{call}{result}let me seez<turn|>\n")
    assert trained("gemma4", {"messages": messages, "tools": TOOLS}) == [
        f"{call}let me see<|tool_response>",
        "z<turn|>",
    ]


def test_a_generation_prompt_that_is_not_in_the_text():
    """DiffusionGemma's opens a channel where the text has a turn's header: that is nobody's answer."""
    header = "{{- '<|turn>model\\n' -}}"
    template = unmarked(TURNS).replace(f"add_generation_prompt -%}}{header}", "add_generation_prompt -%}<|channel>")
    assert template.count("<|channel>") == 1
    tokenizer = make_tokenizer(template)
    counts = Counter()
    (document,) = encode({"messages": [turn("user", "a"), turn("assistant", "b")]}, tokenizer, counts)
    assert tokenizer.decode(document.tokens[document.flags != 0]) == "b<turn|>"
    assert counts == {notices.OTHER_PROMPT: 1}


@pytest.mark.parametrize("marked", [True, False])
def test_a_last_character_of_several_tokens_is_trained_on_whole(marked):
    template = "{%- for m in messages -%}{%- generation -%}{{- m['content'] -}}{%- endgeneration -%}{%- endfor -%}"
    tokenizer = make_tokenizer(template if marked else unmarked(template))
    (document,) = encode({"messages": [turn("assistant", "a🎈"), turn("assistant", "b🎈")]}, tokenizer)
    assert len(document.tokens) > 4 and (document.flags & ASSISTANT).all()


def test_thinking_channels_of_gemma():
    messages = [turn("user", "a"), turn("assistant", "b", reasoning="old"), turn("user", "c")]
    messages.append(turn("assistant", "d", reasoning="new"))
    # With thinking off the prompt ends with an empty channel: an answer can't think after that.
    counts = Counter()
    assert trained("gemma4", {"messages": messages}) == ["b<turn|>", "d<turn|>"]
    encode({"messages": messages}, PAIRS["gemma4"][1], counts)
    assert counts == {notices.UNTHOUGHT: 2, notices.UNROLLED: 1}
    thoughts = ["<|channel>thought\nold\n<channel|>b<turn|>", "<|channel>thought\nnew\n<channel|>d<turn|>"]
    assert trained("gemma4", {"messages": messages, **THINKING_ON}) == thoughts


def test_thinking_that_the_template_does_not_render_itself():
    """Gemma 4 has a form for it: the marks are put around what is added, too."""
    template = GEMMA4.replace("message.get('reasoning') and", "false and")
    messages = [turn("user", "a"), turn("assistant", "b", reasoning="hm")]
    for source in (template, unmarked(template)):
        (document,) = encode({"messages": messages, **THINKING_ON}, tokenizer := make_tokenizer(source))
        ((start, end),) = runs_of(document)
        assert tokenizer.decode(document.tokens[start:end]) == "<|channel>thought\nhm\n<channel|>b<turn|>"
    counts = Counter()
    encode({"messages": [messages[0], turn("assistant", "b")], **THINKING_ON}, PAIRS["gemma4"][1], counts)
    assert counts == {notices.EMPTY_THOUGHT: 1}


def by_itself(document, start: int, end: int):
    return document.tokens[start:end].tolist()


def assert_prompted(name: str, example: dict) -> None:
    """Each answer is trained once, after exactly the tokens that an engine is given for it."""
    tokenizer = PAIRS[name][1]
    messages, options = example["messages"], example.get("chat_template_kwargs", {})
    documents = both(name, example)
    starts = [(document, start) for document in documents for start, _ in runs_of(document)]
    trained_on = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    trained_on = [index for index in trained_on if index not in example.get("context", ())]
    for index, (document, start) in zip(trained_on, starts, strict=True):
        prompt = tokenizer.apply_chat_template(
            messages[:index], tools=example.get("tools"), add_generation_prompt=True, return_dict=True, **options
        )["input_ids"]
        assert by_itself(document, 0, start) == prompt
        assert prompt_ids(tokenizer, messages[:index], tools=example.get("tools"), **options) == prompt


@pytest.mark.parametrize("name", ["gemma4", "qwen3", "llama3"])
@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("conversation", [*CONVERSATIONS, "tools"])
def test_what_precedes_an_answer_is_its_prompt(name, conversation, thinking):
    messages = CONVERSATIONS.get(conversation, TOOL_USE + LATER)
    if name == "llama3" and (conversation == "tools" or thinking and conversation == "thinking"):
        pytest.skip("not in this template")
    if not thinking:  # then it is no part of the conversation
        messages = [{key: value for key, value in message.items() if key != "reasoning"} for message in messages]
    tools = TOOLS if conversation == "tools" else None
    assert_prompted(name, {"messages": messages, "tools": tools, **options_of(name, thinking)})


def test_the_empty_channel_of_gemma():
    ids = encode({"messages": CONVERSATIONS["one turn"]}, PAIRS["gemma4"][1])[0].tokens
    text = "<bos><|turn>user\nhi<turn|>\n<|turn>model\n<|channel>thought\n<channel|>hello<turn|>\n"
    assert PAIRS["gemma4"][1].decode(ids) == text


def test_context_is_not_trained_on():
    messages = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]
    for name in TEMPLATES:
        (span,) = trained(name, {"messages": messages, "context": [1]})
        assert span.startswith("d") or span.startswith("<think>")
        (document,) = both(name, {"messages": messages, "context": [1]})
        assert runs_of(document, LAST) == runs_of(document)
    assert_prompted("gemma4", {"messages": messages, "context": [1]})
    (document,) = both("gemma4", {"messages": messages, "context": [1, 3]})
    assert not document.flags.any()


def test_a_token_does_not_hold_the_end_of_a_prompt_and_the_start_of_its_answer():
    template = "{%- for m in messages -%}{{ m.content }}{%- endfor -%}{%- if add_generation_prompt -%}{%- endif -%}"
    tokenizer = make_tokenizer(template, texts=("quick",) * 9)
    assert len(tokenizer("quick")["input_ids"]) == 1
    messages = [turn("user", "qui"), turn("assistant", "ck"), turn("user", "qui"), turn("assistant", "ckqui")]
    (document,) = encode({"messages": messages}, tokenizer)
    parts = [tokenizer(part)["input_ids"] for part in ("qui", "ckqui", "ckqui")]
    assert document.tokens.tolist() == [token for part in parts for token in part]
    assert [tokenizer.decode(document.tokens[start:end]) for start, end in runs_of(document)] == ["ck", "ckqui"]


def test_an_image_stays_the_users():
    content = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    assert trained("gemma4", {"messages": [turn("user", content), turn("assistant", "a cat")]}) == ["a cat<turn|>"]


def test_the_last_assistant_message_is_flagged():
    for name in TEMPLATES:
        *earlier, last = both(name, {"messages": CONVERSATIONS["several turns"]})
        assert not any((document.flags & LAST).any() for document in earlier)
        assert [document.earlier for document in [*earlier, last]] == [True] * len(earlier) + [False]
        assert "d e f" in PAIRS[name][1].decode(last.tokens[(last.flags & LAST) != 0])


pieces = ["a", "b", " ", "\n", "<", "<|", "|>", "<turn", "<|turn", "model\n", "[INST", "/", "think", "é", "🎈"]
text = st.lists(st.sampled_from(pieces), max_size=8).map("".join)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(TEMPLATES)), st.lists(st.tuples(text, text), min_size=1, max_size=3))
def test_computed_spans_equal_the_marks_on_any_text(name, turns):
    messages = [message for q, a in turns for message in (turn("user", q), turn("assistant", a))]
    if name == "mistral":
        trained(name, {"messages": messages})
    else:
        assert_prompted(name, {"messages": messages})


def test_texts_are_trained_on_whole():
    tokenizer = PAIRS["gemma4"][0]
    (document,) = encode({"text": "abc"}, tokenizer)
    assert tokenizer.decode(document.tokens) == "<bos>abc<eos>" and (document.flags == ASSISTANT | LAST).all()


@pytest.mark.parametrize(
    "template, messages, message",
    [
        (None, [turn("user", "a")], "'tiny' has no chat template: set data.tokenizer"),
        ("{{ raise_exception('no system') }}", [turn("system", "a")], "'tiny' refuses it: TemplateError: no system"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", [turn("assistant", "a")], "generation %} marks"),
        ("{% for m in messages %}{{ m.content * 2 }}{% endfor %}", [turn("assistant", "a")], "message 0: .* can't be"),
        (unmarked(GEMMA4), [turn("assistant", "a", tool_responses=[{}])], "holds tool_responses"),
    ],
)
def test_what_cannot_be_masked_is_refused(template, messages, message):
    with pytest.raises(DataError, match=message):
        encode({"messages": messages}, make_tokenizer(template))
