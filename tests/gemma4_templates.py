"""Chat templates of Gemma 4 by the rules of their public revisions, and what each rule makes of a conversation.

The revisions differ in what they render of the thinking (never; before tool calls only, with or without a new line
after it; after the last question), in how they prompt (with an empty thought, after a question or always, or without
one; with an opened thought after a tool's result), and in where tools' results stand. The templates are put together
here from these rules, in as few lines as show them.
"""

from dataclasses import dataclass

STRIP = """\
{%- macro strip(text) -%}
    {%- set ns = namespace(out='') -%}
    {%- for part in text.split('<channel|>') -%}
        {%- set ns.out = ns.out + (part.split('<|channel>')[0] if '<|channel>' in part else part) -%}
    {%- endfor -%}
    {{- ns.out | trim -}}
{%- endmacro -%}
{%- macro said_by(role, content) -%}
    {%- for part in ([{'type': 'text', 'text': content}] if content is string else content) -%}
        {%- if part.type == 'image' -%}
            {{- '<|image|>' -}}
        {%- elif part.type == 'text' -%}
            {{- strip(part.text) if role == 'model' else part.text | trim -}}
        {%- endif -%}
    {%- endfor -%}
{%- endmacro -%}
{%- macro value(given) -%}
    {{- '<|"|>' + given + '<|"|>' if given is string else given | string -}}
{%- endmacro -%}
"""


@dataclass(frozen=True)
class Rules:
    """What a revision does.

    Attributes:
        think: what turns thinking on, in the system turn.
        default_system: of a conversation with thinking and without a system prompt.
        thoughts: which the history shows: "never", "calls" (of the last exchange's tool calls) or "last" (of the last
            exchange).
        names: under which fields it looks for them.
        close: what it writes after a thought.
        results: "turns" of their own, or "inside" the model's turn.
        empty: where the prompt ends with an empty thought, if thinking is off: "never", after "questions", "always".
        opens: the prompt after a tool's result opens a thought, if thinking is on.
        preserves: it reads ``preserve_thinking``.
        joins: what the model says in several messages one after the other stands in one turn.
    """

    think: str = "<|think|>\\n"
    default_system: str = ""
    thoughts: str = "never"
    names: tuple[str, ...] = ("reasoning", "reasoning_content")
    close: str = "\\n<channel|>"
    results: str = "inside"
    empty: str = "questions"
    opens: bool = False
    preserves: bool = False
    joins: bool = False


VARIANTS = {
    "first": Rules(think="<|think|>", results="turns", empty="always"),
    "with a default system prompt": Rules(
        default_system="You are a helpful assistant.", results="turns", empty="always"
    ),
    "interleaved": Rules(
        thoughts="calls", names=("reasoning_content",), close="<channel|>", results="turns", empty="always"
    ),
    "spring, large": Rules(thoughts="calls"),
    "spring, small": Rules(thoughts="calls", empty="never"),
    "summer, large": Rules(thoughts="last", opens=True, preserves=True, joins=True),
    "summer, small": Rules(thoughts="last", opens=True, preserves=True, joins=True, empty="never"),
    "empty after results": Rules(thoughts="calls", empty="everywhere"),
    "without thoughts": Rules(empty="never"),
}


def template(rules: Rules) -> str:
    """The text of a chat template."""
    get = " or ".join(f"m.get('{name}')" for name in rules.names)
    shown = {
        "never": "false",
        "calls": "m.get('tool_calls') and loop.index0 > ns.last",
        "last": "loop.index0 > ns.last" + (" or (preserve_thinking and m.get('tool_calls'))" * rules.preserves),
    }[rules.thoughts]
    inside = rules.results == "inside"
    default = f"{{%- elif enable_thinking -%}}{{{{- '{rules.default_system}' -}}}}" if rules.default_system else ""
    empty = "{{- '<|channel>thought\\n<channel|>' -}}"
    off = "{%- if not enable_thinking -%}" + empty + "{%- endif -%}"
    after_result = ""
    if rules.opens:
        after_result = "{%- elif ns.after == 'result' and enable_thinking -%}{{- '<|channel>thought\\n' -}}"
    if rules.empty == "everywhere":
        after_result = "{%- elif ns.after == 'result' and not enable_thinking -%}" + empty
    return (
        STRIP
        + "{%- set enable_thinking = enable_thinking | default(false) -%}"
        + "{%- set preserve_thinking = preserve_thinking | default(false) -%}" * rules.preserves
        + "{%- set ns = namespace(last=-1, after='', previous='', next='', results=0) -%}{{- bos_token -}}"
        "{%- set rest = messages -%}{%- set first = messages[0].role in ['system', 'developer'] -%}"
        "{%- if enable_thinking or tools or first -%}{{- '<|turn>system\\n' -}}"
        "{%- if enable_thinking -%}{{- '" + rules.think + "' -}}{%- endif -%}"
        "{%- if first -%}{{- messages[0].content | trim -}}{%- set rest = messages[1:] -%}" + default + "{%- endif -%}"
        "{%- for tool in tools or [] -%}{{- '<|tool>declaration:' + tool.function.name + '{}<tool|>' -}}{%- endfor -%}"
        "{{- '<turn|>\\n' -}}{%- endif -%}"
        "{%- for m in rest -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
        "{%- for m in rest -%}"
        + ("{%- if m.role != 'tool' -%}" if inside else "")
        + "{%- set role = 'model' if m.role == 'assistant' else m.role -%}{%- set ns.after = '' -%}"
        + ("{%- if not (role == 'model' and ns.previous == 'model') -%}" if inside else "")
        + "{{- '<|turn>' + role + '\\n' -}}"
        + ("{%- endif -%}" if inside else "")
        + "{%- set ns.previous = role -%}{%- set thought = "
        + get
        + " -%}"
        "{%- if thought and ("
        + shown
        + ") -%}{{- '<|channel>thought\\n' + thought + '"
        + rules.close
        + "' -}}{%- endif -%}"
        "{%- for call in m.get('tool_calls') or [] -%}{{- '<|tool_call>call:' + call.function.name + '{' -}}"
        "{%- for key, given in call.function.arguments | dictsort -%}{{- ',' if not loop.first -}}"
        "{{- key + ':' + value(given) -}}{%- endfor -%}{{- '}<tool_call|>' -}}"
        "{%- set ns.after = 'call' -%}{%- endfor -%}"
        + "{%- set ns.results = 0 -%}"
        + (
            "{%- if m.get('tool_calls') -%}{%- set scan = namespace(on=true) -%}"
            "{%- for r in rest[loop.index0 + 1:] -%}{%- if r.role != 'tool' -%}{%- set scan.on = false -%}{%- endif -%}"
            "{%- if scan.on -%}{{- '<|tool_response>response:' + r.get('name', 'unknown') + '{value:' -}}"
            "{{- value(r.content) + '}<tool_response|>' -}}{%- set ns.results = ns.results + 1 -%}"
            "{%- set ns.after = 'result' -%}{%- endif -%}{%- endfor -%}{%- endif -%}"
            if inside
            else ""
        )
        + "{%- set said = said_by(role, m.content) -%}{{- said -}}"
        + "{%- set ns.next = '' -%}"
        + (
            "{%- for r in rest[loop.index0 + 1:] -%}{%- if r.role != 'tool' and not ns.next -%}"
            "{%- set ns.next = r.role -%}{%- endif -%}{%- endfor -%}"
            if rules.joins
            else ""
        )
        + (
            "{%- if ns.after == 'call' and not ns.results -%}{{- '<|tool_response>' -}}"
            + (
                "{%- elif role == 'model' and ns.next == 'assistant' and (not m.get('tool_calls') or ns.results) -%}"
                if rules.joins
                else ""
            )
            + "{%- elif not (ns.results and not said"
            + (" and not ns.next" if rules.joins else "")
            + ") -%}{{- '<turn|>\\n' -}}{%- endif -%}"
            if inside
            else "{{- '<turn|>\\n' -}}"
        )
        + ("{%- endif -%}" if inside else "")
        + "{%- endfor -%}"
        "{%- if add_generation_prompt -%}"
        + ("{%- if ns.after not in ['result', 'call'] -%}" if inside else "")
        + "{{- '<|turn>model\\n' -}}"
        + (off if rules.empty != "never" else "")
        + after_result
        + ("{%- endif -%}" if inside else "")
        + "{%- endif -%}"
    )


def opened(rules: Rules, before: list[dict]) -> bool:
    """Whether the prompt after some messages opens a thought, with thinking on."""
    return rules.opens and before[-1]["role"] == "tool"


def empty_thought(rules: Rules, before: list[dict]) -> bool:
    """Whether the prompt after some messages ends with an empty thought, with thinking off."""
    after_result = before[-1]["role"] == "tool" and rules.results == "inside"
    return rules.empty in ("always", "everywhere") or rules.empty == "questions" and not after_result
