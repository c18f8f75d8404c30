"""The computed assistant spans against the template's own marks: same template, with its marks and without."""

import re

import numpy as np
import pytest
from data_helpers import TURNS, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from joint_train.data.template import ASSISTANT, LAST, MARKS, encode
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


def both(name: str, example: dict) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Token ids, flags by the marks, flags by the fallback."""
    marked, plain = PAIRS[name]
    assert MARKS.search(marked.chat_template) and not MARKS.search(plain.chat_template)
    ids, by_marks = encode(example, marked)
    same_ids, computed = encode(example, plain)
    assert ids.tolist() == same_ids.tolist()
    return ids, by_marks, computed


def trained(name: str, example: dict) -> list[str]:
    """The spans of text that the fallback supervises, asserted equal to the marked ones."""
    ids, by_marks, computed = both(name, example)
    tokenizer = PAIRS[name][1]
    assert computed.tolist() == by_marks.tolist(), tokenizer.decode(ids)
    edges = np.flatnonzero(np.diff(computed & ASSISTANT, prepend=0, append=0))
    return [tokenizer.decode(ids[start:end]) for start, end in zip(edges[::2], edges[1::2], strict=True)]


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


@pytest.mark.parametrize("name", ["gemma4", "qwen3"])
def test_tool_calls_are_trained_on_and_their_results_are_not(name):
    spans = trained(name, {"messages": TOOL_USE, "tools": TOOLS})
    assert "call it" in spans[0] and "Rome" in spans[0] and "It is sunny." in spans[1]
    assert not any("value:" in span or "weather?" in span for span in spans)


def test_tool_calls_of_an_earlier_exchange():
    spans = trained("gemma4", {"messages": TOOL_USE + LATER, "tools": TOOLS})
    call = '<|tool_call>call:weather{city:<|"|>Rome<|"|>}<tool_call|><|tool_response>'
    assert spans == [call, "It is sunny.<turn|>", "welcome<turn|>"], "without the thinking, as it is rendered then"
    # Qwen 3 writes an empty <think> block wherever a conversation stops: that hides the call's end.
    with pytest.raises(DataError, match="message 2: .* 'tiny' renders it so that"):
        encode({"messages": TOOL_USE + LATER, "tools": TOOLS}, PAIRS["qwen3"][1])


TWO_CALLS = [turn("user", "w"), turn("assistant", "", tool_calls=CALL * 2)]
TWO_CALLS += [turn("tool", "x", name="weather"), turn("tool", "y", name="weather"), turn("assistant", "z")]
CALL_AFTER_CALL = [*TWO_CALLS[:3], turn("assistant", "", tool_calls=CALL, reasoning="r"), *TWO_CALLS[3:]]


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("messages", [TOOL_USE, TOOL_USE + LATER, TWO_CALLS, CALL_AFTER_CALL, TWO_CALLS[:2] + LATER])
def test_calls_and_results_of_gemma(messages, thinking):
    options = {"enable_thinking": thinking}
    spans = trained("gemma4", {"messages": messages, "tools": TOOLS, "chat_template_kwargs": options})
    assert len(spans) == sum(message["role"] == "assistant" for message in messages)
    assert not any("response:" in span or "<|turn>" in span for span in spans)


def test_what_gemma_shows_after_the_results_of_a_call_is_refused():
    """The content of a message with calls stands after their results: what the model wrote is in two pieces."""
    messages = [TWO_CALLS[0], turn("assistant", "let me see", tool_calls=CALL), *TWO_CALLS[2:]]
    with pytest.raises(DataError, match="message 1: .* renders it so that"):
        encode({"messages": messages, "tools": TOOLS}, PAIRS["gemma4"][1])


def test_a_generation_prompt_that_is_not_in_the_text():
    """DiffusionGemma's opens a channel where the text has a turn's header: that is nobody's answer."""
    header = "{{- '<|turn>model\\n' -}}"
    template = unmarked(TURNS).replace(f"add_generation_prompt -%}}{header}", "add_generation_prompt -%}<|channel>")
    assert template.count("<|channel>") == 1
    tokenizer = make_tokenizer(template)
    ids, flags = encode({"messages": [turn("user", "a"), turn("assistant", "b")]}, tokenizer)
    assert tokenizer.decode(ids[flags != 0]) == "b<turn|>"


@pytest.mark.parametrize("marked", [True, False])
def test_a_last_character_of_several_tokens_is_trained_on_whole(marked):
    template = "{%- for m in messages -%}{%- generation -%}{{- m['content'] -}}{%- endgeneration -%}{%- endfor -%}"
    tokenizer = make_tokenizer(template if marked else unmarked(template))
    ids, flags = encode({"messages": [turn("assistant", "a🎈"), turn("assistant", "b🎈")]}, tokenizer)
    assert len(ids) > 4 and (flags & ASSISTANT).all()


def test_thinking_channels_of_gemma():
    messages = [turn("user", "a"), turn("assistant", "<|channel>thought\nold<channel|>b"), turn("user", "c")]
    messages.append(turn("assistant", "d", reasoning="new"))
    assert trained("gemma4", {"messages": messages}) == ["b<turn|>", "<|channel>thought\nnew\n<channel|>d<turn|>"]
    options = {"chat_template_kwargs": {"enable_thinking": True}}
    spans = trained("gemma4", {"messages": messages, **options})
    assert spans == ["b<turn|>", "<|channel>thought\nnew\n<channel|>d<turn|>"]


def test_an_image_stays_the_users():
    content = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    assert trained("gemma4", {"messages": [turn("user", content), turn("assistant", "a cat")]}) == ["a cat<turn|>"]


def test_the_last_assistant_message_is_flagged():
    ids, _, computed = both("gemma4", {"messages": CONVERSATIONS["several turns"]})
    assert PAIRS["gemma4"][1].decode(ids[(computed & LAST) != 0]) == "d e f<turn|>"


pieces = ["a", "b", " ", "\n", "<", "<|", "|>", "<turn", "<|turn", "model\n", "[INST", "/", "think", "é", "🎈"]
text = st.lists(st.sampled_from(pieces), max_size=8).map("".join)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(TEMPLATES)), st.lists(st.tuples(text, text), min_size=1, max_size=3))
def test_computed_spans_equal_the_marks_on_any_text(name, turns):
    messages = [message for q, a in turns for message in (turn("user", q), turn("assistant", a))]
    trained(name, {"messages": messages})


def test_texts_are_trained_on_whole():
    tokenizer = PAIRS["gemma4"][0]
    ids, flags = encode({"text": "abc"}, tokenizer)
    assert tokenizer.decode(ids) == "<bos>abc<eos>" and (flags == ASSISTANT | LAST).all()


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
